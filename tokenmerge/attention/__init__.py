"""Attention that knows token sizes: the tap, the one call, its forms, and positions of merged tokens."""
