"""What tests of matchers share: metrics without ties, exact ones, and plans as groups of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmerge import MergePlan


def drawn(seed: int, batch: int = 2, tokens: int = 15, channels: int = 3) -> tuple[Tensor, Tensor]:
    """A metric without ties, `[B, N, D]`, and sizes `[B, N]`."""
    draw = torch.Generator().manual_seed(seed)
    metric = torch.randn(batch, tokens, channels, generator=draw)
    return metric, torch.randint(1, 40, (batch, tokens), generator=draw).float()


def exact_metric(tokens: int, batch: int = 2, seed: int = 0) -> Tensor:
    """`[B, N, 32]`: 16 of 32 channels are ±1, so cosines are sixteenths, exact however they are summed, and edges differ."""
    draw = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (batch, tokens, 32), generator=draw).float() * 2 - 1
    chosen = torch.rand(batch, tokens, 32, generator=draw).argsort(dim=2) < 16
    return signs * chosen


def cosines(metric: Tensor) -> Tensor:
    """`[N, D]` -> `[N, N]` in float64."""
    unit = metric.double() / metric.double().norm(dim=1, keepdim=True)
    scores: Tensor = unit @ unit.T
    return scores


def groups(plan: MergePlan, image: int) -> set[frozenset[int]]:
    """Which tokens of an image became one; those that were dropped are a group as well."""
    found: dict[int, set[int]] = {}
    for token, place in enumerate(plan.assign[image].tolist()):
        found.setdefault(place, set()).add(token)
    return {frozenset(group) for group in found.values()}


def joined(pairs: dict[int, int], tokens: int) -> set[frozenset[int]]:
    """The groups when each key joins its value, which stays."""
    return {
        frozenset([token, *(key for key, to in pairs.items() if to == token)])
        for token in range(tokens)
        if token not in pairs
    }
