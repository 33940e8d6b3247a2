"""The matcher that prefers pairs within one moment, or across moments, by its definition in loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenmerge
from tests.families.test_video_mae import build, clips
from tests.matching.test_matchers import matcher_named
from tokenmerge.errors import InputError
from tokenmerge.matching import bipartite_matching


def in_loops(metric: Any, r: int, protected: int, moments: list[int], pairs: str) -> dict[int, int]:
    """Which token of one image `[N, D]` joins which: all edges of the wanted kind before all others."""
    x = metric.double() / metric.double().norm(dim=1, keepdim=True)
    a = [i for i in range(0, len(x), 2) if i >= protected]
    b = [i for i in range(1, len(x), 2) if i >= protected]
    edges = []
    for i in a:
        wanted = {j: (moments[i] == moments[j]) == (pairs == "within") for j in b}
        best = max(b, key=lambda j: (wanted[j], float(x[i] @ x[j]), -j))
        edges.append((not wanted[best], -float(x[i] @ x[best]), i, best))
    return {i: j for _, _, i, j in sorted(edges)[:r]}


@pytest.mark.parametrize("pairs", ["within", "across"])
@pytest.mark.parametrize(
    ("grid", "r", "protected"), [((4, 3, 2), 5, 1), ((4, 3, 2), 12, 1), ((3, 5), 4, 2), ((6, 2), 6, 0)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_by_its_definition(pairs: str, grid: tuple[int, ...], r: int, protected: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    per_moment = int(torch.tensor(grid[1:]).prod())
    tokens = grid[0] * per_moment + protected
    metric = torch.randn(2, tokens, 8, generator=generator)
    # tokens that merged before: fewer of them, and out of order
    left = tokens - 3
    anchor = torch.stack(
        [torch.arange(protected, tokens)[torch.randperm(tokens - protected, generator=generator)] for _ in range(2)]
    )
    anchor = torch.cat([torch.arange(protected).expand(2, -1), anchor], dim=1)[:, :left]
    r = min(r, (left - protected) // 2)
    plan = matcher_named("temporal")(metric[:, :left], r, protected, anchor=anchor, grid=grid, pairs=pairs)
    for image in range(2):
        moments = [(int(one) - protected) // per_moment for one in anchor[image]]
        expected = in_loops(metric[image, :left], r, protected, moments, pairs)
        into = plan.kept[image][plan.target[image]].tolist()
        assert dict(zip(plan.source[image].tolist(), into, strict=True)) == expected


def test_one_moment_is_bipartite_matching() -> None:
    metric = torch.randn(2, 25, 8)
    given: dict[str, Any] = {"anchor": torch.arange(25).expand(2, -1), "grid": (1, 4, 6)}
    for pairs in ("within", "across"):  # no pair of another moment is left, so that all others merge
        plan = matcher_named("temporal")(metric, 7, 1, pairs=pairs, **given)
        expected = bipartite_matching(metric, 7, 1)
        for name in ("kept", "source", "target"):
            assert torch.equal(getattr(plan, name), getattr(expected, name)), (pairs, name)


def test_a_grid_that_does_not_hold_the_tokens() -> None:
    with pytest.raises(InputError, match="a grid of"):
        matcher_named("temporal")(torch.randn(1, 9, 4), 2, anchor=torch.arange(9)[None], grid=(2, 2, 2))


@pytest.mark.parametrize("pairs", ["within", "across"])
@torch.no_grad()
def test_in_a_model(pairs: str) -> None:
    """As long as there are such pairs, nothing else merges, and what a trace counts says so."""
    model = build()
    x = clips(model)
    handle = tokenmerge.patch(model, r=[4, 4, 3], matcher="temporal", options={"pairs": pairs}, trace=True)
    model(x)
    found = handle.trace.over_time()
    assert [one.merged for one in found] == [4, 4, 3]
    if pairs == "within":
        assert [one.within for one in found] == [1, 1, 1]
        assert [one.spanned for one in found] == [1, 1, 1]
    else:
        assert [one.across for one in found] == [1, 1, 1]
        assert found[0].spanned == pytest.approx(64 / 60) or found[0].spanned > 1
        assert found[2].spanned > found[1].spanned > found[0].spanned
