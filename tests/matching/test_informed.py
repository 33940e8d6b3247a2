"""Options of informed matching, and thresholds, where the definition of the cost leaves a choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.plans import cosines, drawn, exact_metric
from tokenmerge import MergePlan, bipartite_matching
from tokenmerge.config import Partition
from tokenmerge.matching import get_matcher
from tokenmerge.matching.informed import _collecting, collecting_edges


def matcher_named(name: str) -> Any:
    return get_matcher(name)


def same(one: MergePlan, other: MergePlan) -> bool:
    return torch.equal(one.assign, other.assign)


@pytest.mark.parametrize("partition", ["alternating", "sequential", "random", "checkerboard"])
@pytest.mark.parametrize("protected", [0, 1, 2])
def test_uninformed_it_is_the_papers_matching(partition: Partition, protected: int) -> None:
    """On every partition, ties and all; also where an option asks for what is not there."""
    metric = exact_metric(30 + protected)
    more: dict[str, Any] = {"partition": partition, "grid": (5, 6), "layer": 3}
    wanted = bipartite_matching(metric, 9, protected, **more)
    attention, ones = torch.rand(2, 30 + protected), torch.ones(2, 30 + protected)
    for options in (
        {},
        {"size_penalty": "harmonic"},
        {"size_penalty": "harmonic", "size": ones},
        {"size_penalty": "source", "size": ones},
        {"token_weight": 0.5},
        {"tokens": torch.randn(2, 30 + protected, 4)},
        {"attention": attention, "attention_power": 0.0},
        {"attention": attention, "attention_from": 4},
    ):
        assert same(matcher_named("informed")(metric, 9, protected, **more, **options), wanted), options
    looked = matcher_named("informed")(metric, 9, protected, **more, attention=attention, attention_from=3)
    assert not same(looked, wanted)


def test_thresholds_by_their_definition() -> None:
    """As many merge as edges are better, on average over the images, and the best of each; none where none is."""
    metric, _ = drawn(0, batch=3, tokens=21)
    matcher = matcher_named("threshold")
    best = torch.stack([cosines(one)[2::2, 1::2].amax(dim=1) for one in metric])
    for threshold in (-1.0, 0.3, 0.7, 0.9, 0.95, 1.0):
        r = round(float((best > threshold).sum()) / 3)
        plan = matcher(metric, 4, 1, layer=1, thresholds=[0.5, threshold])
        assert plan.r == r
        assert same(plan, bipartite_matching(metric, r, 1))
    assert same(matcher(metric, 4, 1), bipartite_matching(metric, 4, 1))
    assert matcher(metric, 4, 0, thresholds=[-1.0]).r == 10, "of 11 tokens on side A, half of all at most"
    assert matcher(metric[:, :1], 1, 1, thresholds=[-1.0]).assign.tolist() == [[0]] * 3
    same_tokens = exact_metric(1).expand(2, 9, 32)
    assert matcher(same_tokens, 1, thresholds=[1.0]).r == 0, "what is as similar as the threshold is not more similar"


def test_edges_are_collected_within_and_no_longer() -> None:
    metric, _ = drawn(0, tokens=9)
    with collecting_edges() as outer:
        matcher_named("threshold")(metric, 2, 1, layer=4)
        with collecting_edges() as inner:
            matcher_named("threshold")(metric, 3, 1, layer=2)
        matcher_named("threshold")(metric, 1, 1, layer=4)
    assert _collecting.edges is None
    assert [[r for _, r in outer[4]], [r for _, r in inner[2]], [*outer], [*inner]] == [[2, 1], [3], [4], [2]]
    for image in range(2):
        wanted = cosines(metric[image])[2::2, 1::2].amax(dim=1)
        torch.testing.assert_close(outer[4][0][0][image].double(), wanted, atol=1e-6, rtol=0)
