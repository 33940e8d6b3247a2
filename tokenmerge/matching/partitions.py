"""Partitions of the tokens into the sets A and B of bipartite matching (paper, table 1e)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenmerge.config import Partition
from tokenmerge.ops.basics import ascending_order, is_exporting


def first_of_sets(protected: int) -> tuple[int, int]:
    """Return the first tokens of sets A and B of the alternating partition: the unprotected tokens at even and at odd positions."""
    return protected + protected % 2, protected + 1 - protected % 2


def _shuffled(count: int, seed: int) -> list[int]:
    """Return what `shuffled` returns, computed in Python."""
    mixed = [((number + 1) * 0x9E3779B1 + (seed + 1) * 0x85EBCA6B) % 2**32 for number in range(count)]
    mixed = [(x ^ (x >> 15)) * 0x2C1B3C6D % 2**32 for x in mixed]
    mixed = [(x ^ (x >> 12)) * 0x297A2D39 % 2**32 for x in mixed]
    return sorted(range(count), key=lambda number: (mixed[number] ^ (mixed[number] >> 15), number))


def shuffled(count: int, seed: int, device: torch.device) -> Tensor:
    """Return a pseudorandom permutation of `0 … count − 1` that is the same on every device, `[count]` int64.

    It is computed on the device by hashing, because a list from Python would have to be copied there in every pass.
    """
    if is_exporting():  # a constant of the program: not every runtime knows operations on bits
        return torch.tensor(_shuffled(count, seed), device=device)
    mixed = ((torch.arange(count, device=device) + 1) * 0x9E3779B1 + (seed + 1) * 0x85EBCA6B) % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D % 2**32
    mixed = (mixed ^ (mixed >> 12)) * 0x297A2D39 % 2**32
    return ascending_order((mixed ^ (mixed >> 15)).unsqueeze(0))[0]


def _on_a(partition: Partition, free: int, count_a: int, columns: int, layer: int, device: torch.device) -> Tensor:
    """Return which of the `free` unprotected tokens belong to set A, `[free]` bool; at most `count_a` of them do."""
    position = torch.arange(free, device=device)
    if partition == "random":
        return torch.zeros_like(position).scatter_(0, shuffled(free, layer, device), position) < count_a
    if partition == "checkerboard":
        black = (position // columns + position % columns) % 2 == 0
        return torch.logical_and(black, black.to(torch.int64).cumsum(0) <= count_a)
    return position < count_a


def partition_order(
    partition: Partition, tokens: int, protected: int, grid: tuple[int, ...] | None, layer: int, device: torch.device
) -> Tensor | None:
    """Return the tokens in an order in which the alternating partition gives the wanted one (paper, table 1e).

    Args:
        partition: how set A is chosen among the unprotected tokens: "alternating", every second token (the paper's
            choice); "sequential", the first half; "random", a pseudorandom half that differs between blocks but not
            between passes; "checkerboard", one colour of a checkerboard on the grid of patches. Once tokens have
            merged and no longer fill the grid, "checkerboard" is "alternating".
        tokens: N.
        protected: leading tokens that belong to neither set.
        grid: patches along each axis, or `None` if unknown.
        layer: index of the block, which seeds "random".
        device: device of the result.

    Returns:
        Positions `[N]` int64, or `None` if the order of the tokens already gives that partition.
    """
    if partition == "alternating" or (partition == "checkerboard" and math.prod(grid or (0,)) != tokens - protected):
        return None
    free = tokens - protected
    first_a, first_b = first_of_sets(protected)
    count_a = len(range(first_a, tokens, 2))
    on_a = _on_a(partition, free, count_a, (grid or (1,))[-1], layer, device)
    sides = ascending_order((~on_a).to(torch.int64).unsqueeze(0))[0] + protected
    order = torch.arange(tokens, device=device)
    order[first_a::2] = sides[:count_a]
    order[first_b::2] = sides[count_a:]
    return order
