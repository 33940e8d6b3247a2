"""Whether tensors have values that can be looked at, and checks that suit what PyTorch is doing right now."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn


def has_values(x: Tensor) -> bool:
    """Return whether the values of `x` can be read.

    They cannot on the "meta" device, in fake tensors, and in tensors wrapped by a function transform (`torch.func.vmap`).
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    fakes = sys.modules.get("torch._subclasses.fake_tensor")  # without that import no fake tensor exists
    return not x.is_meta and (fakes is None or not isinstance(x, fakes.FakeTensor))


def lacks_values(module: nn.Module) -> bool:
    """Return whether the values of some parameter of the module cannot be read, so that the module cannot be run."""
    return not all(has_values(parameter) for parameter in module.parameters())


def require(condition: Tensor, otherwise: str, error: type[Exception]) -> None:
    """Raise an error unless a condition holds.

    Eager code on a CPU reads the condition and raises `error`. Compiled code and other devices check it asynchronously, so
    that CUDA graphs can be captured; there PyTorch's own assertion fails with the same message.

    Args:
        condition: one bool, as a tensor.
        otherwise: the message.
        error: class of the error.
    """
    if condition.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(condition, otherwise)
    elif not bool(condition):
        raise error(otherwise)
