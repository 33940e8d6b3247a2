"""Sorting with ties by position, in a form that exporters know."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmerge.ops.exporting import is_exporting


def descending_order(values: Tensor) -> Tensor:
    """Positions of `values [B, M]` from the largest to the smallest, equal ones by ascending position; `[B, M]`, int64.

    ONNX has no stable sort, but its TopK puts the lower of equal positions first, which is the same.
    """
    if is_exporting() and torch.onnx.is_in_onnx_export():
        return values.topk(values.shape[1], dim=1).indices
    return values.argsort(dim=1, descending=True, stable=True)


def ascending_order(values: Tensor) -> Tensor:
    """The same from the smallest to the largest, for integers."""
    return descending_order(-values)
