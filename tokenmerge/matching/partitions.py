"""Which tokens are on which side of a bipartite matching (paper, table 1e)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenmerge.config import Partition
from tokenmerge.ops.basics import ascending_order


def shuffled(count: int, seed: int, device: torch.device) -> Tensor:
    """`0 … count − 1` in an order that looks random and is the same each time and everywhere, `[count]` int64.

    It is computed where it is wanted: a list made in Python would have to be copied there in every pass.
    """
    mixed = ((torch.arange(count, device=device) + 1) * 0x9E3779B1 + (seed + 1) * 0x85EBCA6B) % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D % 2**32
    mixed = (mixed ^ (mixed >> 12)) * 0x297A2D39 % 2**32
    return ascending_order((mixed ^ (mixed >> 15)).unsqueeze(0))[0]


def _on_a(partition: Partition, free: int, count_a: int, columns: int, layer: int, device: torch.device) -> Tensor:
    """`[free]` boolean: which of the tokens that may merge are on side A, `count_a` of them."""
    position = torch.arange(free, device=device)
    if partition == "random":
        return torch.zeros_like(position).scatter_(0, shuffled(free, layer, device), position) < count_a
    if partition == "checkerboard":
        black = (position // columns + position % columns) % 2 == 0
        return black & (black.cumsum(0) <= count_a)
    return position < count_a


def partition_order(
    partition: Partition, tokens: int, protected: int, grid: tuple[int, ...] | None, layer: int, device: torch.device
) -> Tensor | None:
    """`[N]` int64: the tokens in an order in which every second one is on side A; `None` if they are so already.

    Args:
        partition: "alternating", every second token (the paper's); "sequential", the first half; "random", half of them,
            the same in every pass but another in each block; "checkerboard", those of one colour on the grid of patches,
            for the first block that sees the whole grid, and alternating later, where merging has shuffled them.
        tokens: N.
        protected: leading tokens that are on neither side.
        grid: patches along each axis.
        layer: number of the block.
        device: where the order is wanted, and computed: nothing is copied there.
    """
    if partition == "alternating" or (partition == "checkerboard" and math.prod(grid or (0,)) != tokens - protected):
        return None
    free = tokens - protected
    first_a, first_b = protected + protected % 2, protected + 1 - protected % 2  # even positions are on side A
    count_a = len(range(first_a, tokens, 2))
    on_a = _on_a(partition, free, count_a, (grid or (1,))[-1], layer, device)
    sides = ascending_order((~on_a).to(torch.int64).unsqueeze(0))[0] + protected
    order = torch.arange(tokens, device=device)
    order[first_a::2] = sides[:count_a]
    order[first_b::2] = sides[count_a:]
    return order
