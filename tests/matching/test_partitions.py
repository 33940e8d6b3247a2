"""Which tokens are on which side of a bipartite matching, and in which order."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.plans import exact_metric
from tokenmerge import bipartite_matching
from tokenmerge.config import Partition
from tokenmerge.matching.partitions import partition_order, shuffled

CPU = torch.device("cpu")


def sides(
    partition: Partition, tokens: int, protected: int, grid: tuple[int, ...] | None = None, layer: int = 0
) -> tuple[list[int], list[int]]:
    """Unprotected tokens of side A and of side B, from 0 on."""
    order = partition_order(partition, tokens, protected, grid, layer, CPU)
    assert order is not None
    assert order.dtype == torch.int64
    assert order[:protected].tolist() == list(range(protected))
    a, b = order[protected + protected % 2 :: 2], order[protected + 1 - protected % 2 :: 2]
    return [i - protected for i in a.tolist()], [i - protected for i in b.tolist()]


@pytest.mark.parametrize("protected", [0, 1, 2, 3])
@pytest.mark.parametrize("free", [1, 2, 11, 12])
def test_sides_are_as_large_as_alternating_ones(protected: int, free: int) -> None:
    """Even positions are side A, whatever is there; so of an odd number it has more, or less, as the prefix is even or odd."""
    count_a = len([i for i in range(protected, protected + free) if i % 2 == 0])
    a, b = sides("sequential", free + protected, protected)
    assert a == list(range(count_a))
    assert b == list(range(count_a, free))
    a, b = sides("random", free + protected, protected, layer=4)
    assert a == sorted(shuffled(free, 4, CPU)[:count_a].tolist())
    assert b == sorted(shuffled(free, 4, CPU)[count_a:].tolist())


@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (4, 3), (3, 3), (5, 5), (2, 3, 5)])
def test_a_checkerboard_by_its_definition(protected: int, grid: tuple[int, ...]) -> None:
    """Side A has one colour, as far as it has room: of an odd grid the last of that colour are on side B."""
    rows, columns = torch.Size(grid[:-1]).numel(), grid[-1]
    free = rows * columns
    count_a = len(range(protected + protected % 2, free + protected, 2))
    black = [i for i in range(free) if (i // columns + i % columns) % 2 == 0]
    a, b = sides("checkerboard", free + protected, protected, grid)
    assert a[: len(black)] == black[:count_a]
    assert sorted(a + b) == list(range(free))


def test_no_order_where_none_is_needed() -> None:
    for grid in (None, (3, 4), (12,), (13,)):
        assert partition_order("alternating", 13, 1, grid, 0, CPU) is None
    for unfit in (None, (3, 5), (13, 1), (11,)):
        assert partition_order("checkerboard", 13, 1, unfit, 0, CPU) is None
    assert partition_order("checkerboard", 13, 1, (12,), 0, CPU) is not None


def test_what_looks_random_is_the_same_everywhere() -> None:
    """These very numbers: a model that was tuned with a random partition must find it again."""
    assert shuffled(12, 0, CPU).tolist() == [3, 11, 5, 0, 2, 4, 9, 8, 7, 10, 6, 1]
    assert shuffled(12, 2003, CPU).tolist() == [0, 10, 3, 2, 7, 11, 6, 4, 5, 1, 9, 8]
    assert shuffled(1000, 7, CPU)[:8].tolist() == [568, 999, 907, 357, 215, 232, 60, 742]
    for count in (0, 1, 2, 1000):
        assert shuffled(count, 3, CPU).sort().values.tolist() == list(range(count))


@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize("partition", ["sequential", "random", "checkerboard"])
def test_bipartite_merges_from_side_a_into_the_best_of_side_b(partition: Partition, protected: int) -> None:
    """The best edges of all, each to the best partner on the other side; what is left is in the order of the sides."""
    metric = exact_metric(30 + protected, batch=1)
    plan = bipartite_matching(metric, 7, protected, partition=partition, grid=(5, 6), layer=3)
    a, b = ([i + protected for i in side] for side in sides(partition, 30 + protected, protected, (5, 6), 3))
    scores = metric[0].double() @ metric[0].double().T  # all vectors are of one length
    best = {i: max(b, key=lambda j: (float(scores[i, j]), -b.index(j))) for i in a}
    going = sorted(a, key=lambda i: (-float(scores[i, best[i]]), a.index(i)))[:7]
    assert plan.source[0].tolist() == going
    assert plan.kept[0].tolist() == [*range(protected), *(i for i in a if i not in going), *b]
    assert plan.kept[0][plan.target[0]].tolist() == [best[i] for i in going]
