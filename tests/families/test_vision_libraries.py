"""torchvision and open_clip: the same battery as every other row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer as ClipTower
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import VisionTransformer

import tokenmerge
from tests.helpers.tiny import randomize
from tests.helpers.tower_oracle import tower_oracle

SCHEDULE = (3, 0, 4)
_CLIP = {
    "image_size": 96,
    "patch_size": 16,
    "width": 48,
    "layers": 3,
    "heads": 4,
    "mlp_ratio": 2.0,
    "output_dim": 24,
}
MODELS: dict[str, Callable[[], Any]] = {
    "torchvision": lambda: VisionTransformer(96, 16, 3, 4, 48, 96, num_classes=5),
    "torchvision-two-layer-head": lambda: VisionTransformer(96, 16, 3, 4, 48, 96, num_classes=5, representation_size=7),
    "clip-token": lambda: ClipTower(**_CLIP),
    "clip-average": lambda: ClipTower(**_CLIP, pool_type="avg", ls_init_value=0.5),
    "clip-all-tokens": lambda: ClipTower(**_CLIP, output_tokens=True),
    "clip-attention-pool": lambda: ClipTower(
        **_CLIP, attentional_pool=True, attn_pooler_queries=8, attn_pooler_heads=4
    ),
    "clip-custom": lambda: ClipTower(
        **_CLIP, block_type="custom", qk_norm=True, scale_attn=True, scale_fc=True, scale_heads=True
    ),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def build(name: str) -> Any:
    """The model with lively random weights, in evaluation mode."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    randomize(model)
    return model


def images(batch: int = 2) -> Tensor:
    """Random images of 96 pixels."""
    return torch.randn(batch, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def outputs(model: Any, x: Tensor) -> list[Tensor]:
    """Everything the model returns."""
    out = model(x)
    return list(out) if isinstance(out, tuple) else [out]


def blocks(model: Any) -> list[Any]:
    """Its blocks."""
    path = "encoder.layers" if isinstance(model, VisionTransformer) else "transformer.resblocks"
    return list(attrgetter(path)(model))


def keys(block: Any, note: Callable[[Tensor], None]) -> list[Any]:
    """Hooks that show K `[B, N, H, D]`."""
    attention = block.self_attention if hasattr(block, "self_attention") else block.attn
    if hasattr(attention, "ln_k"):
        return [attention.ln_k.register_forward_hook(lambda m, a, out: note(out.transpose(1, 2)))]

    def from_input(module: Any, args: Any, kwargs: Any) -> None:
        rows = slice(48, 96)
        key = F.linear(args[0], attention.in_proj_weight[rows], attention.in_proj_bias[rows])
        note(key.unflatten(2, (4, -1)))

    return [attention.register_forward_pre_hook(from_input, with_kwargs=True)]


@EVERY
@torch.no_grad()
def test_upstream_at_r0_and_the_oracle_above(name: str) -> None:
    model, x = build(name), images()
    original = outputs(model, x)
    with tokenmerge.patched(model, r=0):
        assert all(torch.equal(a, b) for a, b in zip(outputs(model, x), original, strict=True))
    with tokenmerge.patched(model, r=list(SCHEDULE), trace=True) as handle:
        merged, source = outputs(model, x), handle.trace.source()
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, x), original, strict=True))
    with tower_oracle(blocks(model), "ln_2", keys, SCHEDULE, 1) as wanted:
        expected = outputs(model, x)
    assert wanted.source is not None
    assert torch.equal(source, wanted.source)
    for a, b, o in zip(merged, expected, original, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
        assert (b - o).abs().max() > 1e-3 * o.abs().max()


@EVERY
@torch.no_grad()
def test_copies_single_images_half_precision_and_compiled_blocks(name: str) -> None:
    model, x = build(name), images(1)
    with tokenmerge.patched(model, r=list(SCHEDULE)):
        twin = copy.deepcopy(model)
        wanted = outputs(model, x)
        assert all(torch.equal(a, b) for a, b in zip(outputs(twin, x), wanted, strict=True))
        torch._dynamo.reset()
        list(blocks(twin))[-1].compile(fullgraph=True, backend="aot_eager")  # it takes sizes and merges
        for a, b in zip(outputs(twin, x), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        with torch._dynamo.config.patch(error_on_recompile=True):
            outputs(twin, x)
    half = build(name).bfloat16()
    tokenmerge.patch(half, r=list(SCHEDULE))
    assert all(out.isfinite().all() for out in outputs(half, x.bfloat16()))


@EVERY
def test_gradients_with_checkpointed_blocks_and_two_views(name: str) -> None:
    model = build(name).train()
    tokenmerge.patch(model, r=list(SCHEDULE))
    first, second = images(), images().flip(-1)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        views = [outputs(model, view)[0] for view in (first, second)]
        (views[0].square().mean() + views[1].square().mean()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = gradients()
    for block in blocks(model):
        forward = block.forward
        block.forward = lambda x, *a, forward=forward, **k: torch.utils.checkpoint.checkpoint(
            forward, x, *a, use_reentrant=False, **k
        )
    for a, b in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_intermediates_of_open_clip_are_full_maps() -> None:
    model = build("clip-average")
    plain = model.forward_intermediates(images())
    with tokenmerge.patched(model, r=4):
        merged = model.forward_intermediates(images())
    assert [m.shape for m in merged["image_intermediates"]] == [m.shape for m in plain["image_intermediates"]]


@torch.no_grad()
def test_zero_shot_classification_with_a_whole_clip() -> None:
    """The image tower merges, the text tower is left alone, and probabilities stay close."""
    vision = {"image_size": 96, "patch_size": 16, "width": 64, "layers": 3, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 2, "layers": 2}
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).eval()
    tokens = torch.randint(1, 99, (3, 16))
    words = F.normalize(model.encode_text(tokens), dim=-1)

    def probabilities() -> Tensor:
        seen = F.normalize(model.encode_image(images()), dim=-1)
        chances: Tensor = (model.logit_scale.exp() * seen @ words.T).softmax(-1)
        return chances

    before = probabilities()
    handle = tokenmerge.patch(model, r=2)
    after = probabilities()
    assert handle.summary().blocks == 3
    assert torch.equal(F.normalize(model.encode_text(tokens), dim=-1), words)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, atol=0.1, rtol=0)
    tokenmerge.unpatch(model)
    assert torch.equal(probabilities(), before)


def test_what_is_refused() -> None:
    cosine = ClipTower(**_CLIP, block_type="custom", scaled_cosine_attn=True)
    with pytest.raises(tokenmerge.UnsupportedModelError, match="scaled cosine"):
        tokenmerge.patch(cosine, r=2)
    with pytest.raises(tokenmerge.ConfigError, match=r"without sizes.*use output='full'"):
        tokenmerge.patch(build("clip-average"), r=2, output="merged")


@pytest.mark.parametrize("name", ["vit_b_32", "vit_b_16:IMAGENET1K_SWAG_E2E_V1"])
def test_torchvisions_weights_bring_their_preprocessing(name: str, tmp_path: Path) -> None:
    """What `eval` and `compare` feed a model is what torchvision's own transform makes of the file."""
    from PIL import Image

    from tokenmerge.errors import InputError
    from tokenmerge.tools.common import ModelOptions
    from tokenmerge.tools.eval import EvalOptions
    from tokenmerge.tools.eval.data import make_dataset
    from tokenmerge.tools.inputs import class_names, num_classes
    from tokenmerge.tools.media import IMAGES
    from tokenmerge.tools.models import skeleton

    model = skeleton(ModelOptions(model=f"torchvision:{name}"))
    (tmp_path / "tench").mkdir()
    noise = torch.randint(0, 256, (301, 420, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "tench" / "a.png")
    dataset = make_dataset(model, EvalOptions(model="m", r=[0], data=tmp_path), IMAGES)
    wanted = model.weights.transforms()(Image.open(tmp_path / "tench" / "a.png"))
    assert wanted.shape[1] == model.image_size
    torch.testing.assert_close(dataset[0][0], wanted, atol=1e-5, rtol=1e-5)
    assert num_classes(model) == 1000
    assert (class_names(model) or [""])[0] == "tench"
    with pytest.raises(InputError, match="has no weights 'NOPE'"):
        skeleton(ModelOptions(model="torchvision:vit_b_32:NOPE"))
