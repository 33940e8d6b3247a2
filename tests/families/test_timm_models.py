"""Every model name of both timm modules: r=0 is upstream to the bit, r > 0 is the hooks-only oracle."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers.config import set_fused_attn
from timm.models import vision_transformer

import tokenmerge
from tests.helpers import flat
from tests.helpers.oracle import oracle
from tests.helpers.timm_oracle import forget_overrides, timm_oracle
from tests.helpers.tiny import images_for, tiny
from tokenmerge.tracing.trace import unmerged

NAMES = flat.names(*flat.PLAIN)
REST = flat.names(*flat.OTHERS)
SCHEDULE = (5, 0, 7)


@pytest.mark.parametrize("name", NAMES)
def test_every_name(name: str) -> None:
    model = tiny(name)
    images = images_for(model)
    with torch.no_grad():
        original = model(images)
        with tokenmerge.patched(model, r=0):
            assert torch.equal(model(images), original)
        with tokenmerge.patched(model, r=list(SCHEDULE), prop_attn=True, trace=True) as handle:
            merged = model(images)
            source = handle.trace.source()
            protected = handle.summary().protected
        with oracle(model, SCHEDULE, protected) as wanted:
            expected = model(images)
        assert torch.equal(source, wanted.source)  # type: ignore[arg-type]
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        assert (expected - original).abs().max() > 1e-3 * original.abs().max()  # merging does matter here
        assert torch.equal(model(images), original)


@pytest.mark.parametrize("name", flat.names(*flat.REFUSED))
def test_flat_names_that_are_refused(name: str) -> None:
    kwargs: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 4}
    with pytest.raises(tokenmerge.UnsupportedModelError, match="made for the full grid"):
        tokenmerge.patch(timm.create_model(name, **kwargs), r=2)


@pytest.mark.parametrize("name", REST)
def test_every_other_flat_name(name: str) -> None:
    model = tiny(name)
    images = images_for(model)
    with torch.no_grad():
        original = model(images)
        with tokenmerge.patched(model, r=0):
            assert torch.equal(model(images), original)
        with tokenmerge.patched(model, r=list(SCHEDULE), prop_attn=True, trace=True) as handle:
            merged = model(images)
            source = handle.trace.source()
            protected = handle.summary().protected
            assert handle.output_tokens() == handle.summary().tokens[0]
        assert torch.equal(model(images), original)
        tower = getattr(model, "encoder", model)  # classifiers on top of a vision encoder
        with timm_oracle(tower, SCHEDULE, protected) as wanted:
            expected = model(images)
        forget_overrides(model)
    assert torch.equal(source, wanted.source)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert (expected - original).abs().max() > 1e-3 * original.abs().max()


_POSITIONS = [
    "eva02_tiny_patch14_224",  # rotary, by index
    "vit_small_patch16_dinov3",  # rotary, normalised coordinates
    "vit_small_patch16_rope_mixed_224",  # rotary, learned frequencies
    "beit_base_patch16_224",  # relative bias per block
    "vit_relpos_small_patch16_224",  # relative bias by an MLP
]


@pytest.mark.parametrize("name", [name for name in _POSITIONS if name in REST])
@torch.no_grad()
def test_position_of_the_destination(name: str) -> None:
    model = tiny(name)
    images = images_for(model)
    with tokenmerge.patched(model, r=list(SCHEDULE), prop_attn=True, positions="destination") as handle:
        merged, protected = model(images), handle.summary().protected
        handle.update(positions="mean")
        assert not torch.allclose(model(images), merged, atol=1e-4)
    with timm_oracle(model, SCHEDULE, protected, destination=True):
        expected = model(images)
    forget_overrides(model)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


# one name per kind of block, head and token layout; older timms lack some
_KINDS = [
    "vit_tiny_patch16_224",  # class token
    "deit_tiny_distilled_patch16_224",  # distillation token, two heads
    "deit3_small_patch16_224",  # LayerScale, no_embed_class
    "vit_base_patch14_reg4_dinov2",  # registers, LayerScale
    "vit_giant_patch14_reg4_dinov2",  # SwiGLU
    "vit_base_patch16_clip_224",  # pre-norm
    "vit_base_patch16_siglip_224",  # attention pooling, no prefix
    "vit_base_patch16_siglip_gap_224",  # average pooling without prefix
    "vit_so150m_patch16_reg4_map_256",  # registers and attention pooling
    "vit_base_patch16_rpn_224",  # post-norm branches
    "vit_small_patch16_18x2_224",  # parallel attentions, parallel MLPs
    "vit_base_patch16_xp_224",  # attention and MLP in parallel, qk-norm
    "vit_dwee_patch16_reg1_gap_256",  # differential attention
    "vit_dpwee_patch16_reg1_gap_256",  # both
    "aimv2_large_patch14_224",  # RMS norm, SwiGLU, gated
    "test_vit3",  # pool includes the prefix
]
KINDS = [name for name in _KINDS if name in NAMES]
POOLS = [
    "",
    "token",
    "avg",
    "avgmax",
    "max",
    "map",
    *(["prr"] if hasattr(vision_transformer, "AttentionPoolPrr") else []),
]


@pytest.mark.parametrize("name", KINDS)
def test_without_proportional_attention(name: str) -> None:
    model = tiny(name)
    images = images_for(model)
    with torch.no_grad():
        with tokenmerge.patched(model, r=list(SCHEDULE), prop_attn=False) as handle:
            merged, protected = model(images), handle.summary().protected
        with oracle(model, SCHEDULE, protected, prop_attn=False):
            expected = model(images)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("include_prefix", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_every_pooling(pool: str, include_prefix: bool, fused: bool) -> None:
    set_fused_attn(fused)
    try:
        model = tiny("vit_tiny_patch16_224", global_pool=pool, pool_include_prefix=include_prefix, reg_tokens=2)
    finally:
        set_fused_attn(True)
    images = images_for(model)
    with torch.no_grad():
        with tokenmerge.patched(model, r=list(SCHEDULE), trace=True):
            merged = model(images)
            features = model.forward_features(images)
        with oracle(model, SCHEDULE, 3):
            expected = model(images)
    if pool == "":  # tokens come out: as many as are left
        assert merged.shape[1] == 3 + 36 - sum(SCHEDULE)
        merged = unmerged(tokenmerge.carry(merged, like=features))
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", KINDS)
def test_undo_leaves_no_trace(name: str) -> None:
    model = tiny(name)
    before = _anatomy(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    handle = tokenmerge.patch(model, r=4, trace=True)
    assert list(model.state_dict()) == list(state)
    with torch.no_grad():
        model(images_for(model))
    handle.remove()
    assert _anatomy(model) == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def _anatomy(model: Any) -> list[tuple[Any, ...]]:
    """Class, attribute names, hooks and mode of every module."""
    return [
        (name, type(module), sorted(vars(module)), list(module._forward_hooks.values()), module.training)
        for name, module in model.named_modules()
    ]


def test_mae_weights_turn_proportional_attention_off() -> None:
    for name, wanted in (
        ("vit_base_patch16_224.mae", False),
        ("vit_base_patch16_224.augreg_in21k", True),
        ("vit_base_patch16_1024_128.audiomae_as2m", False),
    ):
        if name.split(".")[0] not in NAMES:
            continue
        model = tiny(name, img_size=96)
        assert tokenmerge.patch(model, r=2).summary().prop_attn is wanted
        tokenmerge.unpatch(model)
        assert tokenmerge.patch(model, r=2, prop_attn=True).summary().prop_attn is True
