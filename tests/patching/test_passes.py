"""What belongs to one pass is not reached by another, and what is changed behind the handle's back is noticed."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import pickle
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tokenmerge
from tests.helpers.tiny import images_for, randomize, tiny
from tests.helpers.towers import BY_NAME
from tokenmerge import ConfigError, InputError, MergeConfig, PatchError, TokenMergeError


def _torchvision() -> Any:
    model = torchvision.models.VisionTransformer(96, 16, 3, 4, 48, 96).eval()
    randomize(model)
    return model


MAKE: dict[str, Callable[[], Any]] = {
    "timm": lambda: tiny("vit_tiny_patch16_224"),
    "timm, average": lambda: tiny("vit_small_patch16_224", global_pool="avg"),
    "timm, rotary": lambda: tiny("eva02_tiny_patch14_224"),
    "timm, relative": lambda: tiny("beit_base_patch16_224"),
    "timm, talking heads": lambda: tiny("cait_xxs24_224"),
    "transformers": lambda: BY_NAME["Dinov2Model"].build(),
    "transformers, softmax": lambda: BY_NAME["BlipVisionModel"].build(),
    "transformers, config": lambda: BY_NAME["VideoMAEModel"].build(),
    "torchvision": _torchvision,
}
EVERY = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())


def _input(model: Any, seed: int = 1) -> Tensor:
    if hasattr(model, "patch_embed"):
        return images_for(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 4, 3, 64, 64) if "Video" in type(model).__name__ else (2, 3, 96, 96)
    return torch.randn(shape, generator=generator)


def _out(model: Any, images: Tensor) -> Tensor:
    out = model(images)
    tokens: Tensor = out if isinstance(out, Tensor) else out.last_hidden_state
    return tokens


def _blocks(model: Any) -> Any:
    """The list that the blocks are in."""
    lists = [
        module for module in model.modules() if isinstance(module, nn.Sequential | nn.ModuleList) and len(module) == 3
    ]
    return next(module for module in lists if hasattr(module[0], "_tokenmerge") or "Layer" in type(module[0]).__name__
                or "Block" in type(module[0]).__name__)  # fmt: skip


def _features(model: Any, images: Tensor) -> Tensor:
    """Tokens that leave the final norm, with what they carry."""
    if hasattr(model, "forward_features"):
        found: Tensor = model.forward_features(images)
        return found
    seen: list[Tensor] = []
    norm = model.encoder.ln if hasattr(model, "encoder") and hasattr(model.encoder, "ln") else None
    if norm is None:
        return _out(model, images)
    hook = norm.register_forward_hook(lambda module, args, output: seen.append(output))
    model(images)
    hook.remove()
    return seen[0]


# --- features carry their own plans --------------------------------------------------------------------------


@torch.no_grad()
@EVERY
def test_features_are_read_by_the_plans_that_they_carry(make: Callable[[], Any]) -> None:
    """Before the pass by order of evaluation, after another pass, without a handle, and after an update."""
    model = make()
    first, second = _input(model, 1), _input(model, 2)
    with tokenmerge.patched(model, r=4, trace=True) as handle:
        model(first)
        early = handle.trace.unmerge(_features(model, second))  # the trace is asked for before the pass runs
        features = _features(model, second)
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
    images = _input(model)
    with tokenmerge.patched(model, r=4, trace=True, output="full") as handle:
        model(_input(model, 5))
        whole = handle.trace.source()
        seen: list[Tensor] = []

        def look(module: Any, args: Any, output: Any) -> None:
            tokens = output[0] if isinstance(output, tuple) else output
            seen.append(handle.trace.unmerge(tokens))
            assert torch.equal(tokenmerge.trace_of(tokens).size(), tokenmerge.token_sizes(tokens))
            raise KeyboardInterrupt

        hook = _blocks(model)[1].register_forward_hook(look)
        with pytest.raises(KeyboardInterrupt):
            model(images)
        hook.remove()
        assert torch.equal(handle.trace.source(), whole), "the latest whole pass"
        model(images)
        assert seen[0].shape[1] == handle.trace.tokens


@EVERY
def test_gradients_are_laid_out_as_activations_are(make: Callable[[], Any]) -> None:
    """What tools for class activation maps do: both, of an inner block, from hooks; the patches' gradients add up."""
    model = make()
    found: dict[str, Tensor] = {}
    with tokenmerge.patched(model, r=4, trace=True) as handle:

        def look(module: Any, args: Any, output: Any) -> None:
            tokens = output[0] if isinstance(output, tuple) else output
            found["activation"] = handle.trace.to_grid(tokens)

            def note(gradient: Tensor) -> None:
                found["gradient"], found["raw"] = handle.trace.to_grid(gradient), gradient

            tokens.register_hook(note)

        hook = _blocks(model)[1].register_forward_hook(look)
        _out(model, _input(model)).square().mean().backward()
        hook.remove()
        protected = 0 if "Cait" in type(model).__name__ else handle.summary().protected
    assert found["gradient"].shape == found["activation"].shape
    axes = tuple(range(2, found["gradient"].dim()))
    torch.testing.assert_close(found["gradient"].sum(dim=axes), found["raw"][:, protected:].sum(dim=1))


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
    images = _input(model)
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
    images = _input(model)
    with tokenmerge.patched(model, r=4):
        wanted = _out(model, images)
        block = _blocks(model)[1]

        def steer(module: Any, args: Any, output: Any) -> Any:
            tokens = output[0] if isinstance(output, tuple) else output
            moved = tokenmerge.carry(tokens * 1.0, like=tokens)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        hook = block.register_forward_hook(steer)
        assert torch.equal(_out(model, images), wanted)
        hook.remove()
        hook = block.register_forward_hook(
            lambda module, args, output: (output[0] * 1.0, *output[1:]) if isinstance(output, tuple) else output * 1.0
        )
        with pytest.raises(PatchError, match=r"tokenmerge\.carry\(new, like=old\)"):
            model(images)
        hook.remove()
        assert torch.equal(_out(model, images), wanted)


def _gradients(model: Any, out: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    out.square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@EVERY
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_may_hold_the_whole_model(make: Callable[[], Any], reentrant: bool) -> None:
    """The pass that begins within backward merges as the first one did."""
    model = make()
    images = _input(model).requires_grad_()
    tokenmerge.patch(model, r=4)
    wanted = _gradients(model, _out(model, images))
    again = checkpoint(lambda given: _out(model, given), images, use_reentrant=reentrant)
    torch.testing.assert_close(_gradients(model, again), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("r", [0, 5, [0, 0, 5]])
@pytest.mark.parametrize("trace", [False, True])
def test_checkpoints_of_all_sorts_give_the_same_gradients_or_say_why_not(r: Any, trace: bool) -> None:
    held = functools.partial(checkpoint, use_reentrant=False)
    model = tiny("vit_small_patch16_224")
    images, (first, second, third) = images_for(model), model.blocks
    tokenmerge.patch(model, r=r, trace=trace)

    def embedded() -> Any:
        return model._pos_embed(model.patch_embed(images))

    wanted = _gradients(model, model.blocks(embedded()))
    flat: list[Callable[[], Any]] = [
        lambda: third(held(lambda x: second(first(x)), embedded())),
        lambda: third(second(held(lambda patches: first(model._pos_embed(patches)), model.patch_embed(images)))),
        lambda: held(lambda x: third(second(x)), first(embedded())),
    ]
    nested: list[Callable[[], Any]] = [
        lambda: third(held(lambda x: held(second, held(first, x)), embedded())),
        lambda: third(held(lambda x: held(second, first(x)), embedded())),
        lambda: held(lambda x: held(third, held(second, x)), first(embedded())),
    ]
    for run in flat:
        assert torch.equal(_gradients(model, run()), wanted)
    for run in nested:
        if r == 5:
            with pytest.raises(PatchError, match="as reentrant or nested checkpointing does"):
                _gradients(model, run())
        else:
            assert torch.equal(_gradients(model, run()), wanted)


@EVERY
def test_a_pass_within_backward_merges(make: Callable[[], Any]) -> None:
    """One that a hook of a tensor runs, say to compare with."""
    model = make()
    images, found = _input(model), []
    tokenmerge.patch(model, r=4)
    wanted = _out(model, images)
    trigger = torch.ones(1, requires_grad=True) * 2
    trigger.register_hook(lambda gradient: found.append(_out(model, images)))
    trigger.sum().backward()
    torch.testing.assert_close(found[0], wanted)


def test_settings_may_change_between_forward_and_backward() -> None:
    model = tiny("vit_small_patch16_224")
    images = images_for(model)
    handle = tokenmerge.patch(model, r=0)
    model.set_grad_checkpointing()
    for before, after in ((0, 5), (5, 0), (5, 3)):
        handle.update(r=before)
        wanted = _gradients(model, model(images))
        out = model(images)
        handle.update(r=after)
        assert torch.equal(_gradients(model, out), wanted)
    embedded = model._pos_embed(model.patch_embed(images))
    for first, second in ((0, 5), (5, 0)):
        handle.update(r=first)
        x = embedded.detach().requires_grad_()
        checkpoint(model.blocks[0], x, use_reentrant=False)
        handle.update(r=second)
        out = checkpoint(model.blocks[0], x, use_reentrant=False)
        with pytest.raises(PatchError, match="gradient checkpointing cannot tell them apart"):
            out.sum().backward()


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


@EVERY
@pytest.mark.parametrize("output", ["auto", "full"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:For backward hooks to be called")
def test_backward_hooks_of_every_module_see_what_there_is(make: Callable[[], Any], output: Any) -> None:
    """PyTorch puts views in the place of what enters and leaves modules with such hooks; nothing is lost by that."""
    model = make()
    images = _input(model).requires_grad_()
    handle = tokenmerge.patch(model, r=3, output=output, trace=True)
    wanted = _out(model, images)
    (by_images,) = torch.autograd.grad(wanted.square().sum(), images)
    maps = handle.trace.unmerge(model.forward_features(images)) if hasattr(model, "forward_features") else None
    calls: list[Any] = []
    for module in model.modules():
        module.register_full_backward_hook(lambda module, *gradients: calls.append(module))
    got = _out(model, images)
    assert torch.equal(got, wanted)
    (again,) = torch.autograd.grad(got.square().sum(), images)
    torch.testing.assert_close(again, by_images)
    assert {id(block) for block in _blocks(model)} <= {id(module) for module in calls}
    if maps is not None:
        assert torch.equal(handle.trace.unmerge(model.forward_features(images)), maps)


def test_views_of_merged_tokens_are_not_taken_for_them() -> None:
    """Only what backward hooks make is; other views of the same memory carry nothing, and say so."""
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model).requires_grad_()
    handle = tokenmerge.patch(model, r=3, trace=True)
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda x: x[:, :],
        lambda x: x.view_as(x),
        lambda x: x.flip(1)[:, :],
        lambda x: x.clone(),
    ]
    for change in changes:
        with pytest.raises(InputError, match="carry no plans"):
            handle.trace.unmerge(change(model.forward_features(images)))
        hook = model.blocks[1].register_forward_hook(lambda module, args, output, change=change: change(output))
        back = model.blocks[1].register_full_backward_hook(lambda module, *gradients: None)
        with pytest.raises(PatchError, match="block 2 received tokens without their sizes"):
            model(images)
        hook.remove()
        back.remove()


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


# --- errors inside, threads ----------------------------------------------------------------------------------


@torch.no_grad()
@EVERY
def test_an_error_inside_one_model_does_not_reach_another(make: Callable[[], Any]) -> None:
    """A module that raises within attention leaves no open tap, no wish and no grid behind."""
    broken, sound = make(), make()
    images = _input(sound)
    wanted = _out(sound, images)
    tokenmerge.patch(broken, r=4, trace=True)
    tokenmerge.patch(sound, r=0)
    failed = 0
    for module in list(_blocks(broken)[1].modules()):
        hook = module.register_forward_hook(lambda *_: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):  # some modules are there and never run
            broken(images)
            failed -= 1
        failed += 1
        hook.remove()
        assert torch.equal(_out(sound, images), wanted)
    assert failed >= 3
    before = [sorted(vars(module)) for module in make().modules()]
    tokenmerge.unpatch(broken)
    assert [sorted(vars(module)) for module in broken.modules()] == before, "nothing of the passes stays"


def test_patching_in_threads_takes_turns() -> None:
    for _ in range(10):
        model = tiny("vit_tiny_patch16_224")
        handles: list[Any] = []
        errors: list[BaseException] = []
        start = threading.Barrier(4)

        def work(model: Any, handles: Any, errors: Any, start: Any) -> None:
            start.wait()
            try:
                handles.append(tokenmerge.patch(model, r=4))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(model, handles, errors, start)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(handles) == 1
        assert all(isinstance(caught, PatchError) and "patched already" in str(caught) for caught in errors)
        assert tokenmerge.is_patched(model)
        handles[0].remove()


@torch.no_grad()
def test_passes_end_with_the_settings_they_began_with() -> None:
    """Updates and removals beside running passes: every output is that of one of the settings, or nothing."""
    model = tiny("vit_small_patch16_224", global_pool="avg", depth=6)
    images = images_for(model)
    known = []
    for r in (2, 4):
        with tokenmerge.patched(model, r=r):
            known.append(model(images))
    known.append(model(images))
    handle = tokenmerge.patch(model, r=2)
    stop, strange = threading.Event(), []

    def run() -> None:
        with torch.no_grad():
            while not stop.is_set():
                try:
                    out = model(images)
                except TokenMergeError:
                    continue
                if not any(torch.equal(out, one) for one in known):
                    strange.append(out)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    refused = 0
    for turn in itertools.count():
        handle.update(r=2 + 2 * (turn % 2))
        try:
            handle.remove()
        except PatchError:
            refused += 1
        else:
            handle = tokenmerge.patch(model, r=2)
        if turn > 200:
            break
    stop.set()
    for thread in threads:
        thread.join()
    assert not strange
    assert refused
    handle.remove()  # what ended does not count as running


@torch.no_grad()
def test_a_hook_cannot_remove_the_patch_under_its_own_pass() -> None:
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    handle = tokenmerge.patch(model, r=4)
    wanted = model(images)
    hook = model.blocks[1].register_forward_hook(lambda *_: handle.remove())
    with pytest.raises(PatchError, match="a forward pass of this model is running"):
        model(images)
    hook.remove()
    assert torch.equal(model(images), wanted), "the settings are as they were"
    handle.remove()


@torch.no_grad()
def test_a_pass_that_died_does_not_count_as_running() -> None:
    model = tiny("vit_tiny_patch16_224")
    handle = tokenmerge.patch(model, r=4)
    held: list[Any] = []
    ready, leave = threading.Event(), threading.Event()

    def work() -> None:
        hook = model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
        with torch.no_grad(), pytest.raises(ZeroDivisionError):
            model(images_for(model))
        hook.remove()
        with torch.no_grad():
            held.append(model.forward_features(images_for(model)))
        ready.set()
        leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    handle.remove()
    leave.set()
    thread.join()
    assert held


# --- what is changed behind the handle's back ----------------------------------------------------------------


@EVERY
def test_nothing_waits_for_the_garbage_collector(make: Callable[[], Any]) -> None:
    """A model that is let go frees its memory at once: no copy of a block, no pass, is in a cycle of references."""

    def tensors() -> int:
        return sum(isinstance(found, Tensor) for found in gc.get_objects())

    def life() -> None:
        model = make()
        images = _input(model).requires_grad_()
        handle = tokenmerge.patch(model, r=3, trace=True)
        _out(model, images).square().sum().backward()
        handle.update(r=2, output="full")
        _out(model, images).square().sum().backward()

    life()  # what is made once stays
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        life()
        assert tensors() == before
    finally:
        gc.enable()


@torch.no_grad()
@EVERY
def test_blocks_that_come_go_or_are_exchanged_are_noticed(make: Callable[[], Any]) -> None:
    def appended(blocks: Any) -> None:
        blocks.append(copy.deepcopy(fresh[0]))

    def exchanged(blocks: Any) -> None:
        blocks[1] = copy.deepcopy(fresh[1])

    def swapped(blocks: Any) -> None:
        blocks[0], blocks[2] = blocks[2], blocks[0]

    def removed(blocks: Any) -> None:
        del blocks[1]

    for change in (appended, exchanged, swapped, removed):
        model = make()
        fresh = list(_blocks(make()))
        images = _input(model)
        handle = tokenmerge.patch(model, r=4, output="auto")
        change(_blocks(model))
        noticed = pytest.raises(PatchError, match=r"unpatch before (adding|exchanging)")
        with noticed:
            model(images)
        with noticed:
            handle.summary()
        with noticed:
            handle.update(r=3)


@EVERY
def test_the_originals_idiom_is_noticed(make: Callable[[], Any]) -> None:
    model = make()
    images = _input(model)
    holder = nn.Module()
    holder.inner = model
    tokenmerge.patch(holder if "torchvision" in type(model).__module__ else model, r=4)

    def set_and_run() -> None:
        model.r = 8
        model(images)

    with pytest.raises(PatchError, match=r"r=8 was set on .*handle_of\(model\)\.update\(r="), torch.no_grad():
        set_and_run()


@torch.no_grad()
def test_it_is_noticed_on_what_holds_the_model_too() -> None:
    model = BY_NAME["CLIPVisionModel"].build()
    holder: Any = nn.Sequential(model)
    tokenmerge.patch(holder, r=4)
    holder.r = 8
    with pytest.raises(PatchError, match="r=8 was set on Sequential"):
        model(_input(model))


def test_settings_are_properties_of_a_handle() -> None:
    model = tiny("vit_tiny_patch16_224")
    handle = tokenmerge.patch(model, r=4)
    handle.r = 8
    assert handle.r == handle.config.r == 8
    assert handle.schedule == (8, 8, 8)
    handle.combine = "norm"
    assert handle.combine == "norm"
    with pytest.raises(ConfigError):
        handle.combine = "average of sorts"
    with pytest.raises(AttributeError, match="'ratio' cannot be set on a handle"):
        handle.ratio = 0.5
    with pytest.raises(AttributeError, match="a handle has no 'ratio'"):
        _ = handle.ratio
    with pytest.raises(ConfigError, match="r lists 4 blocks, but the model has 3"):
        handle.update(r=[1, 2, 3, 4])


def test_configs_do_not_change() -> None:
    listed, options = [1, 2, 3], {"thresholds": [0.1, 0.2, 0.3]}
    config: Any = MergeConfig(r=listed, matcher="threshold", options=options)
    listed.append(4)
    options["thresholds"].append(0.4)
    assert config.r == [1, 2, 3]
    assert config.options == {"thresholds": [0.1, 0.2, 0.3]}
    thresholds = config.options["thresholds"]
    for change in (
        lambda: config.r.append(4),
        lambda: config.r.__setitem__(0, 4),
        lambda: config.options.__setitem__("a", 1),
        lambda: config.options.update(a=1),
        thresholds.clear,
        lambda: thresholds.__iadd__([1.0]),
    ):
        with pytest.raises(TypeError, match="a config cannot be changed"):
            change()
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), MergeConfig.from_json(config.to_json())):
        assert again == config
        with pytest.raises(TypeError):
            cast("Any", again).r.append(4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"matcher": "threshold", "options": {"thresholds": [0.5, 0.5]}}, "lists 2 blocks, but the model has 3"),
        ({"matcher": "threshold", "options": {"thresholds": [0.5] * 4}}, "lists 4 blocks, but the model has 3"),
        ({"matcher": "threshold", "options": {"thresholds": [float("nan")] * 3}}, "each entry a finite number"),
        ({"matcher": "threshold", "options": {"thresholds": 0.5}}, "must be a list"),
        ({"matcher": "diffrate", "options": {"pruned": [0.5]}}, "lists 1 blocks, but the model has 3"),
        ({"matcher": "diffrate", "options": {"pruned": 2.0}}, "between 0 and 1"),
        ({"matcher": "kmeans", "options": {"iterations": "x"}}, "must be a whole number"),
        ({"matcher": "kmeans", "options": {"iterations": -1}}, "at least 0"),
        ({"matcher": "kmeans", "options": {"iterations": True}}, "must be a whole number"),
        ({"matcher": "agglomerative", "options": {"linkage": "foo"}}, "must be one of single, complete"),
        ({"matcher": "informed", "options": {"size_penalty": 3}}, "must be one of none, harmonic"),
        ({"matcher": "informed", "options": {"token_weight": float("inf")}}, "a finite number"),
        ({"matcher": "strided", "options": {"stride": 0}}, "at least 1"),
        ({"matcher": "pitome", "options": {"margin": None}}, "a finite number"),
        ({"matcher": "random_prune", "options": {"seed": 0.5}}, "must be a whole number"),
        ({"keep": [0.9, 0.9]}, "keep lists 2 blocks, but the model has 3"),
        ({"keep": 0.3}, "keep 0.5 or more"),
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused_when_a_model_is_patched(fields: dict[str, Any], words: str) -> None:
    model = tiny("vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match=words):
        tokenmerge.patch(model, **(fields if "keep" in fields else {"r": 2, **fields}))
    assert not tokenmerge.is_patched(model)
