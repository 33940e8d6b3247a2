"""Sorting, row sums and row maxima in operations that every exporter and runtime supports.

Stable sorts, additions into rows and scattered maxima are fast in PyTorch, but OpenVINO, Core ML and the older ONNX
exporter each lack some of them, and runtimes differ in how they break ties. Exported programs use comparisons, products and
gathers instead, which give the same result everywhere. They cost little beside attention: |A|² comparisons and r·N·C
multiply-adds per block.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ascending_order(values: Tensor) -> Tensor:
    """Return the positions that sort `values` in ascending order; ties go to the lower position.

    Args:
        values: `[B, M]`, any dtype; NaN counts as larger than any number, as in PyTorch's sorts.

    Returns:
        Positions `[B, M]` int64.
    """
    if values.is_floating_point():
        values = torch.where(values != values, torch.full_like(values, torch.inf), values)
    position = torch.arange(values.shape[1], device=values.device)
    own, other = values.unsqueeze(2), values.unsqueeze(1)
    earlier = (position.unsqueeze(0) < position.unsqueeze(1)).unsqueeze(0)
    before = torch.logical_or(other < own, torch.logical_and(other == own, earlier))
    rank = before.to(torch.int64).sum(dim=2)
    return torch.zeros_like(rank).scatter(1, rank, position.expand_as(rank))


def descending_order(values: Tensor) -> Tensor:
    """Return the positions `[B, M]` int64 that sort `values` in descending order: NaN first, ties by lower position."""
    if values.is_floating_point():
        values = torch.where(values != values, torch.full_like(values, torch.inf), values)
    return ascending_order(-values)


def add_rows(rows: Tensor, target: Tensor, values: Tensor, left: int) -> Tensor:
    """Return `rows` with `values` added to the rows in `target`, computed as a matrix product with their map.

    Args:
        rows: `[B·N']` or `[B·N', C]`, floating.
        target: `[B·r]` int64: the row that each value is added to, always a row of the same image.
        values: `[B·r]` or `[B·r, C]`.
        left: N', rows per image.
    """
    wide = rows if rows.dim() == 2 else rows.unsqueeze(1)
    parts = values if rows.dim() == 2 else values.unsqueeze(1)
    batch = wide.view(-1, left, wide.shape[1])
    into = _map(target, batch.shape[0], left).to(wide.dtype)
    summed = batch + into @ parts.reshape(batch.shape[0], into.shape[2], wide.shape[1])
    return summed.reshape(rows.shape)


def largest_rows(rows: Tensor, target: Tensor, values: Tensor, left: int) -> Tensor:
    """Return the elementwise maximum of each row and the `values` whose `target` it is; arguments as for `add_rows`."""
    wide = rows if rows.dim() == 2 else rows.unsqueeze(1)
    parts = values if rows.dim() == 2 else values.unsqueeze(1)
    batch = wide.view(-1, left, wide.shape[1])
    into = _map(target, batch.shape[0], left).unsqueeze(3)  # [B, N', r, 1]
    others = parts.reshape(batch.shape[0], 1, into.shape[2], wide.shape[1])
    lowest = torch.full_like(others[:, :, :1, :1], torch.finfo(wide.dtype).min)
    largest = torch.maximum(batch, torch.where(into, others, lowest).amax(dim=2))
    return largest.reshape(rows.shape)


def marked(index: Tensor, count: int) -> Tensor:
    """Return `[B, count]` bool: true for the numbers from 0 to `count − 1` that occur in `index [B, M]`."""
    position = torch.arange(count, device=index.device).view(1, 1, -1)
    return (index.unsqueeze(2) == position).to(torch.int64).sum(dim=1) > 0


def places_of(wanted: Tensor, among: Tensor) -> Tensor:
    """Return `[B, r]` int64: the position of each number of `wanted [B, r]` in `among [B, M]`."""
    place = torch.arange(among.shape[1], device=among.device).view(1, 1, -1)
    return ((wanted.unsqueeze(2) == among.unsqueeze(1)).to(torch.int64) * place).sum(dim=2)


def largest_by(values: Tensor, group: Tensor, groups: int, least: float) -> Tensor:
    """Return the maximum of `values` in each group.

    Args:
        values: `[B, M]`.
        group: `[B, M]` integers: the group of each value.
        groups: G, number of groups.
        least: result for empty groups.

    Returns:
        Maxima `[B, G]`.
    """
    belongs = group.unsqueeze(1) == torch.arange(groups, device=group.device).view(1, -1, 1)
    wide = values.unsqueeze(1).expand(-1, groups, -1)
    return torch.where(belongs, wide, torch.full_like(wide, least)).amax(dim=2)


def _map(target: Tensor, batch: int, left: int) -> Tensor:
    """Return `[B, N', r]` bool: true where a value belongs to a row."""
    first = torch.arange(batch, device=target.device).view(-1, 1, 1) * left
    own = target.reshape(batch, 1, -1) - first
    return own == torch.arange(left, device=target.device).view(1, -1, 1)
