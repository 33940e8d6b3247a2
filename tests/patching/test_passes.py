"""What belongs to one pass is read by the plans that its features carry, and reached by no other."""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from tests.helpers.kinds import EVERY, blocks_of, features_of, input_for, out_of
from tests.helpers.tiny import images_for, tiny
from tests.helpers.towers import BY_NAME
from tokenmerge import InputError, PatchError

# --- features carry their own plans --------------------------------------------------------------------------


@torch.no_grad()
@EVERY
def test_features_are_read_by_the_plans_that_they_carry(make: Callable[[], Any]) -> None:
    """Before the pass by order of evaluation, after another pass, without a handle, and after an update."""
    model = make()
    first, second = input_for(model, 1), input_for(model, 2)
    with tokenmerge.patched(model, r=4, trace=True) as handle:
        model(first)
        early = handle.trace.unmerge(features_of(model, second))  # the trace is asked for before the pass runs
        features = features_of(model, second)
        model(first)
        assert torch.equal(handle.trace.unmerge(features), early)
        trace = tokenmerge.trace_of(features)
        assert torch.equal(trace.unmerge(features), early)
        wanted = trace.source()
        handle.update(r=2)
        model(first)
        assert torch.equal(tokenmerge.trace_of(features).source(), wanted)
        assert len(trace.plans) == 3
        with pytest.raises(InputError, match="carry no plans"):
            handle.trace.unmerge(features * 1)


@torch.no_grad()
@EVERY
def test_hooks_of_inner_blocks_read_what_is_there(make: Callable[[], Any]) -> None:
    """As tools for class activation maps do; and a pass that stops early is no whole one."""
    model = make()
    images = input_for(model)
    with tokenmerge.patched(model, r=4, trace=True, output="full") as handle:
        model(input_for(model, 5))
        whole = handle.trace.source()
        seen: list[Tensor] = []

        def look(module: Any, args: Any, output: Any) -> None:
            tokens = output[0] if isinstance(output, tuple) else output
            seen.append(handle.trace.unmerge(tokens))
            assert torch.equal(tokenmerge.trace_of(tokens).size(), tokenmerge.token_sizes(tokens))
            raise KeyboardInterrupt

        hook = blocks_of(model)[1].register_forward_hook(look)
        with pytest.raises(KeyboardInterrupt):
            model(images)
        hook.remove()
        assert torch.equal(handle.trace.source(), whole), "the latest whole pass"
        model(images)
        assert seen[0].shape[1] == handle.trace.tokens


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_reads_its_own_features(strict: bool) -> None:
    model = tiny("vit_tiny_patch16_224", depth=2)
    handle = tokenmerge.patch(model, r=5, trace=True, backend="torch")

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            return handle.trace.to_grid(self.model.forward_features(images))

    maps, (first, second) = Maps(), (images_for(model, seed=1), images_for(model, seed=2))
    maps(first)
    program = torch.export.export(maps, (first,), strict=strict)
    torch.testing.assert_close(program.module()(second), maps(second))


@torch.no_grad()
def test_a_trace_before_any_pass_reads_features_and_nothing_else() -> None:
    model = tiny("vit_tiny_patch16_224")
    handle = tokenmerge.patch(model, r=4, trace=True)
    assert handle.trace.to_grid(model.forward_features(images_for(model))).shape == (2, 48, 6, 6)
    handle.update(r=3)
    for ask in (lambda: handle.trace.source(), lambda: handle.trace.grid, lambda: handle.trace.regions((96, 96))):
        with pytest.raises(PatchError, match="no forward pass had run"):
            ask()


@torch.no_grad()
@EVERY
def test_rollout_is_a_product_of_attention_over_original_tokens(make: Callable[[], Any]) -> None:
    """It sums to 1, at r=0 it is the plain product, and merging alike tokens hardly changes it."""
    model = make()
    images = input_for(model)
    with tokenmerge.patched(model, r=0, trace="rollout") as handle:
        model(images)
        if handle.trace.attention[0] is None:  # attention that calls no fused kernel cannot be looked into
            with pytest.raises(InputError, match="looked into"):
                handle.trace.rollout()
            return
        plain = handle.trace.rollout()
        grid, protected = handle.trace.grid, handle.trace.protected
        assert plain.shape == (2, *(grid or ()))
        handle.update(r=3)
        model(images)
        merged = handle.trace.rollout()
        assert merged.shape == plain.shape
        assert not torch.equal(merged, plain)
        total = merged.flatten(1).sum(dim=1)
        assert (total <= 1 + 1e-5).all()
        if protected == 0:
            torch.testing.assert_close(total, torch.ones(2))


@torch.no_grad()
def test_rollout_by_its_definition() -> None:
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    maps: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = True

    def note(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        maps.append((q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=3).mean(dim=1))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    class Noting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.scaled_dot_product_attention:
                return note(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Noting():
        model(images)
    wanted = torch.eye(37).expand(2, -1, -1)
    for attention in maps:
        wanted = 0.5 * (attention + torch.eye(37)) @ wanted
    with tokenmerge.patched(model, r=0, trace="rollout") as handle:
        model(images)
        torch.testing.assert_close(handle.trace.rollout().flatten(1), wanted[:, 0, 1:], rtol=1e-4, atol=1e-6)
        handle.update(trace=True)
        model(images)
        with pytest.raises(InputError, match="trace='rollout'"):
            handle.trace.rollout()


# --- carrying state ------------------------------------------------------------------------------------------


@torch.no_grad()
@EVERY
def test_hooks_that_put_another_tensor_in_place_carry_or_fail(make: Callable[[], Any]) -> None:
    model = make()
    images = input_for(model)
    with tokenmerge.patched(model, r=4):
        wanted = out_of(model, images)
        block = blocks_of(model)[1]

        def steer(module: Any, args: Any, output: Any) -> Any:
            tokens = output[0] if isinstance(output, tuple) else output
            moved = tokenmerge.carry(tokens * 1.0, like=tokens)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        hook = block.register_forward_hook(steer)
        assert torch.equal(out_of(model, images), wanted)
        hook.remove()
        hook = block.register_forward_hook(
            lambda module, args, output: (output[0] * 1.0, *output[1:]) if isinstance(output, tuple) else output * 1.0
        )
        with pytest.raises(PatchError, match=r"tokenmerge\.carry\(new, like=old\)"):
            model(images)
        hook.remove()
        assert torch.equal(out_of(model, images), wanted)


def test_grids_of_two_views_are_not_exchanged() -> None:
    """Embedded first and run through the blocks later: which grid comes first is not known, and nothing is made up."""
    model = tiny("vit_tiny_patch16_224", dynamic_img_size=True)
    handle = tokenmerge.patch(model, r=4, trace=True)
    images = [torch.randn(1, 3, 64, 144), torch.randn(1, 3, 144, 64), torch.randn(1, 3, 64, 144)]
    with torch.no_grad():
        for order in ((0, 1), (0, 1, 2), (0, 2)):
            tokens = [model._pos_embed(model.patch_embed(images[view])) for view in order]
            for view, x in zip(order, tokens, strict=True):
                features = model.norm(model.blocks(x))
                if order == (0, 2):
                    assert handle.trace.to_grid(features).shape[2:] == (4, 9)
                    continue
                with pytest.raises(InputError, match="grid"):
                    handle.trace.to_grid(features)
                rows, columns = images[view].shape[2] // 16, images[view].shape[3] // 16
                shown = tokenmerge.trace_of(features).with_grid((rows, columns))
                assert shown.to_grid(features).shape[2:] == (rows, columns)
            assert handle.trace.to_grid(model.forward_features(images[1])).shape[2:] == (9, 4)
        model.patch_embed(images[0])  # and nothing comes of it
        assert handle.trace.to_grid(model.forward_features(images[1])).shape[2:] == (9, 4)


def test_the_wish_for_full_maps_is_one_models_own() -> None:
    """A pass of another model, a teacher in a hook, gives what it always gives; and has its own wish."""
    outer, inner = tiny("vit_small_patch16_224"), tiny("vit_base_patch16_224")
    images, seen = images_for(outer), []
    tokenmerge.patch(outer, r=4)
    tokenmerge.patch(inner, r=4)

    def look(*given: Any) -> None:
        seen.append((inner.forward_features(images).shape, inner.forward_intermediates(images)[1][0].shape))

    outer.blocks[0].register_forward_hook(look)
    with torch.no_grad():
        alone = (inner.forward_features(images).shape, inner.forward_intermediates(images)[1][0].shape)
        final, maps = outer.forward_intermediates(images)
        assert final.shape == outer.forward_features(images).shape
        assert {found.shape[2:] for found in maps} == {(6, 6)}
        tower = BY_NAME["ViTModel"].build()
        tokenmerge.patch(tower, r=3)
        tower.layers[1].register_forward_hook(look)
        states = tower(torch.randn(2, 3, 96, 96), output_hidden_states=True).hidden_states
        assert len({state.shape[1] for state in states}) == 1
    assert set(seen) == {alone}


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_base_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"]
)
def test_dictionaries_of_intermediates_hold_what_forward_features_gives(name: str) -> None:
    model = tiny(name)
    images = images_for(model)
    tokenmerge.patch(model, r=4, output="full" if "siglip" in name else "auto")
    with torch.no_grad():
        wanted = model.forward_features(images)
        for norm, prefix in itertools.product((False, True), repeat=2):
            found = model.forward_intermediates(images, output_dict=True, norm=norm, return_prefix_tokens=prefix)
            assert torch.equal(found["image_features"], wanted)
            assert {maps.shape[2:] for maps in found["image_intermediates"]} == {(6, 6)}


@torch.no_grad()
def test_what_carry_refuses() -> None:
    model = tiny("vit_tiny_patch16_224")
    with tokenmerge.patched(model, r=4) as handle:
        features = model.forward_features(images_for(model))
        assert tokenmerge.token_sizes(tokenmerge.carry(features.double(), like=features)).shape == features.shape[:2]
        with pytest.raises(InputError, match="as many images and tokens"):
            tokenmerge.carry(features[:, 1:], like=features)
        handle.update(r=0)
        features = model.forward_features(images_for(model))
        assert torch.equal(tokenmerge.carry(features * 2, like=features), features * 2), (
            "nothing to carry, and no need to"
        )


@torch.no_grad()
def test_what_is_steered_in_full_maps_is_steered_in_the_next_block() -> None:
    """Within `forward_intermediates` blocks hand on unmerged tokens: the next one goes on with what became of them."""
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    with tokenmerge.patched(model, r=4):
        shift = torch.randn(48)
        hook = model.blocks[0].register_forward_hook(lambda m, a, out: tokenmerge.carry(out + shift, like=out))
        wanted = model.forward_features(images)
        final, _ = model.forward_intermediates(images)
        hook.remove()
        assert torch.equal(final, wanted)
        assert not torch.equal(model.forward_features(images), wanted)


@pytest.mark.slow  # as for hidden states of compiled models in test_transformers_use.py
@torch.no_grad()
def test_maps_are_full_after_a_plain_pass_of_compiled_blocks() -> None:
    """The first wish for full maps in a thread comes after its code was compiled."""
    torch.compiler.reset()
    model = tiny("vit_tiny_patch16_224")
    tokenmerge.patch(model, r=4)
    images = images_for(model)
    wanted = model.forward_intermediates(images, intermediates_only=True)
    for block in model.blocks:
        block.compile(backend="eager")

    def in_a_new_thread() -> Any:
        with torch.no_grad():
            model(images)
            return model.forward_intermediates(images, intermediates_only=True)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        found = pool.submit(in_a_new_thread).result()
    assert [left.shape for left in found] == [right.shape for right in wanted]
    assert all(torch.equal(left, right) for left, right in zip(found, wanted, strict=True))
