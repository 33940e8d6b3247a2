"""Patching: making an upstream model merge tokens, and undoing it."""

from tokenmerge.patching.handle import Handle, handle_of, is_patched, model_cost, patch, patched, unpatch
from tokenmerge.patching.summary import Summary

__all__ = ["Handle", "Summary", "handle_of", "is_patched", "model_cost", "patch", "patched", "unpatch"]
