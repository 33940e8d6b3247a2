"""Pruning, each method against its definition written out as loops over one image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.plans import cosines, drawn, groups
from tokenmerge.matching import get_matcher
from tokenmerge.matching.partitions import shuffled

SEEDS = pytest.mark.parametrize("seed", range(3))
COUNT, PROTECTED = 17, 2


def matcher_named(name: str) -> Any:
    return get_matcher(name)


def given(seed: int) -> tuple[Tensor, Tensor]:
    """A metric, and attention of which protected tokens have the least, so that it would show if they went."""
    metric, _ = drawn(seed, tokens=COUNT)
    attention = torch.rand(2, COUNT, generator=torch.Generator().manual_seed(seed + 50)) + 0.01
    attention[:, :PROTECTED] = 0.001
    return metric, attention / attention.sum(dim=1, keepdim=True)


def least(attention: Tensor, count: int) -> list[int]:
    """The tokens that are seen least, from the least on."""
    return sorted(range(PROTECTED, COUNT), key=lambda i: float(attention[i]))[:count]


@SEEDS
@pytest.mark.parametrize("r", [1, 6, 13])
def test_what_is_seen_least_is_dropped_or_fused(seed: int, r: int) -> None:
    metric, attention = given(seed)
    dropped = matcher_named("attention_prune")(metric, r, PROTECTED, attention=attention)
    fused = matcher_named("evit")(metric, r, PROTECTED, attention=attention)
    for image in range(2):
        assert dropped.source[image].tolist() == least(attention[image], r)
        assert bool((dropped.target == -1).all())
        going = least(attention[image], r + 1)
        rest = [i for i in range(COUNT) if i not in going]
        assert groups(fused, image) == {frozenset(going), *(frozenset([i]) for i in rest)}
        assert fused.kept[image].tolist() == [*rest, going[-1]], "the fused token is last"
    assert torch.equal(fused.weight, attention)


@SEEDS
@pytest.mark.parametrize(("pruned", "count"), [(0.0, 0), (0.3, 2), (0.5, 3), (1.0, 6), ([1.0, 0.7], 4)])
def test_diffrate_drops_a_part_and_merges_the_rest(seed: int, pruned: Any, count: int) -> None:
    """What is dropped is seen least; what merges joins the most similar token that stays."""
    metric, attention = given(seed)
    plan = matcher_named("diffrate")(metric, 6, PROTECTED, attention=attention, layer=1, pruned=pruned)
    assert plan.drops == (count > 0)
    for image in range(2):
        going, scores = least(attention[image], 6), cosines(metric[image])
        staying = [i for i in range(PROTECTED, COUNT) if i not in going]
        assign = plan.assign[image]
        assert plan.source[image].tolist() == going
        assert assign[going[:count]].tolist() == [-1] * count
        for token in going[count:]:
            nearest = max(staying, key=lambda j: float(scores[token, j]))
            assert assign[token] == assign[nearest]
        assert plan.kept[image].tolist() == sorted([*range(PROTECTED), *staying])


@SEEDS
@pytest.mark.parametrize("r", [1, 6, 12, 14])
def test_ats_by_its_definition(seed: int, r: int) -> None:
    """Tokens are drawn at evenly spread quantiles of significance; the most significant others fill up."""
    metric, attention = given(seed)
    values = torch.randn(2, 3, COUNT, 4, generator=torch.Generator().manual_seed(seed))
    plan = matcher_named("ats")(metric, r, PROTECTED, attention=attention, values=values)
    for image in range(2):
        length = values[image].double().norm(dim=2).mean(dim=0)
        significance = (attention[image].double() * length)[PROTECTED:]
        share = (significance / significance.sum()).tolist()
        count = COUNT - PROTECTED - r
        kept: set[int] = set()
        for draw in range(count):
            total, token = share[0], 0
            while total < (draw + 0.5) / count:
                token += 1
                total += share[token]
            kept.add(token)
        others = sorted((i for i in range(len(share)) if i not in kept), key=lambda i: -share[i])
        kept |= set(others[: count - len(kept)])
        assert plan.kept[image].tolist() == [*range(PROTECTED), *(i + PROTECTED for i in sorted(kept))]
        assert bool((plan.target == -1).all())


def test_ats_does_without_any_attention() -> None:
    """Nothing is significant, so the first tokens stay; none is drawn that is not there."""
    metric, _ = given(0)
    nothing = torch.zeros(2, COUNT)
    plan = matcher_named("ats")(metric, 5, PROTECTED, attention=nothing, values=torch.ones(2, 1, COUNT, 4))
    assert plan.r == 5
    assert bool((plan.source >= PROTECTED).all())


def test_random_pruning_is_the_same_everywhere_and_differs_by_block_and_seed() -> None:
    metric, _ = given(0)

    def going(**more: int) -> list[list[int]]:
        plan = matcher_named("random_prune")(metric, 5, PROTECTED, **more)
        assert bool((plan.target == -1).all())
        source: list[list[int]] = plan.source.tolist()
        return source

    first = going()
    assert first[0] == first[1], "for every image"
    assert first == going(layer=0, seed=0), "in every pass"
    assert first[0] == (shuffled(COUNT - PROTECTED, 0, metric.device)[:5] + PROTECTED).tolist()
    assert going(layer=3, seed=2)[0] == (shuffled(COUNT - PROTECTED, 2003, metric.device)[:5] + PROTECTED).tolist()
    every = {tuple(going(layer=layer, seed=seed)[0]) for layer in range(12) for seed in range(12)}
    assert len(every) == 144, "a block of one seed is no block of another"
