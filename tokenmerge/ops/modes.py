"""Whether tensors have values that can be looked at, and checks that suit what PyTorch is doing right now."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn


def has_values(x: Tensor) -> bool:
    """Whether there are numbers in `x` that could be looked at: it is neither on the "meta" device nor a fake tensor, nor one
    that a function transform (`torch.func.vmap`) follows.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    fakes = sys.modules.get("torch._subclasses.fake_tensor")  # nobody has made one before it is imported
    return not x.is_meta and (fakes is None or not isinstance(x, fakes.FakeTensor))


def lacks_values(module: nn.Module) -> bool:
    """Whether a parameter of the module has no numbers, so that nothing can be tried on it."""
    return not all(has_values(parameter) for parameter in module.parameters())


def require(condition: Tensor, otherwise: str, error: type[Exception]) -> None:
    """Raise `error` with that sentence unless the condition, one boolean, is true.

    So it is in plain Python on a CPU. Compiled code and other devices check without waiting for the value, so that CUDA
    graphs can be captured: there PyTorch's own assertion fails, with the same sentence.
    """
    if condition.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(condition, otherwise)
    elif not bool(condition):
        raise error(otherwise)
