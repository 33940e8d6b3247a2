"""Classifiers, retrieval models, backbones and language models of transformers, patched as the wholes that users hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tokenmerge
from tests.helpers.tiny import randomize
from tokenmerge.patching.block import MergeBlock
from tokenmerge.patching.hooks import CarryThrough

hf: Any = transformers  # its configs have annotations that `**fields` cannot meet
R = [3, 0, 4]
SMALL: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
IMAGE = {**SMALL, "image_size": 96, "patch_size": 16}
VIDEO = {**SMALL, "image_size": 64, "patch_size": 16, "num_frames": 4, "tubelet_size": 2}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = {**SMALL, **SPECIAL, "vocab_size": 99, "max_position_embeddings": 80}
LABELS = {"num_labels": 7}
IMAGE_TOKEN = 98


def noise(*shape: int, seed: int = 1) -> Tensor:
    """The same random numbers each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IDS = torch.arange(3, 11).expand(2, -1)
IMAGES = {"pixel_values": noise(2, 3, 96, 96)}
CLIPS = noise(2, 4, 3, 64, 64)


def lively(model: Any) -> Any:
    """The model with random weights that all matter, in evaluation mode."""
    randomize(model)
    return model.eval()


def weighted(tokens: Tensor, size: Tensor, prefix: int = 0) -> Tensor:
    """What a mean over all patches is when each merged token counts as many times as it has patches."""
    size = size[:, prefix:, None]
    return (tokens[:, prefix:] * size).sum(1) / size.sum(1)


@dataclasses.dataclass(frozen=True)
class Whole:
    """A model around a tower."""

    build: Callable[[], Any]
    tower: str  # path to what is patched
    layers: str  # path to its layers
    feed: dict[str, Tensor]
    result: str = "logits"  # the output that must change when tokens merge
    mean: Callable[[Any, Tensor, Tensor], Tensor] | None = None  # model, merged tokens, sizes -> result
    maps: str = "hidden_states"  # the output that holds all layers of the tower

    def make(self) -> Any:
        """The model with lively weights, in evaluation mode."""
        return lively(self.build())

    def tower_of(self, model: Any) -> Any:
        """What is patched."""
        return model.get_submodule(self.tower)

    def run(self, model: Any, **further: Any) -> Tensor:
        """The result."""
        result: Tensor = model(**self.feed, **further)[self.result]
        return result


def of(cls: str, config: str, **fields: Any) -> Callable[[], Any]:
    """A model of transformers, by name."""
    return lambda: getattr(hf, cls)(getattr(hf, config)(**fields))


def _siglip2_feed() -> dict[str, Tensor]:
    """Two images, of 4×5 and 3×4 patches, the second padded to 20."""
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 12:] = 0
    shapes = torch.tensor([[4, 5], [3, 4]])
    return {"pixel_values": noise(2, 20, 768), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def llava(**fields: Any) -> Any:
    """LLaVA: a CLIP tower whose tokens become words of a Llama."""
    parts = {"vision_config": hf.CLIPVisionConfig(**IMAGE), "text_config": hf.LlamaConfig(**TEXT)}
    return of("LlavaForConditionalGeneration", "LlavaConfig", **parts, image_token_index=IMAGE_TOKEN, **fields)()


def prompt(image_tokens: int) -> Tensor:
    """Words, as many places for image features, and words again."""
    return torch.cat([IDS, torch.full((2, image_tokens), IMAGE_TOKEN), IDS], dim=1)


def _mean(prefix: int = 0, norm: str = "") -> Callable[[Any, Tensor, Tensor], Tensor]:
    """A head that averages all tokens but the prefix, norms them and classifies."""

    def head(model: Any, x: Tensor, size: Tensor) -> Tensor:
        pooled = weighted(x, size, prefix)
        return model.classifier(attrgetter(norm)(model)(pooled) if norm else pooled)  # type: ignore[no-any-return]

    return head


def _dinov2_head(model: Any, x: Tensor, size: Tensor) -> Tensor:
    return model.classifier(torch.cat([x[:, 0], weighted(x, size, 1)], dim=1))  # type: ignore[no-any-return]


_TWO = {"text_config": TEXT, "vision_config": IMAGE}
_NAFLEX = {"text_config": TEXT, "vision_config": {**SMALL, "patch_size": 16, "num_patches": 16}}
_BLIP = {"text_config": {**TEXT, "encoder_hidden_size": 48, "sep_token_id": 2}, "vision_config": IMAGE}
_VJEPA = {
    **SMALL, **LABELS, "crop_size": 64, "patch_size": 16, "frames_per_clip": 4, "tubelet_size": 2, "num_pooler_layers": 1,
    "pred_hidden_size": 48, "pred_num_attention_heads": 4, "pred_num_hidden_layers": 1,
}  # fmt: skip
_AST = {**SMALL, **LABELS, "max_length": 64, "num_mel_bins": 48, "frequency_stride": 16, "time_stride": 10}
_MAE = {f"decoder_{name}": value for name, value in SMALL.items()}
_WHISPER = {
    **SPECIAL, "d_model": 48, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 96,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "decoder_start_token_id": 1,
    "max_source_positions": 40, "max_target_positions": 20, "vocab_size": 99,
    "suppress_tokens": [], "begin_suppress_tokens": [],
}  # fmt: skip
_BOTH = {**IMAGES, "input_ids": IDS}
_VIDEO = {"pixel_values": CLIPS}
_CLIP = ("vision_model", "encoder.layers")
_LABELLED = {**IMAGE, **LABELS}

WHOLES: dict[str, Whole] = {
    "vit": Whole(of("ViTForImageClassification", "ViTConfig", **_LABELLED), "vit", "layers", IMAGES),
    "deit": Whole(
        of("DeiTForImageClassificationWithTeacher", "DeiTConfig", **_LABELLED), "deit", "layers", IMAGES),
    "dinov2": Whole(of("Dinov2ForImageClassification", "Dinov2Config", **_LABELLED),
                    "dinov2", "encoder.layer", IMAGES, mean=_dinov2_head),
    "ijepa": Whole(of("IJepaForImageClassification", "IJepaConfig", **_LABELLED), "ijepa", "layers", IMAGES, mean=_mean()),
    "beit": Whole(of("BeitForImageClassification", "BeitConfig", **_LABELLED, use_mean_pooling=True, use_relative_position_bias=True),
                  "beit", "layers", IMAGES, mean=_mean(1, "beit.pooler.layernorm")),
    "siglip": Whole(of("SiglipForImageClassification", "SiglipConfig", **_TWO, **LABELS), *_CLIP, IMAGES, mean=_mean()),
    "siglip2": Whole(of("Siglip2ForImageClassification", "Siglip2Config", **_NAFLEX, **LABELS),
                     *_CLIP, _siglip2_feed(), mean=_mean()),
    "clip-mean": Whole(of("CLIPForImageClassification", "CLIPConfig", **_TWO, **LABELS), *_CLIP, IMAGES, mean=_mean(1)),
    "videomae-mean": Whole(of("VideoMAEForVideoClassification", "VideoMAEConfig", **VIDEO, **LABELS, use_mean_pooling=True),
                           "videomae", "encoder.layer", _VIDEO, mean=_mean(0, "fc_norm")),
    "videomae-first": Whole(of("VideoMAEForVideoClassification", "VideoMAEConfig", **VIDEO, **LABELS, use_mean_pooling=False),
                            "videomae", "encoder.layer", _VIDEO),
    "vivit": Whole(of("VivitForVideoClassification", "VivitConfig", **{**VIDEO, "tubelet_size": [2, 16, 16]}, **LABELS),
                   "vivit", "layers", _VIDEO),
    "vjepa2": Whole(of("VJEPA2ForVideoClassification", "VJEPA2Config", **_VJEPA),
                    "vjepa2", "encoder.layer", {"pixel_values_videos": CLIPS}),
    "ast": Whole(of("ASTForAudioClassification", "ASTConfig", **_AST),
                 "audio_spectrogram_transformer", "layers", {"input_values": noise(2, 64, 48)}),
    "vit-mae": Whole(of("ViTMAEForPreTraining", "ViTMAEConfig", **IMAGE, **_MAE, mask_ratio=0.75),
                     "vit", "layers", {**IMAGES, "noise": noise(2, 36)}),
    "clip": Whole(of("CLIPModel", "CLIPConfig", **_TWO), *_CLIP, _BOTH, "logits_per_image", maps=""),
    "siglip-text": Whole(of("SiglipModel", "SiglipConfig", **_TWO), *_CLIP, _BOTH, "logits_per_image", maps=""),
    "blip": Whole(of("BlipForImageTextRetrieval", "BlipConfig", **_BLIP),
                  *_CLIP, {**_BOTH, "attention_mask": torch.ones_like(IDS)}, "itm_score", maps=""),
    "whisper": Whole(of("WhisperForConditionalGeneration", "WhisperConfig", **_WHISPER), "model.encoder", "layers",
                     {"input_features": noise(2, 80, 80), "decoder_input_ids": IDS}, maps="encoder_hidden_states"),
    "llava": Whole(llava, "model.vision_tower", "encoder.layers", {**IMAGES, "input_ids": prompt(36)}, maps=""),
}  # fmt: skip
"""What users hold: the model, where its tower is, and what it is fed."""

_MAPPED = {name: whole for name, whole in WHOLES.items() if whole.maps}
MAPPED = pytest.mark.parametrize("whole", _MAPPED.values(), ids=_MAPPED.keys())
EVERY = pytest.mark.parametrize("whole", WHOLES.values(), ids=WHOLES.keys())


def tensors(output: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, hf.utils.ModelOutput):
        output = output.to_tuple()
    return [t for part in output for t in tensors(part)] if isinstance(output, list | tuple) else []


def one_of_each(full: Tensor, source: Tensor, tokens: int) -> Tensor:
    """`[B, N0, C]` -> `[B, N, C]`: the tokens that were spread over the originals by `source`."""
    merged = full.new_zeros(full.shape[0], tokens, full.shape[2])
    return merged.scatter(1, source.unsqueeze(2).expand_as(full), full)


@EVERY
def test_only_the_layers_of_the_tower_are_patched(whole: Whole) -> None:
    """Text towers, decoders, predictors and heads keep their classes, and unpatching leaves nothing behind."""
    model = whole.make()
    before = {name: type(module) for name, module in model.named_modules()}
    handle = tokenmerge.patch(model, r=2)
    assert tokenmerge.is_patched(model)
    assert handle.summary().blocks == 3
    assert tokenmerge.handle_of(model).config == handle.config
    merging = [module for module in model.modules() if isinstance(module, MergeBlock)]
    layers = list(attrgetter(whole.layers)(whole.tower_of(model)))
    assert [id(module) for module in merging] == [id(layer) for layer in layers]
    inside = tuple(f"{whole.tower}.{whole.layers}.{index}" for index in range(3))
    for name, module in model.named_modules():
        if isinstance(module, CarryThrough):  # the tower's final norm
            assert name.rpartition(".")[0] in (whole.tower, f"{whole.tower}.encoder")
        else:
            assert type(module) is before[name] or name.startswith(inside), name
    tokenmerge.unpatch(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


@EVERY
@torch.no_grad()
def test_r0_is_upstream_and_merging_keeps_every_shape(whole: Whole) -> None:
    """At r=0 every output is upstream's to the bit; above, the result changes, in upstream's shapes, finite."""
    model = whole.make()
    original = model(**whole.feed)
    handle = tokenmerge.patch(model, r=0)
    same = model(**whole.feed)
    for ours, theirs in zip(tensors(same), tensors(original), strict=True):
        assert torch.equal(ours, theirs)
    handle.update(r=R, prop_attn=True)
    merged = model(**whole.feed)
    for ours, theirs in zip(tensors(merged), tensors(original), strict=True):
        assert ours.shape == theirs.shape
        assert ours.isfinite().all()
    change = (merged[whole.result] - original[whole.result]).abs().max()
    assert change > 1e-4 * original[whole.result].abs().max()
    handle.remove()
    assert torch.equal(model(**whole.feed)[whole.result], original[whole.result])


@EVERY
@torch.no_grad()
def test_eager_and_sdpa_agree(whole: Whole) -> None:
    """Both carry the sizes; the choice may change while the model is patched."""
    model, found = whole.make(), []
    with tokenmerge.patched(model, r=R, prop_attn=True):
        for name in ("eager", "sdpa"):
            model.set_attn_implementation(name)
            found.append(whole.run(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5 * float(found[1].abs().max()))


@pytest.mark.parametrize("name", [name for name, whole in WHOLES.items() if whole.mean is not None])
@torch.no_grad()
def test_a_mean_over_all_patches_is_the_size_weighted_mean_of_merged_tokens(name: str) -> None:
    """Heads that average know nothing of sizes; they must get the mean that knows them."""
    whole = WHOLES[name]
    assert whole.mean is not None
    model = whole.make()
    with tokenmerge.patched(model, r=[9, 5, 2], prop_attn=True, trace=True) as handle:
        logits = whole.run(model)
        full = whole.tower_of(model)(**whole.feed).last_hidden_state
        source, size = handle.trace.source(), handle.trace.size()
    assert size.shape[1] == full.shape[1] - 16
    padded = whole.feed.get("pixel_attention_mask", torch.ones(full.shape[:2])).float()
    assert torch.equal(torch.zeros_like(size).scatter_add(1, source, padded), size)
    merged = one_of_each(full, source, size.shape[1])
    assert torch.equal(merged.gather(1, source.unsqueeze(2).expand_as(full)), full)  # equal tokens are equal
    torch.testing.assert_close(logits, whole.mean(model, merged, size), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip-text"])
@torch.no_grad()
def test_image_features(name: str) -> None:
    """`get_image_features` without the text tower: upstream's at r=0, and what the full forward uses above."""
    model = WHOLES[name].make()
    original = model.get_image_features(**IMAGES).pooler_output
    with tokenmerge.patched(model, r=0) as handle:
        assert torch.equal(model.get_image_features(**IMAGES).pooler_output, original)
        handle.update(r=R)
        merged = model.get_image_features(**IMAGES).pooler_output
        embedded = model(**WHOLES[name].feed).image_embeds
    assert merged.shape == original.shape
    assert not torch.allclose(merged, original, atol=1e-4)
    torch.testing.assert_close(merged / merged.norm(dim=-1, keepdim=True), embedded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "beams"), [("whisper", 1), ("whisper", 2), ("llava", 1)])
@torch.no_grad()
def test_generate(name: str, beams: int) -> None:
    """Generation reads the encoder once and steps with a cache: the same words at r=0, and words at all above."""
    whole = WHOLES[name]
    model, feed = whole.make(), {k: v for k, v in whole.feed.items() if k != "decoder_input_ids"}
    words: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    original = model.generate(**feed, **words)
    with tokenmerge.patched(model, r=0) as handle:
        assert torch.equal(model.generate(**feed, **words), original)
        handle.update(r=R)
        merged = model.generate(**feed, **words)
    assert merged.shape[0] == 2
    assert merged.shape[1] <= original.shape[1]
    assert int(merged.max()) < 99


@MAPPED
@torch.no_grad()
def test_hidden_states_are_full_maps(whole: Whole) -> None:
    """Asked for by argument or by config, every map has all tokens, merged ones spread, and the result is the same."""
    model = whole.make()
    original = model(**whole.feed, output_hidden_states=True)[whole.maps]
    with tokenmerge.patched(model, r=R, prop_attn=True, trace=True) as handle:
        plain = whole.run(model)
        asked = model(**whole.feed, output_hidden_states=True)
        sources = [handle.trace.source(index) for index in range(3)]
        for config in (model.config, whole.tower_of(model).config):
            config.output_hidden_states = True
        configured = model(**whole.feed)[whole.maps]
    assert torch.equal(asked[whole.result], plain)
    maps = asked[whole.maps]
    assert [h.shape for h in maps] == [h.shape for h in original]
    assert torch.equal(maps[0], original[0])
    for full, source in zip(maps[1:-1], sources[:-1], strict=True):
        tokens = int(source.max()) + 1
        assert tokens == full.shape[1] - 3
        again = one_of_each(full, source, tokens).gather(1, source.unsqueeze(2).expand_as(full))
        assert torch.equal(again, full)
    assert all(torch.equal(a, b) for a, b in zip(configured, maps, strict=True))


@pytest.mark.parametrize("wanted", [-1, 1, [0, -2]])
@torch.no_grad()
def test_selected_hidden_states(wanted: int | list[int]) -> None:
    """transformers lets callers ask for single layers by number, as LLaVA does: those maps, and no others."""
    model = WHOLES["clip"].tower_of(WHOLES["clip"].make())

    def maps(which: bool | int | list[int]) -> Any:
        return model(**IMAGES, output_hidden_states=which).hidden_states

    def found(chosen: Any, every: Any) -> dict[int, int]:
        """Place among the chosen maps -> place among all of them."""
        return {
            i: next(j for j, h in enumerate(every) if torch.equal(h, one))
            for i, one in enumerate(chosen)
            if one is not None
        }

    upstream = found(maps(wanted), maps(True))  # older versions give all maps for one number, and count otherwise
    with tokenmerge.patched(model, r=R):
        assert found(maps(wanted), maps(True)) == upstream


@MAPPED
@torch.no_grad()
def test_attentions_are_those_of_the_merged_tokens(whole: Whole) -> None:
    """`[B, H, N, N]` for the tokens that enter each layer; rows are probabilities, and sizes are in them."""
    model = whole.make()
    model.set_attn_implementation("eager")
    name = whole.maps.replace("hidden_states", "attentions")
    with tokenmerge.patched(model, r=R, prop_attn=True) as handle:
        weights = model(**whole.feed, output_attentions=True)[name]
        handle.update(prop_attn=False)
        flat = model(**whole.feed, output_attentions=True)[name]
    first = weights[0].shape[2]
    assert [w.shape[1:] for w in weights] == [(4, n, n) for n in (first, first - 3, first - 3)]
    for w in weights:
        torch.testing.assert_close(w.sum(dim=-1), torch.ones(w.shape[:3]))
    assert torch.equal(weights[0], flat[0])
    assert not torch.allclose(weights[1], flat[1], atol=1e-4)


@MAPPED
@torch.no_grad()
def test_tuples_instead_of_outputs(whole: Whole) -> None:
    """`return_dict=False` gives the same tensors as a plain tuple."""
    model = whole.make()
    with tokenmerge.patched(model, r=R):
        output = model(**whole.feed)
        found = model(**whole.feed, return_dict=False)
    assert type(found) is tuple
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(output), strict=True))


_STAGES = {**IMAGE, "out_features": ["stem", "stage1", "stage3"]}
_REGISTERS = {**_STAGES, "num_register_tokens": 3}
BACKBONES = {
    "dinov2": of("Dinov2Backbone", "Dinov2Config", **_STAGES),
    "registers": of("Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig", **_REGISTERS),
    "dinov3": of("DINOv3ViTBackbone", "DINOv3ViTConfig", **_REGISTERS, return_class_token=True),
    "dinov3-tokens": of("DINOv3ViTBackbone", "DINOv3ViTConfig", **_STAGES, reshape_hidden_states=False),
    "beit": of("BeitBackbone", "BeitConfig", **_STAGES, reshape_hidden_states=True, use_relative_position_bias=True),
}


@pytest.mark.parametrize("build", BACKBONES.values(), ids=BACKBONES.keys())
@torch.no_grad()
def test_feature_maps_of_backbones(build: Callable[[], Any]) -> None:
    """Detectors and depth models read maps `[B, C, h, w]` of several layers, whatever merges in between."""
    model = lively(build())
    original = tensors(model(**IMAGES))
    with tokenmerge.patched(model, r=0) as handle:
        assert all(torch.equal(a, b) for a, b in zip(tensors(model(**IMAGES)), original, strict=True))
        handle.update(r=R)
        merged = tensors(model(**IMAGES))
        asked = model(**IMAGES, output_hidden_states=True).hidden_states
    assert [t.shape for t in merged] == [t.shape for t in original]
    assert torch.equal(merged[0], original[0])  # the stem: nothing has merged yet
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(merged[1:3], original[1:3], strict=True))
    assert {h.shape[1] for h in asked} == {asked[0].shape[1]}
