"""Matchers of one's own: what may be registered, what their options may be, and what they can do to a pass."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
import torch
from torch import Tensor

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tokenmerge import ConfigError, MergePlan, PatchError
from tokenmerge.matching import registry
from tokenmerge.matching.values import AtLeast


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(registry._MATCHERS)
    yield
    registry._MATCHERS.clear()
    registry._MATCHERS.update(before)


def _powered(metric: Tensor, r: int, protected: int = 0, power: float = 1.0) -> MergePlan:
    """Merges as the paper does."""
    assert isinstance(power, float)
    return tokenmerge.bipartite_matching(metric, r, protected)


class PoweredModule(torch.nn.Module):
    """A module that matches."""

    def forward(self, metric: Tensor, r: int, protected: int = 0, power: float = 1.0) -> MergePlan:
        return _powered(metric, r, protected, power)


def _handed_on(*args: Any, **kwargs: Any) -> MergePlan:
    """A wrapper that shows no parameters."""
    return _powered(*args, **kwargs)


class Powered:
    """An object that matches."""

    def __call__(self, metric: Tensor, r: int, protected: int = 0, power: float = 1.0) -> MergePlan:
        return _powered(metric, r, protected, power)

    def method(self, metric: Tensor, r: int, protected: int = 0, power: float = 1.0) -> MergePlan:
        """A method that matches."""
        return _powered(metric, r, protected, power)


@pytest.mark.parametrize(
    ("matcher", "about"),
    [
        (_powered, "Merges as the paper does."),
        (functools.partial(_powered, power=2.0), "Merges as the paper does."),
        (Powered(), "An object that matches."),
        (Powered().method, "A method that matches."),
        (PoweredModule(), "A module that matches."),
    ],
    ids=["function", "partial", "object", "method", "module"],
)
def test_whatever_can_be_called_may_match_and_its_options_are_checked(matcher: Any, about: str) -> None:
    tokenmerge.register_matcher("powered")(matcher)
    assert tokenmerge.matching.get_entry("powered").about == about
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    with pytest.raises(ConfigError, match="option power='much' of matcher 'powered', but it must be a finite number"):
        tokenmerge.patch(model, r=4, matcher="powered", options={"power": "much"})
    with torch.no_grad():
        with tokenmerge.patched(model, r=4):
            wanted = model(images)
        with tokenmerge.patched(model, r=4, matcher="powered", options={"power": 0.5}):
            assert torch.equal(model(images), wanted)


@pytest.mark.parametrize("matcher", [_handed_on, lambda metric, r, *rest: _powered(metric, r, *rest)])
def test_wrappers_that_hand_on_what_they_get_may_match(matcher: Any) -> None:
    tokenmerge.register_matcher("handed on")(matcher)
    model = tiny("vit_tiny_patch16_224")
    images, metric = images_for(model), torch.randn(2, 9, 4)
    with torch.no_grad():
        with tokenmerge.patched(model, r=4):
            wanted = model(images)
        with tokenmerge.patched(model, r=4, matcher="handed on"):
            assert torch.equal(model(images), wanted)
    plan = registry.get_matcher("handed on")(metric, 3, 1)
    assert torch.equal(plan.assign, tokenmerge.bipartite_matching(metric, 3, 1).assign)


def test_what_looks_like_tokenmerges_own_is_looked_at_too() -> None:
    """A decorator copies the name of the module onto a user's function."""

    @functools.wraps(tokenmerge.bipartite_matching)
    def moving(*args: Any, **kwargs: Any) -> MergePlan:
        plan = tokenmerge.bipartite_matching(*args, **kwargs)
        return dataclasses.replace(plan, kept=plan.kept.flip(1))

    tokenmerge.register_matcher("moving")(moving)
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    tokenmerge.patch(model, r=4, matcher="moving")
    with torch.no_grad(), pytest.raises(PatchError, match="moves or merges one of the first 1 tokens"):
        model(images)


def test_another_partial_of_one_function_is_another_matcher() -> None:
    tokenmerge.register_matcher("halved")(functools.partial(_powered, power=0.5))
    tokenmerge.register_matcher("halved")(functools.partial(_powered, power=0.5))
    with pytest.raises(ConfigError, match="is registered already"):
        tokenmerge.register_matcher("halved")(functools.partial(_powered, power=2.0))


@pytest.mark.parametrize(
    "matcher",
    [
        None,
        3,
        "kmeans",
        dict,
        lambda metric: None,
        lambda metric, r: None,
        lambda *, metric, r, protected: None,
    ],
)
def test_what_cannot_match_cannot_be_registered(matcher: Any) -> None:
    with pytest.raises(ConfigError, match="first three parameters are metric, r and protected"):
        tokenmerge.register_matcher("none")(matcher)
    assert "none" not in registry.matcher_names()


@pytest.mark.parametrize("flags", [{"adaptive": "yes"}, {"learned": 1}, {"most": "some"}, {"adaptive": None}])
def test_what_is_said_of_a_matcher_means_something(flags: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="true or false"):
        tokenmerge.register_matcher("flagged", **flags)


def _annotated(
    metric: Tensor,
    r: int,
    protected: int = 0,
    words: Annotated[int, "how many"] = 1,
    least: Annotated[int | None, AtLeast(2)] = None,
    flag: Literal["auto", True] = True,
    each: Annotated[list[float], AtLeast(0)] | None = None,
    odd: Annotated[int, [1]] = 1,
    none: [1, 2] = 3,  # type: ignore[valid-type]
) -> MergePlan:
    return tokenmerge.bipartite_matching(metric, r, protected)


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"words": 2}, True),
        ({"words": "two"}, False),
        ({"least": None}, True),
        ({"least": 2}, True),
        ({"least": 1}, False),
        ({"least": "2"}, False),
        ({"flag": True}, True),
        ({"flag": "auto"}, True),
        ({"flag": 1}, False),
        ({"flag": False}, False),
        ({"each": [0.0, 1]}, True),
        ({"each": [0.0, -1.0]}, False),
        ({"odd": 2}, True),
        ({"none": "anything"}, True),
        ({"words": 10**5000}, False),
        ({5: 1}, False),
    ],
)
def test_annotations_mean_what_they_say(options: dict[Any, Any], fits: bool) -> None:
    tokenmerge.register_matcher("annotated")(_annotated)
    if fits:
        tokenmerge.matching.check_options("annotated", options)
    else:
        with pytest.raises(ConfigError):
            tokenmerge.matching.check_options("annotated", options)


@pytest.mark.parametrize("metric", ["k", "x", "x_pre", "kv"])
def test_a_matcher_that_works_in_place_changes_nothing_of_the_pass(metric: str) -> None:
    def spoiling(
        metric: Tensor,
        r: int,
        protected: int = 0,
        size: Tensor | None = None,
        tokens: Tensor | None = None,
        values: Tensor | None = None,
        anchor: Tensor | None = None,
    ) -> MergePlan:
        plan = tokenmerge.bipartite_matching(metric, r, protected)
        for tensor in (metric, size, tokens, values, anchor):
            assert tensor is not None
            tensor.zero_()
        return plan

    tokenmerge.register_matcher("spoiling")(spoiling)
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            with tokenmerge.patched(model, r=4, metric=metric):
                wanted = model(images)
            with tokenmerge.patched(model, r=4, metric=metric, matcher="spoiling"):
                assert torch.equal(model(images), wanted)


@pytest.mark.parametrize("field", ["weight", "gate"])
@pytest.mark.parametrize("fault", ["negative", "shape", "whole numbers", "text"])
def test_a_plan_with_a_wrong_weight_or_gate_is_refused(field: str, fault: str) -> None:
    def weighing(metric: Tensor, r: int, protected: int = 0) -> MergePlan:
        plan = tokenmerge.bipartite_matching(metric, r, protected)
        count = plan.tokens_in if field == "weight" else plan.tokens_out
        right = torch.ones(len(metric), count)
        below = right.clone()
        below[-1, -1] = -1e-3  # one of them, among others that may be
        wrong: Any = {"negative": below, "shape": right[:, 1:], "whole numbers": right.long(), "text": "much"}[fault]
        return dataclasses.replace(plan, **{field: wrong})

    tokenmerge.register_matcher("weighing")(weighing)
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    tokenmerge.patch(model, r=4, matcher="weighing")
    with torch.no_grad(), pytest.raises(PatchError, match=f"matcher 'weighing' gave a plan whose {field}"):
        model(images)
