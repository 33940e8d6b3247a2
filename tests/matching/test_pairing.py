"""Matchers that pair tokens, each against its definition written out as loops over one image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.oracle import naive_matching
from tests.helpers.plans import cosines, drawn, exact_metric, groups, joined
from tokenmerge import InputError, bipartite_matching
from tokenmerge.matching import get_matcher
from tokenmerge.matching.joining import drop, join, join_nearest, lowest, rest_of
from tokenmerge.ops.basics import places_of

SEEDS = pytest.mark.parametrize("seed", range(4))


def matcher_named(name: str) -> Any:
    return get_matcher(name)


# --- bipartite: three ways to find the best edges ----------------------------------------------------------------


@pytest.mark.parametrize("way", ["few", "whole", "tiled"])
@pytest.mark.parametrize("protected", [0, 1, 2])
def test_every_way_to_the_best_edges_takes_the_best(monkeypatch: pytest.MonkeyPatch, way: str, protected: int) -> None:
    """With all values at once, with columns for the best rows alone, and with tiles of which the last is smaller."""
    metric = exact_metric(61)
    limits = {"few": (2**20, 2**20), "whole": (0, 2**20), "tiled": (0, 130)}[way]
    monkeypatch.setattr("tokenmerge.matching.bipartite._FEW", limits[0])
    monkeypatch.setattr("tokenmerge.matching.bipartite._SCORES", limits[1])
    for r in (1, 9, 29):
        plan = bipartite_matching(metric, r, protected)
        assert plan.source[0].tolist() != sorted(plan.source[0].tolist()) or r == 1, "the best are not just the first"
        for image in range(2):
            assert plan.assign[image].tolist() == naive_matching(metric[image], r, protected)


def test_a_tile_holds_at_least_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even one row of scores fits, one row is taken at a time."""
    monkeypatch.setattr("tokenmerge.matching.bipartite._FEW", 0)
    monkeypatch.setattr("tokenmerge.matching.bipartite._SCORES", 7)
    metric = exact_metric(40)
    plan = bipartite_matching(metric, 11)
    assert plan.assign[0].tolist() == naive_matching(metric[0], 11, 0)


# --- greedy ------------------------------------------------------------------------------------------------------


def naive_greedy(metric: Tensor, size: Tensor, r: int, protected: int) -> set[frozenset[int]]:
    """The two most similar groups become one, r times; the mean of a group is that of its tokens, weighted by size."""
    groups = [frozenset([token]) for token in range(metric.shape[0])]
    x, weight = metric.double(), size.double()

    def mean(group: frozenset[int]) -> Tensor:
        members = sorted(group)
        total: Tensor = (x[members] * weight[members].unsqueeze(1)).sum(dim=0) / weight[members].sum()
        return total

    for _ in range(r):
        free = [group for group in groups if min(group) >= protected]
        pairs = [(one, other) for i, one in enumerate(free) for other in free[:i]]
        one, other = max(pairs, key=lambda pair: float(torch.cosine_similarity(mean(pair[0]), mean(pair[1]), dim=0)))
        groups = [group for group in groups if group not in (one, other)] + [one | other]
    return set(groups)


@SEEDS
@pytest.mark.parametrize("sized", [False, True])
def test_greedy_by_its_definition(seed: int, sized: bool) -> None:
    """Groups grow large enough for weights to matter: one that has eaten many moves little."""
    metric, size = drawn(seed)
    plan = matcher_named("greedy")(metric, 10, 2, size=size if sized else None)
    for image in range(2):
        wanted = naive_greedy(metric[image], size[image] if sized else torch.ones(15), 10, 2)
        assert groups(plan, image) == wanted
        assert plan.kept[image].tolist() == sorted(min(group) for group in wanted), "the first of a group stands for it"


def test_greedy_remembers_what_a_token_weighs() -> None:
    """Three tokens of about one direction outweigh the next one that joins them, so their mean does not reach the last."""
    angles = torch.tensor([0.0, 0.001, 0.003, 0.4, 0.9, 1.65])
    metric = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    # without weights, 0 … 0.4 would stand at 0.2; with them, at 0.1: 0.9 is then closer to 1.65
    assert groups(matcher_named("greedy")(metric, 4), 0) == {frozenset([0, 1, 2, 3]), frozenset([4, 5])}
    # sizes given weigh likewise: a heavy 0.4 brings 0.9 within reach
    size = torch.tensor([[1.0, 1.0, 1.0, 97.0, 1.0, 1.0]])
    assert groups(matcher_named("greedy")(metric, 4, size=size), 0) == {frozenset([0, 1, 2, 3, 4]), frozenset([5])}


def test_greedy_bears_tokens_without_weight() -> None:
    """Padding has size 0, and two of them have no mean."""
    metric, _ = drawn(0)
    plan = matcher_named("greedy")(metric, 9, size=torch.zeros(2, 15))
    assert plan.r == 9


# --- mutual ------------------------------------------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize("r", [1, 2, 4, 6])
def test_mutual_by_its_definition(seed: int, r: int) -> None:
    """Pairs of mutual neighbours first, then what is in no pair, then the first tokens of pairs; each joins the nearest."""
    metric, _ = drawn(seed)
    plan = matcher_named("mutual")(metric, r, 1)
    for image in range(2):
        scores = cosines(metric[image]).fill_diagonal_(-math.inf)
        scores[0], scores[:, 0] = -math.inf, -math.inf
        partner = scores.argmax(dim=1).tolist()
        best = scores.amax(dim=1).tolist()
        mutual = [i for i in range(1, 15) if partner[partner[i]] == i]
        rank = {i: 0 if i in mutual and i > partner[i] else 2 if i in mutual else 1 for i in range(1, 15)}
        going = sorted(rank, key=lambda i: (rank[i], -best[i]))[:r]
        staying = [i for i in range(1, 15) if i not in going]
        wanted = {i: max(staying, key=lambda j: float(scores[i, j])) for i in going}
        assert plan.source[image].tolist() == going
        assert groups(plan, image) == joined(wanted, 15)


# --- PiToMe ------------------------------------------------------------------------------------------------------


def naive_pitome(metric: Tensor, r: int, protected: int, margin: float, alpha: float) -> set[frozenset[int]]:
    """Energy of each token with the margin of its layer; the 2r highest are dealt out in turn to both sides."""
    scores, tokens = cosines(metric), len(metric)
    energy = {}
    for i in range(protected, tokens):
        terms = [float(scores[i, j]) for j in range(protected, tokens)]
        energy[i] = sum(s if s >= margin else alpha * (math.exp(s - margin) - 1) for s in terms) / len(terms)
    eligible = sorted(energy, key=lambda i: -energy[i])[: 2 * r]
    sides = eligible[::2], eligible[1::2]
    return joined({i: max(sides[1], key=lambda j: float(scores[i, j])) for i in sides[0]}, tokens)


@SEEDS
@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_pitome_by_its_definition_in_every_layer(seed: int, alpha: float) -> None:
    """The margin falls linearly with depth, from the option's value in the first block on."""
    metric, _ = drawn(seed, tokens=25)
    found = []
    for layer in (0, 3, 6, 11):
        plan = matcher_named("pitome")(metric, 6, 1, layer=layer, layers=12, margin=0.9, alpha=alpha)
        found.append([groups(plan, image) for image in range(2)])
        for image in range(2):
            assert found[-1][image] == naive_pitome(metric[image], 6, 1, 0.9 * (1 - layer / 12), alpha)
    assert any(one != found[0] for one in found[1:]), "a margin that is the same in all layers would show"


def test_pitome_asks_how_deep_the_model_is() -> None:
    """Layer 3 of 4 is where layer 9 of 12 is."""
    metric, _ = drawn(1, tokens=25)
    deep, shallow, first = (
        matcher_named("pitome")(metric, 6, layer=layer, layers=layers).assign
        for layer, layers in ((9, 12), (3, 4), (3, 12))
    )
    assert torch.equal(deep, shallow)
    assert not torch.equal(deep, first)


# --- strided -----------------------------------------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize(
    ("grid", "stride", "r", "used"),
    [
        ((4, 5), 2, 6, 2),
        ((4, 5), 2, 14, 2),
        ((4, 5), 2, 15, 4),
        ((4, 5), 2, 18, 4),
        ((4, 5), 2, 19, 8),
        ((5, 3), 3, 9, 3),
    ],
)
def test_strided_by_its_definition(seed: int, grid: tuple[int, int], stride: int, r: int, used: int) -> None:
    """Destinations stay; the stride doubles when the other tokens would not do for r."""
    tokens = grid[0] * grid[1] + 1
    metric, _ = drawn(seed, tokens=tokens)
    anchor = torch.arange(tokens).expand(2, -1)
    plan = matcher_named("strided")(metric, r, 1, anchor=anchor, grid=grid, stride=stride)
    fixed = [1 + i for i in range(tokens - 1) if i // grid[1] % used == 0 and i % grid[1] % used == 0]
    for image in range(2):
        scores = cosines(metric[image])
        nearest = {
            i: max((j for j in fixed), key=lambda j: float(scores[i, j])) for i in range(1, tokens) if i not in fixed
        }
        going = sorted(nearest, key=lambda i: -float(scores[i, nearest[i]]))[:r]
        assert plan.source[image].tolist() == going
        assert groups(plan, image) == joined({i: nearest[i] for i in going}, tokens)


def test_strided_destinations_of_a_video_are_in_every_frame_until_they_are_too_many() -> None:
    """Three frames of 2 × 2: one destination in each; for more merges than that leaves, one in the first frame alone."""
    metric, _ = drawn(0, tokens=12)
    anchor = torch.arange(12).expand(2, -1)
    plan = matcher_named("strided")(metric, 9, anchor=anchor, grid=(3, 2, 2))
    assert plan.kept.tolist() == [[0, 4, 8]] * 2
    plan = matcher_named("strided")(metric, 10, anchor=anchor, grid=(3, 2, 2))
    assert 0 in plan.kept[0].tolist()
    assert {0} < {min(group) for group in groups(plan, 0)}
    assert sum(len(group) > 1 for group in groups(plan, 0)) == 1, "all join one destination"


def test_strided_goes_by_where_tokens_stand() -> None:
    """After a merge, destinations are the tokens that stand at their positions."""
    metric, _ = drawn(0, batch=1, tokens=5)
    anchor = torch.tensor([[0, 3, 2, 4, 1]])  # of 1 + 2 × 2: the patch at (0, 0) is last
    plan = matcher_named("strided")(metric, 3, 1, anchor=anchor, grid=(2, 2))
    assert plan.kept.tolist() == [[0, 4]]


def test_strided_refuses_a_grid_that_does_not_hold_the_tokens() -> None:
    metric, _ = drawn(0, tokens=13)
    anchor = torch.arange(13).expand(2, -1)
    for grid in ((12,), (3, 3), (11, 1)):
        with pytest.raises(InputError, match="grid"):
            matcher_named("strided")(metric, 3, 1, anchor=anchor, grid=grid)
    assert matcher_named("strided")(metric, 3, 1, anchor=anchor, grid=(12, 1)).r == 3


# --- from "these tokens go" to a plan ----------------------------------------------------------------------------


def test_the_lowest_are_in_order_and_ties_go_to_the_lower_position() -> None:
    score = torch.tensor([[-9.0, 2.0, 1.0, 1.0, 0.0, 2.0]])
    assert lowest(score, 4, 1).tolist() == [[4, 2, 3, 1]]
    assert lowest(torch.zeros(1, 40), 20, 3).tolist() == [list(range(3, 23))]


def test_plans_of_going_tokens() -> None:
    source = torch.tensor([[4, 1], [0, 5]])
    assert rest_of(source, 6).tolist() == [[0, 2, 3, 5], [1, 2, 3, 4]]
    assert rest_of(torch.tensor([[70, 3]]), 90).tolist() == [[i for i in range(90) if i not in (3, 70)]]
    assert places_of(torch.tensor([[0, 2, 3]]), torch.tensor([[3, 0, 2]]), 4).tolist() == [[1, 2, 0]]
    assert join(source, torch.tensor([[5, 0], [1, 2]]), 6).assign.tolist() == [[0, 0, 1, 2, 3, 3], [0, 0, 1, 2, 3, 1]]
    dropped = drop(source, 6)
    assert dropped.assign.tolist() == [[0, -1, 1, 2, -1, 3], [-1, 0, 1, 2, 3, -1]]
    assert dropped.drops


def test_the_nearest_that_stays_and_is_not_protected() -> None:
    similarity = torch.full((1, 5, 5), -3.0)
    similarity[0, 1] = torch.tensor([5.0, 5.0, 4.0, -2.0, 1.0])  # 0 is protected, 1 is itself, 2 goes as well
    similarity[0, 2] = torch.tensor([0.0, 9.0, 0.0, 0.5, 0.25])
    plan = join_nearest(similarity, torch.tensor([[1, 2]]), 1)
    assert plan.assign.tolist() == [[0, 2, 1, 1, 2]]


@pytest.mark.parametrize("build", [lambda s: rest_of(s, 6), lambda s: drop(s, 6).kept, lambda s: drop(s, 6).source])
def test_positions_are_int64(build: Callable[[Tensor], Tensor]) -> None:
    assert build(torch.tensor([[4, 1]])).dtype == torch.int64
