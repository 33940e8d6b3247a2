"""Patching and unpatching of upstream models, and the handles of patched models."""

from tokenmerge.patching.handle import Handle, handle_of, is_patched, model_cost, patch, patched, unpatch
from tokenmerge.patching.summary import Summary

__all__ = ["Handle", "Summary", "handle_of", "is_patched", "model_cost", "patch", "patched", "unpatch"]
