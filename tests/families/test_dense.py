"""Dense output, order, the choice of output, and padding: what readers of all tokens rely on."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import tokenmerge
from tests.helpers.tiny import images_for, randomize, tiny
from tests.helpers.towers import BY_NAME


@torch.no_grad()
def test_maps_from_merged_features() -> None:
    model = tiny("vit_small_patch16_224")
    images = images_for(model)
    with tokenmerge.patched(model, r=4, trace=True) as handle:
        features = model.forward_features(images)
        trace = handle.trace
        full = trace.unmerge(features)
        maps = trace.to_grid(features)
        assert maps.shape == (2, 48, 6, 6)
        assert torch.equal(maps.flatten(2).transpose(1, 2), full[:, 1:])
        assert torch.equal(trace.to_grid(full), maps)
        assert torch.equal(trace.to_grid(tokenmerge.carry(features * 2, like=features)), maps * 2)
        with pytest.raises(tokenmerge.InputError, match="carry no plans"):
            trace.to_grid(full[:, 1:])
        assert trace.to_grid(features, grid=(4, 9)).shape == (2, 48, 4, 9)
        with pytest.raises(tokenmerge.InputError, match="the pass had 36 patches, but the grid is"):
            trace.to_grid(features, grid=(5, 7))


@torch.no_grad()
def test_maps_of_a_video() -> None:
    tower = BY_NAME["VideoMAEModel"]
    model = tower.build()
    with tokenmerge.patched(model, r=3, trace=True) as handle:
        out = model(**tower.feed(2)).last_hidden_state
        maps = handle.trace.to_grid(out)
    assert maps.shape == (2, 48, 2, 4, 4)


@torch.no_grad()
def test_order_keep_leaves_tokens_where_they_were() -> None:
    model = tiny("vit_small_patch16_224")
    images = images_for(model)
    with tokenmerge.patched(model, r=6, trace=True, order="spatial") as handle:
        features = model.forward_features(images)
        first = [int((row == i).nonzero()[0]) for row in handle.trace.source() for i in range(features.shape[1])]
        kept = features.shape[1]
        anchors = [handle.trace.plans[-1].kept.diff(dim=1).min()]  # type: ignore[union-attr]
        assert all(int(step) > 0 for step in anchors)
        assert len(first) == 2 * kept
        one_block = torch.stack([plan.kept for plan in handle.trace.plans[:1] if plan is not None])
        assert bool((one_block.diff(dim=-1) > 0).all())
    with tokenmerge.patched(model, r=[6], trace=True) as handle:
        plain = model.forward_features(images)
        handle.update(order="spatial")
        ordered = model.forward_features(images)
        full = handle.trace.unmerge(ordered)
        handle.update(order="partition")
        model.forward_features(images)
        # after one merge only the order differs: unmerged, both are the same
        torch.testing.assert_close(full, handle.trace.unmerge(plain), rtol=1e-5, atol=1e-5)
        assert not torch.equal(plain, ordered)


@torch.no_grad()
def test_output_is_the_users_choice_where_it_is_right() -> None:
    model = tiny("vit_small_patch16_224", global_pool="avg")
    images = images_for(model)
    with tokenmerge.patched(model, r=4) as handle:
        merged, features = model(images), model.forward_features(images)
        assert features.shape[1] == handle.output_tokens() == 37 - 12
        handle.update(output="full")
        assert handle.output_tokens() == 37
        full = model.forward_features(images)
        assert full.shape[1] == 37
        assert torch.equal(tokenmerge.token_sizes(full), torch.ones(2, 37))
        torch.testing.assert_close(model(images), merged, rtol=1e-5, atol=1e-5)
        model.prune_intermediate_layers([0, 1])
        assert model.forward_features(images).shape[1] == 37
    eva = tiny("eva02_tiny_patch14_224")
    with pytest.raises(tokenmerge.ConfigError, match="avg pooling would not weigh"):
        tokenmerge.patch(eva, r=4, output="merged")
    assert not tokenmerge.is_patched(eva)


def _padded(model: Any, junk: float) -> tuple[Tensor, Tensor]:
    """Logits for an image of 4×4 and one of 6×6 patches in one padded batch, and what padding leaves in them."""
    generator = torch.Generator().manual_seed(3)
    patches = torch.randn(2, 36, 16 * 16 * 3, generator=generator)
    coordinates = torch.cartesian_prod(torch.arange(6), torch.arange(6)).expand(2, -1, -1).clone()
    coordinates[0, :16] = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    valid = torch.ones(2, 36, dtype=torch.bool)
    valid[0, 16:] = False
    patches[0, 16:] = junk
    coordinates[0, 16:] = 0
    return model({"patches": patches, "patch_coord": coordinates, "patch_valid": valid}), valid


_NAFLEX = [name for name in ("naflexvit_base_patch16_gap", "naflexvit_base_patch16_siglip", "naflexvit_base_patch16_map",
                             "naflexvit_base_patch16_parfac_gap") if name in timm.list_models()]  # fmt: skip


@pytest.mark.parametrize("name", _NAFLEX)
@torch.no_grad()
def test_padding_changes_nothing_and_meets_nobody(name: str) -> None:
    model: Any = timm.create_model(name, embed_dim=48, depth=3, num_heads=4, num_classes=7).eval()
    randomize(model)
    prefix = int(model.num_prefix_tokens)
    plain = _padded(model, 0.0)[0]
    with tokenmerge.patched(model, r=0):
        assert torch.equal(_padded(model, 0.0)[0], plain)
    with tokenmerge.patched(model, r=3, trace=True) as handle:
        quiet, valid = _padded(model, 0.0)
        source = handle.trace.source()[:, prefix:]
        for image in range(2):
            real = set(source[image][valid[image]].tolist())
            assert not real & set(source[image][~valid[image]].tolist())
        loud, _ = _padded(model, 50.0)
    torch.testing.assert_close(loud, quiet, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(quiet, plain, atol=1e-4)


@torch.no_grad()
def test_masks_that_are_more_than_padding_are_refused() -> None:
    model = tiny("vit_small_patch16_224")
    images = images_for(model)
    tokenmerge.patch(model, r=4)
    causal = torch.ones(1, 1, 37, 37, dtype=torch.bool).tril()
    for mask in (causal, torch.ones(37, 37, dtype=torch.bool), torch.randn(1, 1, 37, 37)):
        with pytest.raises(tokenmerge.PatchError, match="mask"):
            model.forward_features(images, attn_mask=mask)
    padding = torch.ones(2, 1, 1, 37, dtype=torch.bool)
    padding[:, :, :, 30:] = False
    out = model.forward_features(images, attn_mask=padding)
    additive = torch.zeros(2, 1, 1, 37).masked_fill(~padding, float("-inf"))
    torch.testing.assert_close(model.forward_features(images, attn_mask=additive), out)
