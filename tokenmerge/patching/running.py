"""Detection of running forward passes by inspecting stack frames, for unpatching and for blocks that run on their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn
from torch.fx import GraphModule

from tokenmerge.errors import PatchError
from tokenmerge.patching.families.family import ModelFamily, model_family
from tokenmerge.patching.record import ModelRecord, record_of
from tokenmerge.patching.swap import original_class


def is_running(model: nn.Module) -> bool:
    """Return whether any thread is inside a forward method of the model or of a module in it."""
    modules = {id(module) for module in model.modules()}
    return any(id(frame.f_locals.get("self")) in modules for frame in _frames() if frame.f_code.co_name in _METHODS)


def runs_by_hand(record: ModelRecord) -> bool:
    """Return whether the blocks of a model are run by code other than a graph of torch.fx.

    Raises:
        PatchError: if another model runs them, which would misread merged tokens.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, GraphModule):
            return False
        family = model_family(original_class(module)) if isinstance(module, nn.Module) else None
        if family is not None and isinstance(module, nn.Module):
            if record_of(module) is not record and _shares_blocks(family, module, record):
                raise PatchError(
                    f"blocks of a patched model run inside another {type(module).__name__}, which is not patched and would misread "
                    "their tokens: give that model blocks of its own (copy.deepcopy), or unpatch"
                )
            return True
        frame = frame.f_back
    return True


def _shares_blocks(family: ModelFamily, module: nn.Module, record: ModelRecord) -> bool:
    try:
        blocks = family.blocks(module)
    except AttributeError:
        return False
    return any(getattr(record_of(block), "model", None) is record for block in blocks)


_METHODS = ("forward", "forward_features", "forward_intermediates", "forward_head", "_call_impl")
"""Names of the module methods that run during a forward pass."""


def _frames() -> Iterator[FrameType]:
    """Yield the stack frames of every thread, innermost first."""
    for innermost in sys._current_frames().values():
        frame: FrameType | None = innermost
        while frame is not None:
            yield frame
            frame = frame.f_back
