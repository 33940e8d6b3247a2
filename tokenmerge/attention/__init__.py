"""Proportional attention inside upstream's attention modules, and the positions of merged tokens."""
