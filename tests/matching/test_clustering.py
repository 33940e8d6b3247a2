"""Clustering, each method against its definition written out as loops over one image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.plans import cosines, drawn, groups
from tokenmerge.matching import get_matcher

SEEDS = pytest.mark.parametrize("seed", range(3))
AWAY = pytest.mark.parametrize("r", [1, 5, 11, 17, 18])


def matcher_named(name: str) -> Any:
    return get_matcher(name)


def _filled(nearest: list[int], closeness: list[float], clusters: int) -> set[frozenset[int]]:
    """The clusters; empty ones get the tokens that fit worst, of those that do not stand for theirs."""
    members = [[i for i, own in enumerate(nearest) if own == c] for c in range(clusters)]
    stand = [max(group, key=lambda i: closeness[i]) for group in members if group]
    others = sorted((i for i in range(len(nearest)) if i not in stand), key=lambda i: closeness[i])
    alone = others[: clusters - len(stand)]
    found = [frozenset(group) - frozenset(alone) for group in members if group]
    return {*found, *(frozenset([i]) for i in alone)}


def _assigned(scores: Tensor, medoids: list[int]) -> list[int]:
    """The number of the medoid that each token is nearest to; a medoid is its own."""
    near = scores[:, medoids].argmax(dim=1).tolist()
    return [medoids.index(i) if i in medoids else near[i] for i in range(len(scores))]


def _shifted(found: set[frozenset[int]], protected: int) -> set[frozenset[int]]:
    """Groups of unprotected tokens, as groups of all."""
    moved = {frozenset(i + protected for i in group) for group in found}
    return moved | {frozenset([i]) for i in range(protected)}


@SEEDS
@AWAY
@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_kmeans_by_its_definition(seed: int, r: int, iterations: int) -> None:
    """Centres start at evenly spread tokens, and become the direction of the sum of their tokens."""
    protected, count = 2, 19
    metric, _ = drawn(seed, tokens=count + protected)
    plan = matcher_named("kmeans")(metric, r, protected, iterations=iterations)
    for image in range(2):
        x = torch.nn.functional.normalize(metric[image, protected:].double(), dim=1)
        clusters = count - r
        centre = x[[i * count // clusters for i in range(clusters)]].clone()
        for _ in range(iterations):
            nearest = (x @ centre.T).argmax(dim=1)
            for c in range(clusters):
                if bool((nearest == c).any()):
                    centre[c] = torch.nn.functional.normalize(x[nearest == c].sum(dim=0), dim=0)
        closeness, nearest = (x @ centre.T).max(dim=1)
        assert groups(plan, image) == _shifted(_filled(nearest.tolist(), closeness.tolist(), clusters), protected)


@SEEDS
@AWAY
@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_kmedoids_by_its_definition(seed: int, r: int, iterations: int) -> None:
    """Medoids start at the most attended tokens, and become the token most similar to the attended ones around them."""
    protected, count = 1, 19
    metric, size = drawn(seed, tokens=count + protected)
    attention = (size + torch.rand(size.shape)).softmax(dim=1).sqrt()
    plan = matcher_named("kmedoids")(metric, r, protected, attention=attention, iterations=iterations)
    for image in range(2):
        scores, weight = cosines(metric[image, protected:]), attention[image, protected:].double()
        medoids = sorted(range(count), key=lambda i: -float(weight[i]))[: count - r]
        nearest = _assigned(scores, medoids)
        for _ in range(iterations):
            clusters = [[i for i in range(count) if nearest[i] == c] for c in range(len(medoids))]
            medoids = [max(group, key=lambda i: float((scores[i, group] * weight[group]).sum())) for group in clusters]
            nearest = _assigned(scores, medoids)
        wanted = {frozenset(i for i in range(count) if nearest[i] == c) for c in range(len(medoids))}
        assert groups(plan, image) == _shifted(wanted, protected)
        assert plan.kept[image].tolist() == [0, *sorted(i + protected for i in medoids)], "medoids stand for clusters"


@SEEDS
@pytest.mark.parametrize("linkage", ["single", "complete", "average", "weighted"])
def test_agglomerative_by_its_definition(seed: int, linkage: str) -> None:
    """The two closest clusters become one, until N − r are left; how close is the linkage's."""
    pytest.importorskip("scipy")
    protected, r = 2, 8
    metric, _ = drawn(seed, tokens=14)
    plan = matcher_named("agglomerative")(metric, r, protected, linkage=linkage)
    for image in range(2):
        distance = (1 - cosines(metric[image])).tolist()
        found = [frozenset([i]) for i in range(protected, 14)]
        between = {frozenset([a, b]): distance[min(a)][min(b)] for a in found for b in found if a != b}
        for _ in range(r):
            pair = min(between, key=lambda pair: between[pair])
            a, b = pair
            found = [group for group in found if group not in pair]
            for other in found:
                to_a, to_b = between[frozenset([a, other])], between[frozenset([b, other])]
                between[frozenset([a | b, other])] = {
                    "single": min(to_a, to_b),
                    "complete": max(to_a, to_b),
                    "average": (len(a) * to_a + len(b) * to_b) / (len(a) + len(b)),
                    "weighted": (to_a + to_b) / 2,
                }[linkage]
            between = {key: value for key, value in between.items() if not key & pair}
            found.append(a | b)
        assert groups(plan, image) == {*found, *(frozenset([i]) for i in range(protected))}


def test_the_token_that_fits_best_stands_for_its_cluster() -> None:
    """It stays where it is, and the others of its cluster join it."""
    angles = torch.tensor([0.0, 0.1, 0.5, 3.0, 3.2, 3.3])
    metric = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    plan = matcher_named("kmeans")(metric, 4)
    assert plan.kept.tolist() == [[1, 4]]
    assert plan.assign.tolist() == [[0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize("name", ["kmeans", "kmedoids"])
def test_equal_tokens_fill_all_clusters(name: str) -> None:
    """Where one cluster holds everything, the others get one token each."""
    plan = matcher_named(name)(
        torch.ones(1, 9, 3), 5, 1, **({"attention": torch.ones(1, 9)} if name == "kmedoids" else {})
    )
    assert sorted(len(group) for group in groups(plan, 0)) == [1, 1, 1, 6]
    assert frozenset([0]) in groups(plan, 0)
