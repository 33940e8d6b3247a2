"""Tensors without values: of the "meta" device, or made under PyTorch's FakeTensorMode."""

from __future__ import annotations

import sys

from torch import Tensor, nn


def has_values(x: Tensor) -> bool:
    """Whether there are numbers in `x` that could be looked at."""
    fakes = sys.modules.get("torch._subclasses.fake_tensor")  # nobody has made one before it is imported
    return not x.is_meta and (fakes is None or not isinstance(x, fakes.FakeTensor))


def lacks_values(module: nn.Module) -> bool:
    """Whether a parameter of the module has no numbers, so that nothing can be tried on it."""
    return not all(has_values(parameter) for parameter in module.parameters())
