"""Counting the multiply-adds of linear layers, whatever made them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def channels_of(block: nn.Module, otherwise: int) -> int:
    """C of a block's tokens, as its norms have it: layers may have been pruned, quantised or given adapters since."""
    norms: list[Any] = [module for module in block.modules() if "Norm" in type(module).__name__]
    weights = (getattr(norm, "weight", None) for norm in norms)
    weight = next((weight for weight in weights if isinstance(weight, Tensor) and weight.dim() == 1), None)
    return otherwise if weight is None else len(weight)


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def linear_weights(*modules: nn.Module) -> int:
    """Multiply-adds per token; quantized and other linear layers count by their shape."""
    found: list[Any] = [m for module in modules for m in module.modules() if _is_linear(m)]
    # a layer around another one (an adapter) is counted by its parts
    linear = [m for m in found if not any(_is_linear(part) for part in m.modules() if part is not m)]
    return sum(int(m.in_features) * int(m.out_features) for m in linear)
