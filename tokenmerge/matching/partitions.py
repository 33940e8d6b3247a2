"""Which tokens are on which side of a bipartite matching (paper, table 1e)."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

Partition = Literal["alternating", "sequential", "random", "checkerboard"]
PARTITIONS = ("alternating", "sequential", "random", "checkerboard")


def shuffled(count: int, seed: int) -> list[int]:
    """`0 … count − 1` in an order that looks random and is the same each time; plain integers, so that it compiles."""

    def key(i: int) -> int:
        mixed = ((i + 1) * 0x9E3779B1 + (seed + 1) * 0x85EBCA6B) % 2**32
        mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D % 2**32
        mixed = (mixed ^ (mixed >> 12)) * 0x297A2D39 % 2**32
        return mixed ^ (mixed >> 15)

    return sorted(range(count), key=key)


def _order(partition: str, tokens: int, protected: int, grid: tuple[int, ...] | None, layer: int) -> tuple[int, ...]:
    free = range(protected, tokens)
    first_a = protected + protected % 2  # an even position of the reordered tokens is on side A
    count_a = len(range(first_a, tokens, 2))
    if partition == "random":
        order = [free[i] for i in shuffled(len(free), layer)]
        a, b = sorted(order[:count_a]), sorted(order[count_a:])
    elif partition == "checkerboard" and grid is not None:
        columns = grid[-1]
        black = [free[i] for i in range(len(free)) if (i // columns + i % columns) % 2 == 0]
        a = black[:count_a]
        b = sorted(set(free) - set(a))
    else:
        a, b = list(free[:count_a]), list(free[count_a:])
    order = list(range(protected)) + [0] * len(free)
    order[first_a::2] = a
    order[protected + 1 - protected % 2 :: 2] = b
    return tuple(order)


_order_once = functools.lru_cache(maxsize=256)(_order)


def partition_order(
    partition: str, tokens: int, protected: int, grid: tuple[int, ...] | None, layer: int, device: torch.device
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
        device: where the order is wanted.
    """
    if partition == "checkerboard":
        patches = 1
        for extent in grid or (0,):
            patches *= extent
        if patches != tokens - protected:
            return None
    if partition == "alternating":
        return None
    order = _order if torch.compiler.is_compiling() else _order_once  # Dynamo looks through caches
    return torch.tensor(order(partition, tokens, protected, grid, layer), device=device)
