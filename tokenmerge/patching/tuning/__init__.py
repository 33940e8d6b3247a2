"""Tuning: measure a patched model on the user's inputs and device, and choose the fastest alternatives there."""

from tokenmerge.patching.tuning.record import Tried, Tuning

__all__ = ["Tried", "Tuning"]
