"""Patching and unpatching of upstream models, and the handles of patched models."""

from tokenmerge.patching.handle import Handle, handle_of, is_patched, patch, patched, unpatch
from tokenmerge.patching.summary import Summary
from tokenmerge.patching.target import model_cost

__all__ = ["Handle", "Summary", "handle_of", "is_patched", "model_cost", "patch", "patched", "unpatch"]
