"""Inputs of another size than the configured one: counts, grids, schedules and pictures are those of the pass."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor

import tokenmerge
from tests.helpers.tiny import randomize, tiny
from tests.helpers.towers import BY_NAME, TOWERS, Tower
from tokenmerge import InputError
from tokenmerge.patching.target import find_target

hf: Any = transformers
TIMM = [
    ("vit_tiny_patch16_224", {}),
    ("vit_small_patch16_224", {"global_pool": "avg"}),
    ("deit_tiny_distilled_patch16_224", {}),
    ("vit_base_patch14_reg4_dinov2", {}),
    ("vit_base_patch16_siglip_224", {}),
    ("eva02_tiny_patch14_224", {}),
    ("vit_small_patch16_dinov3", {}),
]
SIZES = [(4, 4), (4, 10), (9, 16), (3, 2)]  # smaller, wide, 16:9, a handful


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def check(model: Any, inputs: dict[str, Tensor], pixels: tuple[int, ...], grid: tuple[int, ...], prefix: int) -> None:
    """What the pass saw is what `summary` and `output_tokens` said before it, and what pictures and maps are laid out by."""
    patches = int(torch.tensor(grid).prod())
    with tokenmerge.patched(model, flops=0.8, trace=True, output="full") as handle:
        promised = handle.summary(input_size=pixels)
        assert promised.tokens[0] == patches + prefix
        assert 0.5 < 1 / promised.flops_ratio <= 0.8  # the target holds for these tokens, not for the configured ones
        out = model(**inputs)
        features = getattr(out, "last_hidden_state", None)
        trace = handle.trace
        assert trace.grid == grid
        assert trace.tokens == patches + prefix
        left = [trace.size(block).shape[1] for block in range(len(trace.plans))]
        assert [trace.tokens, *left] == list(promised.tokens)
        assert trace.regions(pixels).shape == pixels
        if features is not None:
            assert trace.to_grid(features).shape == (features.shape[0], features.shape[2], *grid)
        assert handle.output_tokens(input_size=pixels) == patches + prefix
        assert "own size" not in str(promised)


@torch.no_grad()
@pytest.mark.parametrize(("name", "fields"), TIMM, ids=[f"{name}{'-avg' if fields else ''}" for name, fields in TIMM])
@pytest.mark.parametrize("grid", SIZES[:3], ids=str)
def test_timm(name: str, fields: dict[str, Any], grid: tuple[int, int]) -> None:
    model = tiny(name, dynamic_img_size=True, **fields)
    patch = model.patch_embed.patch_size[0]
    images = noise(2, 3, grid[0] * patch, grid[1] * patch)
    check(model, {"x": images}, (grid[0] * patch, grid[1] * patch), grid, model.num_prefix_tokens)
    with tokenmerge.patched(model, r=2, trace=True) as handle:
        features = model.forward_features(images)
        assert handle.trace.to_grid(features).shape == (2, 48, *grid)
        final, maps = model.forward_intermediates(images)
        assert torch.equal(final, features)
        assert maps[-1].shape == (2, 48, *grid)
        assert handle.output_tokens(input_size=images.shape[2:]) == features.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("matcher", ["strided", "bipartite"])
@pytest.mark.parametrize("grid", SIZES, ids=str)
def test_matchers_that_know_the_grid_know_that_of_the_pass(matcher: str, grid: tuple[int, int]) -> None:
    """36 patches can be 6 × 6 or 4 × 9: the count alone says nothing."""
    model = tiny("vit_tiny_patch16_224", dynamic_img_size=True)
    fields = {"partition": "checkerboard"} if matcher == "bipartite" else {"matcher": matcher}
    for rows, columns in (grid, (4, 9), (6, 6)):
        with tokenmerge.patched(model, r=1, trace=True, **fields) as handle:  # type: ignore[arg-type]
            model(noise(1, 3, 16 * rows, 16 * columns))
            plan = handle.trace.plans[0]
            assert plan is not None
            going = int(plan.source[0, 0]) - 1
            if matcher == "strided":
                assert going // columns % 2 or going % columns % 2, "destinations never go"
            else:
                assert (going // columns + going % columns) % 2 == 0, "the first side has the black patches"


@torch.no_grad()
def test_patches_that_were_dropped_leave_no_grid() -> None:
    model = tiny("vit_tiny_patch16_224", patch_drop_rate=0.5).train()
    with tokenmerge.patched(model, r=2, trace=True) as handle:
        features = model.forward_features(noise(1, 3, 96, 96))
        assert handle.trace.grid is None
        with pytest.raises(InputError, match=r"the pass had 18 patches, but the grid is None"):
            handle.trace.to_grid(features)


def _inputs(tower: Tower, grid: tuple[int, int]) -> tuple[dict[str, Any], tuple[int, ...]] | None:
    """An input of a tower with so many patches of an image, and its pixels; `None` for towers of other things."""
    usual = tower.feed(1)
    image = usual.get("pixel_values")
    if image is None or image.dim() != 4:
        return None
    pixels = (16 * grid[0], 16 * grid[1])
    return {"pixel_values": noise(image.shape[0], 3, *pixels)}, pixels


@torch.no_grad()
@pytest.mark.parametrize("grid", SIZES[:3], ids=str)
def test_transformers(grid: tuple[int, int]) -> None:
    """Every tower that takes images of that size."""
    ran = []
    for tower in TOWERS:
        found = _inputs(tower, grid)
        if found is None:
            continue
        inputs, pixels = found
        model = tower.build()
        if "ViTMAE" in tower.name:  # no grid: it shuffles its patches
            continue
        if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            inputs["interpolate_pos_encoding"] = True
        try:
            model(**inputs)
        except (ValueError, RuntimeError, IndexError):  # it takes its own size only
            continue
        check(model, inputs, pixels, grid, tower.prefix)
        ran.append(tower.name)
    assert len(ran) >= 10, ran


@torch.no_grad()
@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
def test_shuffled_patches_are_on_no_grid(mask_ratio: float) -> None:
    """A ViTMAE shuffles its patches also where it masks none: their count says nothing of where they are."""
    config = transformers.ViTMAEConfig(
        hidden_size=48, num_attention_heads=4, num_hidden_layers=3, image_size=96, patch_size=16, mask_ratio=mask_ratio
    )
    model = transformers.ViTMAEModel(config).eval()
    with tokenmerge.patched(model, r=1, trace=True) as handle:
        features = model(noise(1, 3, 96, 96)).last_hidden_state
        assert handle.trace.grid is None
        with pytest.raises(InputError, match="grid"):
            handle.trace.to_grid(features)
        with pytest.raises(InputError, match="grid"):
            handle.trace.regions((96, 96))
        handle.update(matcher="strided")
        with pytest.raises(InputError, match="grid"):
            model(noise(1, 3, 96, 96))
        if not mask_ratio:
            assert handle.summary(input_size=96).tokens[0] == handle.summary().tokens[0] == 37


@torch.no_grad()
def test_few_frames_fill_a_tubelet() -> None:
    model = BY_NAME["VJEPA2Model"].build()
    with tokenmerge.patched(model, r=3, trace=True) as handle:
        for frames, grid in ((1, (1, 4, 4)), (2, (1, 4, 4)), (4, (2, 4, 4))):
            model(pixel_values_videos=noise(1, frames, 3, 64, 64), skip_predictor=True)
            assert handle.trace.grid == grid
            assert handle.summary(input_size=(frames, 64, 64)).tokens[0] == handle.trace.tokens == math.prod(grid)


@torch.no_grad()
def test_half_of_the_flops_is_half_of_them_at_224_on_a_model_for_518() -> None:
    """The default of the most used backbone: 518 in the config, 224 in the processor."""
    config = hf.Dinov2Config(hidden_size=48, num_attention_heads=4, num_hidden_layers=6, image_size=518, patch_size=14)
    model = hf.Dinov2Model(config).eval()
    randomize(model)
    with tokenmerge.patched(model, flops=0.5, trace=True, output="full") as handle:
        model(noise(1, 3, 224, 224))
        small = handle.trace
        assert 1 / handle.summary(input_size=224).flops_ratio == pytest.approx(0.5, abs=0.02)
        assert small.tokens == 257
        assert small.size().shape[1] == handle.summary(input_size=(224, 224)).tokens[-1] > 20
        model(noise(1, 3, 518, 518))
        assert handle.trace.tokens == handle.summary().tokens[0] == 1370
        assert small.tokens == 257, "a trace is of its pass"
        assert "the model's own size" in str(handle.summary())


@torch.no_grad()
def test_videos_and_sounds() -> None:
    by_name = {tower.name: tower for tower in TOWERS}
    video = by_name["videomae.VideoMAEModel"]
    model = video.build()
    check(model, video.feed(1), (4, 64, 64), (2, 4, 4), 0)
    sound = by_name["whisper.WhisperEncoder"]
    check(sound.build(), sound.feed(1), (80,), (40,), 0)
    spectrogram = by_name["audio_spectrogram_transformer.ASTModel"]
    model = spectrogram.build()
    grid = handle_grid(model, spectrogram.feed(1))
    check(model, spectrogram.feed(1), (48, 64), grid, 2)


@torch.no_grad()
@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower.name.partition(".")[2])
def test_features_of_every_tower_carry_their_plans(tower: Tower) -> None:
    """What a tower gives out can be spread over its patches, whether it was merged or spread already."""
    model = tower.build()
    inputs = tower.feed(2)
    with tokenmerge.patched(model, r=2, trace=True) as handle:
        full = model(**inputs).last_hidden_state
        assert handle.trace.unmerge(full) is full
        assert torch.equal(tokenmerge.token_sizes(full), torch.ones(full.shape[:2]))
        if find_target(model).family.merged_output(model):
            return
        handle.update(output="merged")
        merged = model(**inputs).last_hidden_state
        assert merged.shape[1] == handle.trace.size().shape[1] == full.shape[1] - 6
        torch.testing.assert_close(handle.trace.unmerge(merged), full)
        assert torch.equal(tokenmerge.token_sizes(merged), handle.trace.size())


def handle_grid(model: Any, inputs: dict[str, Tensor]) -> tuple[int, ...]:
    with tokenmerge.patched(model, r=0, trace=True) as handle:
        model(**inputs)
        grid = handle.trace.grid
    assert grid is not None
    return grid


@torch.no_grad()
def test_every_layer_is_known_before_the_pass() -> None:
    model = tiny("vit_tiny_patch16_224", dynamic_img_size=True)
    with tokenmerge.patched(model, r=[5, 0, 7], trace=True) as handle:
        assert [handle.output_tokens(layer) for layer in range(4)] == [37, 32, 32, 25]
        assert [handle.output_tokens(layer) for layer in (-1, -2, -4)] == [25, 32, 37]
        assert handle.output_tokens(-2, input_size=(64, 64)) == 17 - 5
        for size, words in (((64,), "height, width"), ((0, 64), "height, width"), (8, "smaller than one patch")):
            with pytest.raises(InputError, match=words):
                handle.summary(input_size=size)
        with pytest.raises(InputError, match="layer 4 is none of the 4 hidden states"):
            handle.output_tokens(4)
    fixed = tiny("vit_tiny_patch16_224")
    with tokenmerge.patched(fixed, r=5) as handle, pytest.raises(InputError, match="dynamic_img_size=True"):
        handle.summary(input_size=(64, 64))
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", img_size=96, dynamic_img_size=True).eval()
    with tokenmerge.patched(hybrid, r=1, trace=True) as handle:
        hybrid(noise(1, 3, 64, 128))
        assert handle.trace.grid == (2, 4)
        assert handle.summary(input_size=(64, 128)).tokens[0] == handle.trace.tokens == 9


@pytest.mark.parametrize("name", ["WhisperEncoder", "VideoMAEModel", "ASTModel", "Aimv2VisionModel"])
def test_models_of_one_size_promise_nothing_for_another(name: str) -> None:
    """Their position embeddings fit one number of patches, and they refuse to run on others."""
    tower = BY_NAME[name]
    model = tower.build()
    handle = tokenmerge.patch(model, r=2)
    with torch.no_grad():
        model(**tower.feed(1))
    for size in (160, 320):
        with pytest.raises(InputError, match="of one size only"):
            handle.summary(input_size=size)
