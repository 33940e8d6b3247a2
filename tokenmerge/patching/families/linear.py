"""Counting the multiply-adds of linear layers, whatever made them."""

from __future__ import annotations

from typing import Any

from torch import nn


def linear_weights(*modules: nn.Module) -> int:
    """Multiply-adds per token; quantized and other linear layers count by their shape."""
    leaves: list[Any] = [m for module in modules for m in module.modules() if not any(True for _ in m.children())]
    linear = [m for m in leaves if hasattr(m, "in_features") and hasattr(m, "out_features")]
    return sum(int(m.in_features) * int(m.out_features) for m in linear)
