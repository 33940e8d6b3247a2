"""Training through merges: gradients, checkpointing, two views, compilation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from tests.families.test_timm_models import KINDS
from tests.helpers.tiny import images_for, tiny


def gradients(model: nn.Module, *views: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = sum((model(view).square().mean() for view in views), torch.zeros(()))
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", KINDS)
def test_two_views_with_checkpointing_have_exact_gradients(name: str) -> None:
    model = tiny(name).train()
    tokenmerge.patch(model, r=[5, 0, 7])
    views = images_for(model, seed=1), images_for(model, seed=2)
    plain = gradients(model, *views)
    model.set_grad_checkpointing(True)
    checkpointed = gradients(model, *views)
    assert plain.keys() == checkpointed.keys()
    for key, value in plain.items():
        torch.testing.assert_close(checkpointed[key], value, rtol=1e-6, atol=1e-7 * float(value.abs().max()), msg=key)
    # and both views count: each alone gives something else
    assert any(not torch.allclose(value, plain[key]) for key, value in gradients(model, views[0]).items())


def test_every_parameter_gets_a_gradient() -> None:
    model = tiny("vit_base_patch14_reg4_dinov2").train()
    tokenmerge.patch(model, r=5)
    missing = {name for name, _ in model.named_parameters()} - gradients(model, images_for(model)).keys()
    assert not missing


def test_gradient_equals_finite_differences() -> None:
    model = tiny("vit_tiny_patch16_224", depth=2, embed_dim=12, img_size=48).double()
    tokenmerge.patch(model, r=2)
    images = torch.randn(1, 3, 48, 48, dtype=torch.float64)
    weight = model.blocks[0].attn.proj.bias
    (gradient,) = torch.autograd.grad(model(images).square().sum(), weight)
    direction = torch.randn_like(weight)
    step = 1e-6
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight += sign * step * direction
            values.append(model(images).square().sum())
            weight -= sign * step * direction
    assert float((values[0] - values[1]) / (2 * step)) == pytest.approx(float(gradient @ direction), rel=1e-5)


def test_intermediates_train_with_checkpointing() -> None:
    """What a reader of maps asked for must be there again when blocks are recomputed."""
    model = tiny("vit_base_patch14_reg4_dinov2").train()
    tokenmerge.patch(model, r=5)
    images = images_for(model)

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        sum(m.square().mean() for m in model.forward_intermediates(images, intermediates_only=True)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = step()
    model.set_grad_checkpointing(True)
    for key, value in step().items():
        torch.testing.assert_close(value, plain[key], rtol=1e-6, atol=1e-7 * float(plain[key].abs().max()), msg=key)


def test_copies_of_compiled_models_are_their_own() -> None:
    torch._dynamo.reset()
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    tokenmerge.patch(model, r=4)
    for block in model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        wanted = model(images)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(images), wanted)
            tokenmerge.handle_of(twin).update(r=0)
            for parameter in twin.blocks.parameters():
                parameter.zero_()
            assert twin.blocks(torch.ones(1, 37, 48)).equal(torch.ones(1, 37, 48))
        assert torch.equal(model(images), wanted)


def test_reentrant_checkpointing_says_what_to_do() -> None:
    model = tiny("vit_tiny_patch16_224").train()
    tokenmerge.patch(model, r=4)
    images = images_for(model)

    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit: Any = model

        def forward(self, x: Tensor) -> Tensor:
            x = self.vit.patch_embed(x)
            x = self.vit.norm_pre(self.vit._pos_embed(x))
            for block in self.vit.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
            return self.vit.forward_head(self.vit.norm(x))  # type: ignore[no-any-return]

    with pytest.raises(tokenmerge.PatchError, match="use_reentrant=False"):
        gradients(Reentrant(), images)


def test_drop_path_and_dropout_train() -> None:
    model = tiny(
        "vit_tiny_patch16_224", drop_path_rate=0.3, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_rate=0.1
    ).train()
    tokenmerge.patch(model, r=5)
    torch.manual_seed(1)
    first = gradients(model, images_for(model))
    torch.manual_seed(1)
    second = gradients(model, images_for(model))
    for key, value in first.items():
        assert torch.equal(value, second[key])


@pytest.mark.parametrize(
    ("backend", "whole"),
    [
        ("aot_eager", True),
        pytest.param("aot_eager", False, marks=pytest.mark.slow),
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_compiles_without_graph_breaks(backend: str, whole: bool) -> None:
    torch._dynamo.reset()
    to_code = (
        backend == "inductor"
    )  # each kernel of which takes a C++ compiler seconds; exported programs hold those of inference
    model = tiny("vit_base_patch14_reg4_dinov2", global_pool="avg", depth=2 if to_code else 3)
    images = images_for(model)
    tokenmerge.patch(model, r=[5, 7] if to_code else [5, 0, 7], trace=True)
    with torch.no_grad():
        wanted = model(images)
    slopes = gradients(model, images)
    compiled: Any = model
    if whole:
        compiled = torch.compile(model, fullgraph=True, backend=backend)
    else:
        for block in model.blocks:
            block.compile(fullgraph=True, backend=backend)
    with torch.set_grad_enabled(to_code):
        torch.testing.assert_close(compiled(images), wanted, rtol=1e-4, atol=1e-4)
        assert tokenmerge.handle_of(compiled).trace.source().shape == (2, 41)
    found = gradients(compiled, images)
    assert len(found) == len(slopes) > 0
    for one, other in zip(found.values(), slopes.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_model_that_never_ran_compiles() -> None:
    """Nothing is left to find out in the first pass that tracing could not; another model of its class ran before."""
    torch._dynamo.reset()
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    dense: Any = torch.compile(model, backend="eager")
    dense(images)
    merged = copy.deepcopy(model)
    tokenmerge.patch(merged, r=5)
    compiled: Any = torch.compile(merged, fullgraph=True, backend="eager")
    found = compiled(images)
    assert torch.equal(found, merged(images))


def test_a_model_compiled_before_it_is_patched_merges() -> None:
    torch._dynamo.reset()
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        original = compiled(images)
        with tokenmerge.patched(compiled, r=5):
            assert torch.equal(compiled(images), model(images))
            assert not torch.equal(compiled(images), original)
        assert torch.equal(compiled(images), original)


def test_exports() -> None:
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    tokenmerge.patch(model, r=5)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        torch.testing.assert_close(program.module()(images), model(images))
