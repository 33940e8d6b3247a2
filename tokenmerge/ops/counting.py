"""Small ranges of integers, made once: on a CPU making one takes as long as using it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=512)
def _made(count: int, step: int) -> Tensor:
    with torch.inference_mode(False):  # or a later training pass could not save it for backward
        return torch.arange(count).mul_(step)


def counting(count: int, device: torch.device, step: int = 1) -> Tensor:
    """`0, step, 2·step, …`, `[count]` int64. The same tensor each time on a CPU: never change it in place.

    Made anew wherever code is traced, because another mode's tensor must not be found by the next caller, and on
    other devices, where memory may belong to a captured graph.
    """
    # not arange with a step: its length would be a quotient of symbols where N is dynamic, which Dynamo cannot print
    if device.type != "cpu" or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        numbers = torch.arange(count, device=device)
        return numbers.mul_(step)
    return _made(count, step)
