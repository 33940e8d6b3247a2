"""What people do with transformers' models around the forward pass: files, pipelines, masks, training, refusals."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.vit.modeling_vit import ViTLayer

import tokenmerge
from tests.families.test_transformers_heads import (
    IMAGE,
    IMAGES,
    SMALL,
    WHOLES,
    R,
    hf,
    lively,
    llava,
    noise,
    of,
    prompt,
    tensors,
)
from tests.helpers.towers import BY_NAME
from tokenmerge import ConfigError, InputError, PatchError, UnsupportedModelError


@pytest.mark.parametrize("name", ["vit", "beit", "vjepa2", "clip", "llava"])
@torch.no_grad()
def test_a_patched_model_is_saved_as_the_original(name: str, tmp_path: Path) -> None:
    """`save_pretrained` writes the same weights, and a config with one entry more; the original comes back to the bit."""
    whole = WHOLES[name]
    model = whole.make()
    original = whole.run(model)
    model.save_pretrained(tmp_path / "before")
    with tokenmerge.patched(model, r=R):
        model.save_pretrained(tmp_path / "patched")
    model.save_pretrained(tmp_path / "after")
    texts = [(tmp_path / folder / "config.json").read_text() for folder in ("before", "patched", "after")]
    assert texts[0] == texts[2]
    assert texts[1].count('"tokenmerge": {') == 1
    assert _without_merging(json.loads(texts[1])) == json.loads(texts[0])
    loaded, report = type(model).from_pretrained(tmp_path / "patched", output_loading_info=True)
    assert not any(report.values()), report
    assert type(loaded) is type(model)
    assert not tokenmerge.is_patched(loaded)
    assert torch.equal(whole.run(loaded.eval()), original)


def _without_merging(config: Any) -> Any:
    """A config without the entry of merging, which may stand in the part of a tower."""
    if not isinstance(config, dict):
        return config
    return {name: _without_merging(value) for name, value in config.items() if name != "tokenmerge"}


def test_pipeline() -> None:
    """The same pipeline object works before, while and after its model is patched."""
    model = WHOLES["vit"].make()
    processor = hf.ViTImageProcessor(size={"height": 96, "width": 96})
    classify = hf.pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (120, 100, 3), dtype=np.uint8)

    def scores() -> dict[str, float]:
        return {one["label"]: one["score"] for one in classify(Image.fromarray(pixels), top_k=7)}

    before = scores()
    with tokenmerge.patched(model, r=8):
        merged = scores()
    assert before.keys() == merged.keys()
    assert before != merged
    assert sum(merged.values()) == pytest.approx(1.0, abs=1e-5)
    assert scores() == before


# --- attention implementations ------------------------------------------------------------------------------


FLASHY = ("flash_attention_2", "flex_attention")
FLASHED = ("vit", "dinov2", "beit", "clip", "vjepa2", "whisper", "videomae-mean")


@pytest.mark.parametrize("implementation", FLASHY)
@pytest.mark.parametrize("name", FLASHED)
def test_implementations_without_a_mask_are_refused(name: str, implementation: str) -> None:
    """Chosen before: nothing is patched, and the message says what to call."""
    model = WHOLES[name].make()
    WHOLES[name].tower_of(model).config._attn_implementation = implementation
    with pytest.raises(UnsupportedModelError, match=rf"{implementation}.*set_attn_implementation\('sdpa'\)"):
        tokenmerge.patch(model, r=2)
    assert not tokenmerge.is_patched(model)


@pytest.mark.slow  # and so with the newest versions only: torch 2.11's process dies when a new thread compiles such a model
@torch.no_grad()
@pytest.mark.parametrize("name", ["CLIPVisionModel", "Dinov2Model"])
def test_hidden_states_of_a_compiled_model(name: str) -> None:
    """Also where nothing was asked for them before in this thread, and a plain pass was compiled first."""
    torch.compiler.reset()
    model = BY_NAME[name].build()
    tokenmerge.patch(model, r=4)
    inputs = BY_NAME[name].feed(2)
    wanted = model(**inputs, output_hidden_states=True).hidden_states

    def compiled_in_a_new_thread() -> Any:
        with torch.no_grad():
            compiled: Any = torch.compile(model, backend="eager")
            compiled(**inputs)
            return compiled(**inputs, output_hidden_states=True).hidden_states

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        found = pool.submit(compiled_in_a_new_thread).result()
    assert len(found) == len(wanted)
    assert all(torch.equal(left, right) for left, right in zip(found, wanted, strict=True))


@pytest.mark.parametrize("implementation", FLASHY)
@pytest.mark.parametrize("name", FLASHED)
@torch.no_grad()
def test_implementations_changed_after_patching(name: str, implementation: str) -> None:
    """Chosen later: the next forward pass stops with the same advice, whatever mask upstream made for it."""
    whole = WHOLES[name]
    model = whole.make()
    with tokenmerge.patched(model, r=2), torch.compiler.set_stance("force_eager"):  # upstream compiles flex's masks
        whole.tower_of(model).config._attn_implementation = implementation
        with pytest.raises(PatchError, match=rf"{implementation}.*set_attn_implementation\('sdpa'\)"):
            whole.run(model)


# --- padding ------------------------------------------------------------------------------------------------


def _vit(short: int) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """ViT, two images of which the second keeps the class token and `short` patches, and garbage behind them."""
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[1, 1 + short :] = 0
    garbage = IMAGES["pixel_values"].clone()
    for patch in range(short, 36):
        row, column = divmod(patch, 6)
        garbage[1, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 1e3
    feed = {**IMAGES, "attention_mask": mask}
    return BY_NAME["ViTModel"].build(), feed, {**feed, "pixel_values": garbage}


def _beit(short: int) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """The same for BEiT, whose layers take the padding mask together with relative positions."""
    model = BY_NAME["BeitModel-own"].build(use_mean_pooling=False)  # upstream's mean is over padding, too
    model.set_attn_implementation("eager")  # under sdpa upstream adds its boolean mask to the bias as 0 and 1
    return model, *_vit(short)[1:]


def _siglip2(short: int) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """SigLIP 2 (NaFlex): images of 4×5 patches and of `short` patches in one row."""
    model = hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**SMALL, patch_size=16, num_patches=16))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, short:] = 0
    pixels = noise(2, 20, 768)
    garbage = pixels.clone()
    garbage[1, short:] = 1e3
    shapes = torch.tensor([[4, 5], [1, max(short, 1)]])
    feed = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return lively(model), feed, {**feed, "pixel_values": garbage}


PADDED = [(_siglip2, 12), (_siglip2, 19), (_siglip2, 3), (_vit, 24), (_vit, 9), (_beit, 24)]


@pytest.mark.parametrize(("make", "short"), PADDED, ids=[f"{make.__name__[1:]}-{short}" for make, short in PADDED])
@pytest.mark.parametrize("r", [R, [9, 5, 2]], ids=str)
@torch.no_grad()
def test_padding_never_reaches_an_image(make: Callable[..., Any], short: int, r: list[int]) -> None:
    """Padding merges with padding, so nothing of it shows; where it must meet a token, it weighs nothing."""
    model, feed, garbage = make(short)
    mask = feed["attention_mask" if "attention_mask" in feed else "pixel_attention_mask"]
    real = int(mask[1].sum())
    upstream, dirty = model(**feed), model(**garbage)
    torch.testing.assert_close(upstream.pooler_output, dirty.pooler_output, rtol=0, atol=1e-6)
    with tokenmerge.patched(model, r=r, prop_attn=True, trace=True) as handle:
        merged = model(**feed)
        source = handle.trace.source()[1]
        other = model(**garbage)
    assert merged.last_hidden_state.isfinite().all()
    assert not torch.allclose(merged.pooler_output, upstream.pooler_output, atol=1e-4)
    torch.testing.assert_close(other.pooler_output, merged.pooler_output, rtol=0, atol=1e-6)
    ours, theirs = merged.last_hidden_state[1, :real], other.last_hidden_state[1, :real]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    if mask.shape[1] - real >= 8:  # enough padding to find partners in every layer
        assert not set(source[:real].tolist()) & set(source[real:].tolist())


@torch.no_grad()
def test_padding_inside_shared_relative_positions() -> None:
    """BEiT's shared positions and its padding come as one bias, out of which neither can be read."""
    model, feed = BY_NAME["BeitModel-shared"].build(), _vit(24)[1]
    model.set_attn_implementation("eager")
    with tokenmerge.patched(model, r=R), pytest.raises(PatchError, match="mask"):
        model(**feed)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_an_image_that_is_all_padding(implementation: str) -> None:
    """Upstream gives it some finite features; a NaN would spread through every mean over the batch."""
    model, feed, _ = _siglip2(0)
    model.set_attn_implementation(implementation)
    assert all(t.isfinite().all() for t in tensors(model(**feed)))
    with tokenmerge.patched(model, r=R):
        assert all(t.isfinite().all() for t in tensors(model(**feed)))


MASKS = {
    "causal": torch.ones(37, 37, dtype=torch.bool).tril()[None, None],
    "bias": noise(2, 1, 37, 37),
    "per head": torch.ones(2, 4, 37, 37, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@torch.no_grad()
def test_masks_that_are_not_padding(mask: Tensor) -> None:
    """Merged tokens cannot obey them, so the pass stops; without merging they are upstream's business."""
    model = BY_NAME["ViTModel"].build()
    original = model(**IMAGES, attention_mask=mask).last_hidden_state
    with tokenmerge.patched(model, r=2) as handle:
        with pytest.raises(PatchError, match="mask"):
            model(**IMAGES, attention_mask=mask)
        handle.update(r=0)
        assert torch.equal(model(**IMAGES, attention_mask=mask).last_hidden_state, original)


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLES)
def test_a_training_step(name: str) -> None:
    """Gradient checkpointing as users turn it on, one loss, one backward: finite gradients, and the same tower learns."""
    whole = WHOLES[name]
    model = whole.make().train()

    def learned() -> set[str]:
        model.zero_grad(set_to_none=True)
        whole.run(model).float().square().mean().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert all(grad.isfinite().all() for grad in found.values())
        return {name for name, grad in found.items() if grad.abs().max() > 0}

    upstream = {name for name in learned() if not name.endswith("k_proj.bias")}  # theirs are 0 but for rounding
    model.gradient_checkpointing_enable()
    with tokenmerge.patched(model, r=R, prop_attn=True):
        assert learned() >= upstream


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dinov3_trains_with_scaled_positions(checkpointing: bool) -> None:
    """DINOv3 stretches its rotary coordinates at random in every training pass; merged tokens go along."""
    model = BY_NAME["DINOv3ViTModel"].build(pos_embed_rescale=2.0).train()
    assert model.config.pos_embed_rescale == 2.0
    if checkpointing:
        model.gradient_checkpointing_enable()
    with tokenmerge.patched(model, r=R):
        output = model(**IMAGES).last_hidden_state
        output.square().mean().backward()
        first, second = (model(**IMAGES).last_hidden_state for _ in range(2))
    assert output.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert not torch.allclose(first, second, atol=1e-4)  # the stretch is drawn anew


# --- merged tokens for those who ask for them ----------------------------------------------------------------


@torch.no_grad()
def test_a_bare_tower_hands_on_merged_tokens_with_their_sizes() -> None:
    """As many as announced; sizes are on the very tensors that leave the tower, and on nothing made from them."""
    model = BY_NAME["CLIPVisionModel"].build()
    with tokenmerge.patched(model, r=R) as handle:
        pooled = model(**IMAGES).pooler_output
        handle.update(output="merged", trace=True)
        assert handle.output_tokens() == 30
        output = model(**IMAGES)
        size, source = handle.trace.size(), handle.trace.source()
        inside = model.encoder(inputs_embeds=model.pre_layrnorm(model.embeddings(**IMAGES))).last_hidden_state
        last = model(**IMAGES, return_dict=False)[0]
        handle.update(output="full")
        full = model(**IMAGES).last_hidden_state
    assert output.last_hidden_state.shape == (2, 30, 48)
    for tokens in (output.last_hidden_state, inside, last):
        assert torch.equal(tokenmerge.token_sizes(tokens), size)
    assert torch.equal(output.pooler_output, pooled)
    assert torch.equal(output.last_hidden_state.gather(1, source.unsqueeze(2).expand_as(full)), full)
    with pytest.raises(InputError, match="carry no token sizes"):
        tokenmerge.token_sizes(output.last_hidden_state[:, 1:])


@torch.no_grad()
def test_a_failed_pass_leaves_no_wish_behind() -> None:
    """Full maps asked for in a pass that fails must not make the next pass full."""
    model = BY_NAME["CLIPVisionModel"].build()
    with tokenmerge.patched(model, r=R, output="merged"):
        with pytest.raises(ValueError, match="size"):
            model(noise(1, 3, 64, 64), output_hidden_states=True)
        assert model(**IMAGES).last_hidden_state.shape[1] == 30


@torch.no_grad()
def test_llava_reads_merged_tokens() -> None:
    """A language model with fewer image tokens: as many features as `output_tokens` says, less the class token."""
    model = lively(llava(vision_feature_layer=-1))

    def features() -> Tensor:
        return torch.stack(list(model.model.get_image_features(**IMAGES).pooler_output))

    with tokenmerge.patched(model, r=R, output="full") as handle:
        full = features()
        assert full.shape[1] == handle.output_tokens() - 1 == 36
        handle.update(output="merged", trace=True)
        merged, source = features(), handle.trace.source()[:, 1:] - 1
        assert merged.shape[1] == handle.output_tokens() - 1 == 29
        logits = model(**IMAGES, input_ids=prompt(29)).logits
        words = model.generate(**IMAGES, input_ids=prompt(29), max_new_tokens=3, do_sample=False)
    torch.testing.assert_close(merged.gather(1, source.unsqueeze(2).expand_as(full)), full)
    assert logits.shape == (2, 45, 99)
    assert logits.isfinite().all()
    assert words.shape[0] == 2


def test_llava_over_pixtral_needs_every_token() -> None:
    """It cuts the tokens of several images apart by their sizes in pixels, which merged ones do not follow."""
    tower = hf.PixtralVisionConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, image_size=96, patch_size=16
    )
    text = hf.LlamaConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=99, pad_token_id=0
    )
    whole = {"image_token_index": 98, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    config = hf.LlavaConfig(vision_config=tower, text_config=text, **whole)
    model = lively(hf.LlavaForConditionalGeneration(config).eval())
    with pytest.raises(ConfigError, match="by their sizes in pixels"):
        tokenmerge.patch(model, r=3, output="merged")
    handle = tokenmerge.patch(model, r=3)
    ids = torch.cat([torch.full((1, handle.output_tokens()), 98), torch.tensor([[1, 2, 3]])], dim=1)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=torch.randn(1, 3, 96, 96), image_sizes=torch.tensor([[96, 96]]))
    assert handle.output_tokens() == 36
    assert out.logits.isfinite().all()


@torch.no_grad()
def test_llava_reads_an_earlier_layer() -> None:
    """LLaVA's default is the last layer but one: the patches after it, or the tokens that are left there."""
    model = lively(llava())
    with tokenmerge.patched(model, r=R) as handle:
        features = model.model.get_image_features(**IMAGES).pooler_output
        assert [f.shape for f in features] == [(36, 48), (36, 48)]
        assert model(**IMAGES, input_ids=prompt(36)).logits.isfinite().all()
        handle.update(output="merged")
        left = handle.summary().tokens[-2] - 1
        assert left < 36
        features = model.model.get_image_features(**IMAGES).pooler_output
        assert [f.shape for f in features] == [(left, 48), (left, 48)]
        assert model(**IMAGES, input_ids=prompt(left)).logits.isfinite().all()


MISREADERS = {
    **{name: (WHOLES[name].build, "average") for name in ("dinov2", "beit", "videomae-mean", "clip-mean", "siglip")},
    **{name: (WHOLES[name].build, "cross-attention") for name in ("whisper", "blip")},
    "vit-mim": (of("ViTForMaskedImageModeling", "ViTConfig", **IMAGE), "grid|place"),
}


@pytest.mark.parametrize(("build", "reason"), MISREADERS.values(), ids=MISREADERS.keys())
def test_merged_tokens_are_refused_where_their_reader_would_misread_them(build: Callable[[], Any], reason: str) -> None:
    """Heads that average without sizes, attend without sizes or put tokens on a grid: a wrong result without an error."""
    model = lively(build())
    with pytest.raises(ConfigError, match=reason):
        tokenmerge.patch(model, r=2, output="merged")
    assert not tokenmerge.is_patched(model)
    handle = tokenmerge.patch(model, r=2)
    with pytest.raises(ConfigError, match=reason):
        handle.update(output="merged")
    assert handle.config.output == "auto"


# --- refusals -----------------------------------------------------------------------------------------------

_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
_SAM = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "global_attn_indexes": [0]}
_SEGFORMER = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16],
    "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
}  # fmt: skip
_HIERA = {
    "image_size": [64, 64], "embed_dim": 12, "depths": [1, 1, 1], "num_heads": [1, 2, 4],
    "query_stride": [2, 2], "num_query_pool": 2, "masked_unit_size": [4, 4],
}  # fmt: skip
REFUSED = {
    "swin": (of("SwinForImageClassification", "SwinConfig", **_SWIN), "windows"),
    "sam": (of("SamVisionModel", "SamVisionConfig", **_SAM, image_size=64), "windows"),
    "segformer": (of("SegformerForImageClassification", "SegformerConfig", **_SEGFORMER), "hierarchical"),
    "hiera": (of("HieraModel", "HieraConfig", **_HIERA), "hierarchical"),
    "timesformer": (of("TimesformerModel", "TimesformerConfig", **IMAGE, num_frames=2), "space and time.*use VideoMAE"),
    "yolos": (of("YolosModel", "YolosConfig", **{**IMAGE, "image_size": [96, 96]}), "detection tokens"),
    "text": (of("BertModel", "BertConfig", **SMALL, vocab_size=9), "not in the table of supported models"),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_models_that_a_flat_merge_does_not_fit(build: Callable[[], Any], reason: str) -> None:
    """Refused with what is special about them, and untouched."""
    model = build()
    before = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        tokenmerge.patch(model, r=2)
    assert len(caught.value.reasons) == 1
    assert [type(module) for module in model.modules()] == before


class OwnForward(ViTLayer):
    """A layer that does something of its own."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Twice upstream's."""
        return 2 * super().forward(hidden_states, attention_mask, **kwargs)


class OwnName(ViTLayer):
    """A layer that only has another name."""


def test_a_layer_with_its_own_forward_is_refused() -> None:
    """What it does cannot be taken apart."""
    model = BY_NAME["ViTModel"].build()
    model.layers[1] = OwnForward(model.config)
    with pytest.raises(UnsupportedModelError, match=r"block 1 .*OwnForward\): it has its own forward"):
        tokenmerge.patch(model, r=2)


@torch.no_grad()
def test_a_layer_that_inherits_its_forward_is_patched() -> None:
    """transformers wraps the forward of every subclass of a layer for checkpointing; that is no forward of its own."""
    model = BY_NAME["ViTModel"].build()
    with tokenmerge.patched(model, r=R):
        expected = model(**IMAGES).last_hidden_state
    model.layers[1].__class__ = OwnName
    with tokenmerge.patched(model, r=R):
        assert torch.equal(model(**IMAGES).last_hidden_state, expected)


def test_llava_that_puts_layers_side_by_side_needs_every_token() -> None:
    """Merged, the layers would have other numbers of tokens."""
    model = lively(llava(vision_feature_layer=[-2, -1]))
    with pytest.raises(ConfigError, match="several layers side by side"):
        tokenmerge.patch(model, r=3, output="merged")
    tokenmerge.patch(model, r=3)
    with torch.no_grad():
        assert model(**IMAGES, input_ids=prompt(36)).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_large_grid_of_rotary_positions_in_half_precision_is_no_fault(dtype: torch.dtype) -> None:
    """`model.half()` rounds the angles that Pixtral keeps, too: far from the corner they are off by more than its table is."""
    config = hf.PixtralVisionConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        image_size=1540,
        patch_size=14,
    )
    tokenmerge.patch(hf.PixtralVisionModel(config).eval().to(dtype), r=3)
