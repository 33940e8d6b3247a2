"""What a summary says a model costs is what PyTorch counts of the pass, for every family; and the matching beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenmerge
from tests.families.test_timm_models import KINDS, POOLS
from tests.families.test_timm_rest import NAMES
from tests.families.test_transformers_heads import WHOLES
from tests.families.test_vision_libraries import MODELS, build
from tests.helpers.tiny import images_for, tiny
from tests.helpers.towers import BY_NAME
from tokenmerge.matching import matcher_names
from tokenmerge.matching.registry import get_entry

R = [5, 0, 7]
NAFLEX = "naflexvit_base_patch16_gap"
_CLASSIFIERS = (
    "vit",
    "deit",
    "dinov2",
    "ijepa",
    "beit",
    "siglip",
    "clip-mean",
    "videomae-mean",
    "vivit",
    "vjepa2",
    "ast",
)
"""Wholes around a tower that are counted; what text towers, decoders and language models cost depends on the text."""


@pytest.fixture(autouse=True)
def _slow_path() -> Iterator[None]:
    """Let `nn.MultiheadAttention` call what PyTorch can count, also where nothing merges."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def counted(model: Any, feed: dict[str, Any]) -> int:
    """Multiply-adds of a pass, as PyTorch counts them: its attention in parts, because not every fused kernel is counted."""
    model.requires_grad_(False)  # the counter trips over parameters under no_grad
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**feed)
    return int(counter.get_total_flops()) // 2


def check(model: Any, feed: dict[str, Any], input_size: tuple[int, ...] | None = None) -> None:
    """Compare the figures of a summary with what is counted, unmerged and merged."""
    feed = {name: value[:1] for name, value in feed.items()}
    handle = tokenmerge.patch(model, r=0, backend="torch")
    dense = handle.summary(input_size)
    assert dense.flops_before == pytest.approx(counted(model, feed), rel=1e-2)
    handle.update(r=R)
    found = handle.summary(input_size)
    assert found.tokens[0] > found.tokens[1] > found.tokens[3]
    assert found.flops_before == dense.flops_before
    assert found.matching_flops is not None
    merged = counted(model, feed)
    assert found.flops_after == pytest.approx(merged - found.matching_flops, rel=1e-2)
    assert 0 < found.matching_flops < 0.05 * merged


@pytest.mark.parametrize("name", [name for name in [*KINDS, *NAMES] if name != NAFLEX])
def test_timm(name: str) -> None:
    model = tiny(name)
    check(model, {"x": images_for(model, batch=1)})


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("output", ["merged", "full"])
def test_pooling(pool: str, output: str) -> None:
    """A head that reads tokens one by one, or attends to them, costs by how many it is given."""
    model = tiny("vit_tiny_patch16_224", global_pool=pool, num_classes=200)
    handle = tokenmerge.patch(model, r=R, output=output, backend="torch")
    found = handle.summary()
    assert found.matching_flops is not None
    images = {"x": images_for(model, batch=1)}
    assert found.flops_after + found.matching_flops == pytest.approx(counted(model, images), rel=1e-3)


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_naflex(pool: str) -> None:
    if NAFLEX not in timm.list_models():
        pytest.skip(f"timm {timm.__version__} has no {NAFLEX}")
    model = tiny(NAFLEX, global_pool=pool)
    check(model, {"x": images_for(model, batch=1)}, input_size=(96, 96))


@pytest.mark.parametrize("name", BY_NAME)
def test_transformers(name: str) -> None:
    tower = BY_NAME[name]
    check(tower.build(), tower.feed(1))


@pytest.mark.parametrize("name", _CLASSIFIERS)
def test_classifiers_around_a_tower(name: str) -> None:
    check(WHOLES[name].make(), WHOLES[name].feed)


@pytest.mark.parametrize("name", MODELS)
def test_vision_libraries(name: str) -> None:
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    check(build(name), {"x": images})


def _own(metric: torch.Tensor, r: int, protected: int = 0, *, tokens: torch.Tensor) -> tokenmerge.MergePlan:
    """A matcher as a user may write one: it compares all tokens with all others, by metric and by value."""
    scores = (metric @ metric.transpose(1, 2)).mean(dim=2) + (tokens @ tokens.transpose(1, 2)).mean(dim=2)
    order = scores[:, protected:].argsort(dim=1) + protected
    first = torch.arange(protected).expand(len(order), -1)
    return tokenmerge.MergePlan(
        torch.cat([first, order[:, r:]], dim=1), order[:, :r], torch.full_like(order[:, :r], protected)
    )


@pytest.mark.parametrize(
    "fields",
    [
        *({"matcher": name} for name in matcher_names() if not (get_entry(name).learned or get_entry(name).adaptive)),
        {"metric": "kv"},
        {"metric": "q", "heads": "concat"},
        {"metric": "x_pre"},
        {"preset": "accurate"},
    ],
    ids=str,
)
def test_what_matching_adds(fields: dict[str, Any]) -> None:
    """For every matcher: all that PyTorch counts is the model's own products and the matching's."""
    model = tiny("vit_tiny_patch16_224")
    found = tokenmerge.patch(model, r=R, backend="torch", **fields).summary()
    assert found.matching_flops is not None
    total = counted(model, {"x": images_for(model, batch=1)})
    assert found.flops_after + found.matching_flops == pytest.approx(total, rel=1e-6)
    assert f"; matching adds {100 * found.matching_flops / found.flops_after:.2g} %" in str(found)


def test_what_a_matcher_of_ones_own_adds() -> None:
    name = "test_what_a_matcher_of_ones_own_adds"
    tokenmerge.register_matcher(name)(_own)
    model = tiny("vit_tiny_patch16_224")
    found = tokenmerge.patch(model, r=R, matcher=name).summary()
    assert found.matching_flops == 37**2 * (16 + 48) + 32**2 * (16 + 48)
    total = counted(model, {"x": images_for(model, batch=1)})
    assert found.flops_after + found.matching_flops == total


def test_matching_that_cannot_be_counted_is_said_to_be_unknown() -> None:
    found = tokenmerge.patch(tiny("vit_tiny_patch16_224"), r=R, matcher="dynamicvit").summary()
    assert found.matching_flops is None
    assert "matching not counted" in str(found)


@pytest.mark.parametrize(
    ("name", "least"),
    [("beit_base_patch16_384", 1.9), ("vit_relpos_base_patch16_224", 1.95), ("vit_base_patch16_384", 1.98)],
)
def test_half_of_the_flops_is_half_of_what_is_counted(name: str, least: float) -> None:
    """Matching included, and the biases between pairs of tokens, whose means once cost more than merging saved."""

    def passed(model: Callable[..., Any]) -> int:
        return counted(model, {"x": torch.empty(1, 3, *image, device="meta")})

    with torch.device("meta"):
        model: Any = timm.create_model(name).eval()
    image = model.patch_embed.img_size
    dense = passed(model)
    tokenmerge.patch(model, speedup=2)
    assert dense / passed(model) >= least


def test_the_classifier_is_still_counted_after_a_copy() -> None:
    model = WHOLES["vjepa2"].make()
    wanted = tokenmerge.patch(model, r=R).summary()
    assert tokenmerge.handle_of(copy.deepcopy(model)).summary().flops_before == wanted.flops_before
    assert tokenmerge.model_cost(model).total() == wanted.flops_before
