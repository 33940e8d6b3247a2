"""Between passes, copies, files and wrappers: what was found by trying to break the others."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tokenmerge
from tests.helpers.tiny import images_for, randomize, tiny
from tests.helpers.towers import BY_NAME
from tokenmerge import ConfigError, InputError, PatchError, UnsupportedModelError


def _torchvision_model() -> Any:
    model = torchvision.models.VisionTransformer(96, 16, 3, 4, 48, 96).eval()
    randomize(model)
    return model


# --- gradient checkpointing ----------------------------------------------------------------------------------


def _slopes(model: Any) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("first", [0, [0, 0, 3], 3])
@pytest.mark.parametrize("then", [0, 5])
def test_a_block_that_runs_again_does_what_it_did(first: Any, then: int) -> None:
    """Updates between a pass and its backward change nothing of it, whether it merged or not."""
    model = tiny("vit_tiny_patch16_224").train()
    images = images_for(model)
    handle = tokenmerge.patch(model, r=first)
    model(images).square().sum().backward()
    wanted = _slopes(model)
    model.zero_grad()
    model.set_grad_checkpointing(True)
    loss = model(images).square().sum()
    handle.update(r=then)
    loss.backward()
    for found, slope in zip(_slopes(model), wanted, strict=True):
        torch.testing.assert_close(found, slope)


def test_backward_leaves_the_trace_alone() -> None:
    model = tiny("vit_tiny_patch16_224").train()
    model.set_grad_checkpointing(True)
    handle = tokenmerge.patch(model, r=3, trace=True, output="full")
    first = model(images_for(model, seed=1)).sum()
    second = model(images_for(model, seed=2)).sum()
    wanted = handle.trace.source()
    (first + second).backward()
    assert torch.equal(handle.trace.source(), wanted)
    loss = model(images_for(model)).sum()
    handle.update(r=1)
    loss.backward()
    with pytest.raises(PatchError, match="no forward pass had run"):
        handle.trace.source()


def test_passes_that_cannot_be_told_apart_are_an_error() -> None:
    model = tiny("vit_tiny_patch16_224")
    handle = tokenmerge.patch(model, r=3)
    tokens = torch.randn(2, 37, 48, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        out: Tensor = checkpoint(model.blocks, x, use_reentrant=False)
        return out

    first = run(tokens)
    again = run(tokens)  # the same settings: there is nothing to tell apart
    (first.square().sum() + again.square().sum()).backward()
    first = run(tokens.clone())
    handle.update(prop_attn=False)
    (first.square().sum() + run(tokens.clone()).square().sum()).backward()
    shared = tokens.clone()
    first = run(shared)
    handle.update(prop_attn=True)
    loss = first.square().sum() + run(shared).square().sum()
    with pytest.raises(PatchError, match="cannot tell them apart"):
        loss.backward()


# --- errors, copies, files -----------------------------------------------------------------------------------


@torch.no_grad()
def test_ctrl_c_leaves_no_wish_behind() -> None:
    """torch calls no hooks after a KeyboardInterrupt, so what a module wished is forgotten when it is gone."""
    collecting, other = BY_NAME["ViTModel"].build(), tiny("vit_tiny_patch16_224")
    tokenmerge.patch(collecting, r=3)
    handle = tokenmerge.patch(other, r=3)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = collecting.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        collecting(torch.randn(1, 3, 96, 96), output_hidden_states=True)
    hook.remove()
    assert other.forward_features(images_for(other)).shape[1] == handle.output_tokens() == 28
    states = collecting(torch.randn(1, 3, 96, 96), output_hidden_states=True).hidden_states
    assert {state.shape[1] for state in states} == {37}


@torch.no_grad()
def test_handles_are_copied_with_their_models() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = tiny("vit_tiny_patch16_224")
            self.handle = tokenmerge.patch(self.vit, r=3)

    holder = Holder()
    again = copy.deepcopy(holder)
    assert again.handle._model is again.vit
    again.handle.update(r=1)
    assert (holder.handle.r, again.handle.r) == (3, 1)
    loaded = pickle.loads(pickle.dumps(holder.handle))
    assert loaded.config == holder.handle.config


@torch.no_grad()
def test_features_are_saved_as_plain_tensors() -> None:
    model = tiny("vit_tiny_patch16_224")
    with tokenmerge.patched(model, r=3, trace=True):
        features = model.forward_features(images_for(model))
        file = io.BytesIO()
        torch.save({"features": features}, file)
        file.seek(0)
        loaded = torch.load(file)["features"]
        assert torch.equal(loaded, features)
        with pytest.raises(InputError, match="carry no token sizes"):
            tokenmerge.token_sizes(loaded)
        assert torch.equal(tokenmerge.token_sizes(copy.deepcopy(features)), tokenmerge.token_sizes(features))


def test_the_users_error_wins() -> None:
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)

    def inside(*_: Any) -> None:
        with tokenmerge.patched(model.blocks[0].mlp, r=1):
            pass

    with pytest.raises(ValueError, match="mine"), tokenmerge.patched(model, r=2):
        raise ValueError("mine")
    hook = model.blocks[1].register_forward_hook(inside)
    with pytest.raises(tokenmerge.TokenMergeError), torch.no_grad():
        model(images)
    hook.remove()
    assert not tokenmerge.is_patched(model)


@torch.no_grad()
def test_blocks_of_another_model_can_be_taken_off() -> None:
    donor, model = tiny("vit_tiny_patch16_224"), tiny("vit_tiny_patch16_224")
    images = images_for(model)
    wanted = model(images)
    tokenmerge.patch(donor, r=3)
    model.blocks[1] = copy.deepcopy(donor.blocks[1])
    tokenmerge.unpatch(model)
    assert torch.equal(model(images), wanted)
    tokenmerge.patch(model, r=3)


@torch.no_grad()
def test_a_compiled_model_notices_blocks_too() -> None:
    for name in ("timm", "transformers"):
        model = tiny("vit_tiny_patch16_224") if name == "timm" else BY_NAME["ViTModel"].build()
        blocks = model.blocks if name == "timm" else model.layers
        tokenmerge.patch(model, r=3)
        torch.compiler.reset()
        compiled: Any = torch.compile(model, backend="eager")
        compiled(torch.randn(1, 3, 96, 96))
        blocks.append(copy.deepcopy(blocks[0]))
        with pytest.raises(Exception, match="unpatch before adding or removing blocks"):
            compiled(torch.randn(1, 3, 96, 96))


# --- counts --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_thresholds_are_calibrated_for_the_tokens_that_came() -> None:
    model = tiny("vit_tiny_patch16_224", dynamic_img_size=True)
    batches = [torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    config = tokenmerge.calibrate(model, batches, keep=0.8)
    with tokenmerge.patched(model, keep=0.8):
        wanted = model.forward_features(batches[0]).shape[1]
    with tokenmerge.patched(model, config) as handle:
        found = sum(model.forward_features(batch).shape[1] for batch in batches) / 3
        with pytest.raises(InputError, match="depends on what is in the images"):
            handle.output_tokens()
        assert "depends on what is in the images" in " ".join(str(handle.summary()).split())
    assert abs(found - wanted) <= 2


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {"flops": 0.8},
        {"keep": [0.9, 0.8, 0.7]},
        {"r": [5, 4, 3]},
        {"matcher": "threshold", "options": {"thresholds": [0.5] * 3}, "r": 3},
    ],
    ids=str,
)
def test_a_pruned_model_is_scheduled_for_the_blocks_it_has(fields: dict[str, Any]) -> None:
    model = tiny("vit_tiny_patch16_224")
    handle = tokenmerge.patch(model, **fields)
    model.prune_intermediate_layers([0, 1])
    model(images_for(model))
    summary = handle.summary()
    assert summary.blocks == len(summary.r) == 2
    if "flops" in fields:
        assert 0.6 < 1 / summary.flops_ratio <= 0.8
    handle.update(trace=True)
    model(images_for(model))


@torch.no_grad()
def test_another_input_size_is_followed() -> None:
    model = tiny("vit_tiny_patch16_224")
    handle = tokenmerge.patch(model, keep=0.8)
    model.set_input_size((128, 128))
    features = model.forward_features(torch.randn(1, 3, 128, 128))
    assert features.shape[1] == handle.output_tokens() == 65 - sum(handle.schedule)


# --- readers -------------------------------------------------------------------------------------------------


class Averages(nn.Module):
    """A module of a user's own around a model, which reads its tokens in its own way."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = (
            self.backbone.forward_features(images) if hasattr(self.backbone, "patch_embed") else self.backbone(images)
        )
        return tokens.mean(1)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_relpos_small_patch16_224"]
)
def test_what_is_not_known_gets_unmerged_tokens(name: str) -> None:
    for pool in ("token", "avg", ""):
        try:
            backbone = tiny(name, global_pool=pool)
        except AssertionError:
            continue
        model = Averages(backbone)
        with tokenmerge.patched(model, r=4, output="full"):
            wanted = model(images_for(backbone))
        with tokenmerge.patched(model, r=4):
            assert torch.equal(model(images_for(backbone)), wanted)
        with pytest.raises(ConfigError, match="how Averages reads its tokens is not known"):
            tokenmerge.patch(model, r=4, output="merged")
        with tokenmerge.patched(nn.Sequential(nn.Identity(), backbone), r=4) as handle:
            assert handle.config.output == "auto"  # a Sequential hands on what its last module gives


@torch.no_grad()
def test_torchvision_inside_a_module_of_ones_own() -> None:
    model = Averages(_torchvision_model())
    with tokenmerge.patched(model, r=4) as handle:
        assert handle.output_tokens() == handle.summary().tokens[0]
    with tokenmerge.patched(_torchvision_model(), r=4) as handle:
        assert handle.output_tokens() < handle.summary().tokens[0]


def test_a_first_patch_is_no_class_token() -> None:
    with pytest.raises(ConfigError, match="it takes the first patch for a class token"):
        tokenmerge.patch(BY_NAME["JanusVisionModel"].build(), r=2, output="merged")


# --- layers of other kinds -----------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A low-rank adapter around a linear layer, without the attributes of one."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + self.up(self.down(x))
        return out


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny("vit_tiny_patch16_224"),
        lambda: tiny("cait_xxs24_224"),
        lambda: tiny("vit_relpos_small_patch16_224"),
        lambda: tiny("eva02_tiny_patch14_224", qkv_fused=True),
        lambda: BY_NAME["ViTModel"].build(),
        lambda: BY_NAME["BlipVisionModel"].build(),
        lambda: BY_NAME["CLIPVisionModel"].build(),
    ],
)
def test_adapters_in_every_linear_layer(make: Any) -> None:
    model = make()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and not isinstance(parent, Adapter):
                setattr(parent, name, Adapter(child))
    images = images_for(model) if hasattr(model, "patch_embed") else torch.randn(2, 3, 96, 96)

    def out() -> Tensor:
        found = model(images)
        tokens: Tensor = found if isinstance(found, Tensor) else found.last_hidden_state
        return tokens

    try:
        wanted = out()
    except AttributeError:
        pytest.skip("it does not run unpatched")
    with tokenmerge.patched(model, r=0) as handle:
        assert torch.equal(out(), wanted)
        handle.update(r=3)
        assert torch.isfinite(out()).all()


def test_what_was_done_too_early_is_named() -> None:
    model: Any = tiny("vit_tiny_patch16_224")
    model.blocks[0] = torch.compile(model.blocks[0])
    with pytest.raises(
        UnsupportedModelError, match=r"block 0 was compiled or wrapped already.*patch first, then do that"
    ):
        tokenmerge.patch(model, r=2)


# --- arguments -----------------------------------------------------------------------------------------------


def test_arguments_are_checked_by_position_too() -> None:
    metric = torch.randn(1, 9, 4)
    for arguments in ((2, 1, "auto", "euclidian"), (2, 1, "auto", "cosine", "altrnating"), (2, 1, "cuda")):
        with pytest.raises(ConfigError, match="must be one of"):
            tokenmerge.bipartite_matching(metric, *arguments)
    with pytest.raises(InputError, match="a tensor"):
        tokenmerge.bipartite_matching([[1.0]], 2)  # type: ignore[arg-type]
    for name, most in ((None, "half"), ("", "half"), ("x", "some")):
        with pytest.raises(ConfigError, match="to be registered"):
            tokenmerge.register_matcher(name, most=most)  # type: ignore[arg-type]


@torch.no_grad()
def test_whatever_is_asked_the_answer_is_a_sentence() -> None:
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    with tokenmerge.patched(model, r=3, trace=True) as handle:
        features = model.forward_features(images)
        trace = handle.trace
        odd: Any
        for odd in ("x", 1.5, None, [1], b"ab", True):
            asked: list[Any] = [
                lambda odd=odd: trace.with_grid(odd),
                lambda odd=odd: trace.unmerge(odd),
                lambda odd=odd: trace.to_grid(odd),
                lambda odd=odd: tokenmerge.token_sizes(odd),
                lambda odd=odd: tokenmerge.trace_of(odd),
                lambda odd=odd: tokenmerge.carry(odd, like=features),
                lambda odd=odd: tokenmerge.MergePlan.from_assign(odd),
                lambda odd=odd: tokenmerge.MergeConfig.from_json(odd),
            ]
            if odd is not None:
                asked += [
                    lambda odd=odd: handle.output_tokens(odd),
                    lambda odd=odd: handle.summary(odd),
                    lambda odd=odd: trace.source(odd),
                    lambda odd=odd: handle.update(odd),
                ]
            for ask in asked:
                if odd == [1] and ask is asked[0]:
                    continue  # a grid of one axis
                with pytest.raises(tokenmerge.TokenMergeError):
                    ask()
        with pytest.raises(ConfigError):
            handle.update({})  # type: ignore[arg-type]
        assert handle.r == 3

    @tokenmerge.register_matcher("gives nothing")
    def nothing(metric: Tensor, r: int, protected: int = 0) -> Any:
        return None

    with tokenmerge.patched(model, r=3, matcher="gives nothing"), pytest.raises(PatchError, match="gave a NoneType"):
        model(images)


def _compiled(block: Any) -> None:
    block.attn = torch.compile(block.attn)


def _traced(block: Any) -> None:
    block.attn = torch.fx.symbolic_trace(block.attn)


def _own_forward(block: Any) -> None:
    forward = block.attn.forward
    block.attn.forward = lambda *args, **kwargs: forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_compiled, "its module attn was compiled or wrapped already"),
        (_traced, "its module attn was traced or scripted already"),
        (_own_forward, "its module attn has its own forward"),
    ],
)
def test_what_hides_an_attention_is_named(change: Any, words: str) -> None:
    model = tiny("vit_tiny_patch16_224")
    change(model.blocks[0])
    with pytest.raises(UnsupportedModelError, match=words):
        tokenmerge.patch(model, r=2)


def test_blocks_that_were_traced_or_lost_are_named() -> None:
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    traced = copy.deepcopy(model)
    traced.blocks[0] = torch.jit.trace(traced.blocks[0], torch.randn(1, 37, 48))
    with pytest.raises(UnsupportedModelError, match="block 0 was traced or scripted already"):
        tokenmerge.patch(traced, r=2)
    without = copy.deepcopy(model)
    del without.blocks
    with pytest.raises(UnsupportedModelError, match="has lost the list of its blocks"):
        tokenmerge.patch(without, r=2)
    handle = tokenmerge.patch(model, r=2)
    del model.blocks
    for ask in (lambda: model(images), handle.summary, lambda: handle.update(r=1)):
        with pytest.raises(PatchError, match="0 blocks, but 3 were patched"):
            ask()
