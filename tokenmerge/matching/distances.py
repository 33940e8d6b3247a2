"""Similarity measures (paper, table 1b), each written as one matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmerge.config import Distance
from tokenmerge.ops.basics import unit


def as_product(a: Tensor, b: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
    """Transform two sets of vectors so that their dot products are the similarities (paper, table 1b).

    Args:
        a: vectors `[B, M, D]`, any floating dtype.
        b: vectors `[B, K, D]`.
        distance: "cosine"; "dot"; "euclidean", which is `−‖a − b‖² / 2`; or "softmax", the logarithm of
            `softmax(A Bᵀ / √D)` over all of B.

    Returns:
        Vectors `[B, M, D']` and `[B, K, D']` in float32, where D' is D, D + 1 or D + 2.
    """
    if distance == "cosine":
        return unit(a), unit(b)
    a, b = a.to(torch.float32), b.to(torch.float32)
    if distance == "euclidean":
        # two more channels on each side turn a·b into a·b − |a|²/2 − |b|²/2
        half_a, half_b = -0.5 * a.square().sum(dim=2, keepdim=True), -0.5 * b.square().sum(dim=2, keepdim=True)
        return (
            torch.cat([a, half_a, torch.ones_like(half_a)], dim=2),
            torch.cat([b, torch.ones_like(half_b), half_b], dim=2),
        )
    if distance == "softmax":
        a = a * a.shape[2] ** -0.5
        total = (a @ b.transpose(1, 2)).logsumexp(dim=2, keepdim=True)
        return torch.cat([a, -total], dim=2), torch.cat([b, torch.ones_like(b[:, :, :1])], dim=2)
    return a, b


def similarities(a: Tensor, b: Tensor, distance: Distance = "cosine") -> Tensor:
    """Compute all similarities of vectors `[B, M, D]` and `[B, K, D]`: `[B, M, K]` float32, larger for more similar ones."""
    left, right = as_product(a, b, distance)
    scores: Tensor = left @ right.transpose(1, 2)
    return scores
