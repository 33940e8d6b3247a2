"""Whether a model is running right now, in any thread; asked when it is unpatched, so that passes need not note anything."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn


def is_running(model: nn.Module) -> bool:
    """Whether some thread is inside a method of the model, or of a module in it."""
    modules = {id(module) for module in model.modules()}
    return any(id(frame.f_locals.get("self")) in modules for frame in _frames() if frame.f_code.co_name in _METHODS)


_METHODS = ("forward", "forward_features", "forward_intermediates", "forward_head", "_call_impl")
"""Functions of modules in which a pass is on its way."""


def _frames() -> Iterator[FrameType]:
    """The frames of every thread, innermost first."""
    for innermost in sys._current_frames().values():
        frame: FrameType | None = innermost
        while frame is not None:
            yield frame
            frame = frame.f_back
