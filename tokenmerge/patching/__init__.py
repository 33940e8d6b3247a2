"""Patching and unpatching of upstream models, and the handles of patched models."""

from tokenmerge.patching.apply import is_patched, patch, patched, unpatch
from tokenmerge.patching.handle import Handle, handle_of
from tokenmerge.patching.summary import Summary
from tokenmerge.patching.target import model_cost
from tokenmerge.patching.tuning.record import Tuning

__all__ = ["Handle", "Summary", "Tuning", "handle_of", "is_patched", "model_cost", "patch", "patched", "unpatch"]
