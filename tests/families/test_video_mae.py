"""The paper's video model: its arithmetic in loops, its merging against the oracle, its authors' names of weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import tokenmerge
from tests.helpers.oracle import oracle
from tests.helpers.tiny import randomize
from tokenmerge.errors import InputError
from tokenmerge.models import video_mae
from tokenmerge.tools.common import DeviceOptions
from tokenmerge.tools.models import load_checkpoint, load_model

SMALL: dict[str, Any] = {"img_size": 64, "num_frames": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}


def build(**more: Any) -> Any:
    """A small model with lively random weights, in evaluation mode."""
    torch.manual_seed(0)
    model: Any = timm.create_model("video_mae_vit_large_patch16_224", **{**SMALL, **more})
    model.eval()
    randomize(model)
    return model


def clips(model: Any, batch: int = 2) -> Tensor:
    embed = model.patch_embed
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, embed.num_frames, 3, *embed.img_size, generator=generator)


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def in_loops(weights: dict[str, Tensor], clip: Tensor, depth: int, heads: int) -> Tensor:
    """The logits of one clip `[T, 3, H, W]`, from the description in arXiv 2205.09113 and weights with the authors' names."""
    kernel = weights["patch_embed.proj.weight"]
    _, _, moments, height, width = kernel.shape
    frames, _, rows, columns = clip.shape
    tokens = []
    for t in range(frames // moments):
        for place, (i, j) in enumerate((i, j) for i in range(rows // height) for j in range(columns // width)):
            rows_here, columns_here = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            tubelet = clip[t * moments : (t + 1) * moments, :, rows_here, columns_here].transpose(0, 1)
            token = kernel.flatten(1) @ tubelet.flatten() + weights["patch_embed.proj.bias"]
            tokens.append(token + weights["pos_embed_spatial"][0, place] + weights["pos_embed_temporal"][0, t])
    first = weights["cls_token"][0, 0] + weights["pos_embed_class"][0, 0]
    x = torch.stack([first, *tokens])
    for index in range(depth):
        block = f"blocks.{index}"
        inside = norm(x, weights, f"{block}.norm1")
        query, key, value = (linear(inside, weights, f"{block}.attn.{part}") for part in "qkv")
        side = x.shape[1] // heads
        found = []
        for head in range(heads):
            part = slice(head * side, (head + 1) * side)
            share = (query[:, part] @ key[:, part].T / side**0.5).softmax(dim=1)
            found.append(share @ value[:, part])
        x = x + linear(torch.cat(found, dim=1), weights, f"{block}.attn.proj")
        inside = F.gelu(linear(norm(x, weights, f"{block}.norm2"), weights, f"{block}.mlp.fc1"))
        x = x + linear(inside, weights, f"{block}.mlp.fc2")
    return linear(norm(x[1:].mean(dim=0), weights, "norm"), weights, "head")


@torch.no_grad()
def test_the_paper_in_loops() -> None:
    model = build().double()
    x = clips(model).double()
    weights = video_mae.to_published(model.state_dict())
    expected = torch.stack([in_loops(weights, clip, 3, 3) for clip in x])
    original = model(x)
    assert (original - expected).abs().max() < 1e-9
    model, x = model.float(), x.float()
    original = model(x)
    assert (original - expected).abs().max() < 1e-6 * float(expected.abs().max().clamp_min(1))
    with tokenmerge.patched(model, r=0):
        assert torch.equal(model(x), original)


@torch.no_grad()
@pytest.mark.parametrize("prop_attn", [True, False])
def test_the_oracle(prop_attn: bool) -> None:
    model = build()
    check(model, clips(model), (5, 0, 9), prop_attn)


@pytest.mark.slow
@torch.no_grad()
def test_the_oracle_on_all_tokens_of_the_paper() -> None:
    """16 frames of 224 pixels are 1,568 tokens and a class token, and r=65."""
    model = build(img_size=224, num_frames=16, depth=2)
    check(model, clips(model, 1), (65, 65), False)


def check(model: Any, x: Tensor, schedule: tuple[int, ...], prop_attn: bool) -> None:
    original = model(x)
    with tokenmerge.patched(model, r=list(schedule), prop_attn=prop_attn, trace=True) as handle:
        merged = model(x)
        source, grid = handle.trace.source(), handle.trace.known_grid
        features = model.forward_features(x)
        maps = handle.trace.to_grid(features)
    assert features.shape[1] == model.patch_embed.num_patches + 1 - sum(schedule)
    assert grid == tuple(model.patch_embed.grid_size)
    assert maps.shape == (len(x), model.embed_dim, *grid)
    with oracle(model, schedule, 1, prop_attn) as hooks:
        expected = model(x)
    assert hooks.source is not None
    assert torch.equal(source, hooks.source)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert (merged - original).abs().max() > 1e-3 * original.abs().max()
    assert torch.equal(model(x), original)


def test_sizes_of_the_paper() -> None:
    """1,568 tokens of 2×16×16, 24 blocks, 304 M parameters and 598 GFLOPs, as the paper states them for 400 classes."""
    with torch.device("meta"):
        model: Any = timm.create_model("video_mae_vit_large_patch16_224")
    cost = tokenmerge.patching.model_cost(model)
    assert (cost.tokens, cost.protected, len(model.blocks)) == (1569, 1, 24)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(304, abs=1)
    assert cost.total() / 1e9 == pytest.approx(598, abs=1)


def test_proportional_attention_is_off_as_published() -> None:
    model = build()
    assert "off" in str(tokenmerge.patch(model, r=2).summary())


# --- the authors' names of weights ----------------------------------------------------------------------------


def published(model: Any, seed: int = 3) -> dict[str, Tensor]:
    """A made-up state dict with the authors' names: separate q, k, v, and `norm` after the mean."""
    width, hidden = model.embed_dim, 4 * model.embed_dim
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed_spatial": (1, 16, width),
        "pos_embed_temporal": (1, 4, width),
        "pos_embed_class": (1, 1, width),
        "patch_embed.proj.weight": (width, 3, 2, 16, 16),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (7, width),
        "head.bias": (7,),
    }
    for index in range(3):
        for name, sides in (
            *((f"attn.{part}", (width, width)) for part in ("q", "k", "v", "proj")),
            ("mlp.fc1", (hidden, width)),
            ("mlp.fc2", (width, hidden)),
        ):
            shapes |= {f"blocks.{index}.{name}.weight": sides, f"blocks.{index}.{name}.bias": sides[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{index}.{name}.weight": (width,), f"blocks.{index}.{name}.bias": (width,)}
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("wrapper", ["", "model", "model_state"])
@torch.no_grad()
def test_checkpoints_of_the_authors(tmp_path: Path, wrapper: str) -> None:
    model = build()
    state = published(model)
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "theirs.pth")
    load_checkpoint(model, tmp_path / "theirs.pth")
    x = clips(model, 1)
    torch.testing.assert_close(model(x)[0], in_loops(state, x[0], 3, 3), rtol=1e-4, atol=1e-5)
    again = video_mae.to_published(model.state_dict())
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    back = video_mae.from_published(again)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], own) for name, own in model.state_dict().items())
    whole = {**model.state_dict()}
    twice = video_mae.from_published(whole)
    assert all(torch.equal(twice[name], own) for name, own in whole.items()), "our own names stay as they are"


def test_checkpoints_of_pre_training_get_a_new_head_for_training_only(tmp_path: Path) -> None:
    model = build()
    state = {name: one for name, one in published(model).items() if not name.startswith("head.")}
    state |= {"mask_token": torch.zeros(1, 1, 8), "decoder_blocks.0.attn.q.weight": torch.zeros(8, 8)}
    torch.save(state, tmp_path / "pretrained.pth")
    with pytest.raises(InputError, match=r"2 missing such as head\.bias"):
        load_checkpoint(model, tmp_path / "pretrained.pth")
    before = copy.deepcopy(model.head)
    load_checkpoint(model, tmp_path / "pretrained.pth", new_head=True)
    assert torch.equal(model.head.weight, before.weight)
    assert torch.equal(model.fc_norm.weight, state["norm.weight"])
    del state["blocks.1.attn.k.bias"]
    torch.save(state, tmp_path / "pretrained.pth")
    with pytest.raises(InputError, match=r"holds blocks\.1\.attn\.[qv]\.bias, but not all of"):
        load_checkpoint(model, tmp_path / "pretrained.pth", new_head=True)


def test_a_classifier_of_other_classes_starts_anew_for_training_only(tmp_path: Path) -> None:
    model = build()
    torch.save({**published(model), "head.weight": torch.zeros(9, 48), "head.bias": torch.zeros(9)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="2 of another shape such as head"):
        load_checkpoint(model, tmp_path / "a.pth")
    load_checkpoint(model, tmp_path / "a.pth", new_head=True)
    assert model.head.weight.shape == (7, 48)


# --- a model like any other -----------------------------------------------------------------------------------


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path) -> None:
    model = build()
    x = clips(model)
    tokenmerge.patch(model, r=5)
    expected = model(x)
    tokenmerge.save(model, tmp_path / "saved", model_args=SMALL)
    assert torch.equal(tokenmerge.load(tmp_path / "saved")(x), expected)
    unmerged = load_model(DeviceOptions(model=f"local-dir:{tmp_path / 'saved'}"), head="videos")
    assert torch.equal(unmerged(x), build()(x))


def test_gradients_and_compiled_blocks() -> None:
    model = build()
    x = clips(model)
    tokenmerge.patch(model, r=5)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model(torch.zeros(1, 3, 8, 64, 64)), r"clips of shape \(1, 3, 8, 64, 64\) were given, but"),
        (lambda model: model(torch.zeros(1, 8, 3, 32, 32)), "was expected: give such clips, or create the model"),
        (lambda model: model.forward_intermediates(torch.zeros(1, 8, 3, 64, 64)), "use forward_features"),
        (lambda model: model.set_input_size(img_size=32), "create the model with other img_size"),
        (lambda model: build(num_frames=7), "but multiples of these were expected: change num_frames"),
        (lambda model: tokenmerge.patch(model, r=2).summary(input_size=(16, 64, 64)), "takes clips of 8×64×64"),
    ],
)
def test_errors(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(build())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "video_mae:vit_lage_patch16_224"}, r"did you mean vit_large_patch16_224\?"),
        ({"model": "video_mae:vit_tiny_patch16_224", "pretrained": True}, "give the authors' file with --checkpoint"),
        ({"model": "video_mae:."}, "give local-dir:."),
        ({"model": "video_mae:"}, "nothing after video_mae:"),
    ],
)
def test_errors_of_names(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_model(DeviceOptions(**options))
