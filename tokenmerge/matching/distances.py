"""What "similar" means (paper, table 1b), each written as one product of vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmerge.config import Distance
from tokenmerge.ops.basics import unit


def as_product(a: Tensor, b: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
    """Vectors whose products are the similarities, `a' · b'`: `[B, M, D]`, `[B, K, D]` -> `[B, M, D']`, `[B, K, D']`.

    Args:
        a: one side, float32.
        b: the other.
        distance: "cosine"; "dot"; "euclidean", `−‖a − b‖² / 2`; "softmax", the logarithm of `softmax(A Bᵀ / √D)`: how
            much of a's attention b gets among all of B.
    """
    if distance == "cosine":
        return unit(a), unit(b)
    a, b = a.to(torch.float32), b.to(torch.float32)
    if distance == "euclidean":
        # each side's half of the squares, and 1 for the other's: a·b − |a|²/2 − |b|²/2
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
    """`[B, M, K]` float32, larger for closer vectors."""
    left, right = as_product(a, b, distance)
    scores: Tensor = left @ right.transpose(1, 2)
    return scores
