"""Backward: checkpoints, hooks and passes within it, and the memory that it holds."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tokenmerge
from tests.helpers.kinds import EVERY, blocks_of, input_for, out_of
from tests.helpers.tiny import images_for, tiny
from tokenmerge import InputError, PatchError


def _gradients(model: Any, out: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    out.square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


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

        hook = blocks_of(model)[1].register_forward_hook(look)
        out_of(model, input_for(model)).square().mean().backward()
        hook.remove()
        protected = 0 if "Cait" in type(model).__name__ else handle.summary().protected
    assert found["gradient"].shape == found["activation"].shape
    axes = tuple(range(2, found["gradient"].dim()))
    torch.testing.assert_close(found["gradient"].sum(dim=axes), found["raw"][:, protected:].sum(dim=1))


@EVERY
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_may_hold_the_whole_model(make: Callable[[], Any], reentrant: bool) -> None:
    """The pass that begins within backward merges as the first one did."""
    model = make()
    images = input_for(model).requires_grad_()
    tokenmerge.patch(model, r=4)
    wanted = _gradients(model, out_of(model, images))
    again = checkpoint(lambda given: out_of(model, given), images, use_reentrant=reentrant)
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
    images, found = input_for(model), []
    tokenmerge.patch(model, r=4)
    wanted = out_of(model, images)
    trigger = torch.ones(1, requires_grad=True) * 2
    trigger.register_hook(lambda gradient: found.append(out_of(model, images)))
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


@EVERY
@pytest.mark.parametrize("output", ["auto", "full"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:For backward hooks to be called")
def test_backward_hooks_of_every_module_see_what_there_is(make: Callable[[], Any], output: Any) -> None:
    """PyTorch puts views in the place of what enters and leaves modules with such hooks; nothing is lost by that."""
    model = make()
    images = input_for(model).requires_grad_()
    handle = tokenmerge.patch(model, r=3, output=output, trace=True)
    wanted = out_of(model, images)
    (by_images,) = torch.autograd.grad(wanted.square().sum(), images)
    maps = handle.trace.unmerge(model.forward_features(images)) if hasattr(model, "forward_features") else None
    calls: list[Any] = []
    for module in model.modules():
        module.register_full_backward_hook(lambda module, *gradients: calls.append(module))
    got = out_of(model, images)
    assert torch.equal(got, wanted)
    (again,) = torch.autograd.grad(got.square().sum(), images)
    torch.testing.assert_close(again, by_images)
    assert {id(block) for block in blocks_of(model)} <= {id(module) for module in calls}
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


@EVERY
def test_nothing_waits_for_the_garbage_collector(make: Callable[[], Any]) -> None:
    """A model that is let go frees its memory at once: no copy of a block, no pass, is in a cycle of references."""

    def tensors() -> int:
        return sum(isinstance(found, Tensor) for found in gc.get_objects())

    def life() -> None:
        model = make()
        images = input_for(model).requires_grad_()
        handle = tokenmerge.patch(model, r=3, trace=True)
        out_of(model, images).square().sum().backward()
        handle.update(r=2, output="full")
        out_of(model, images).square().sum().backward()

    life()  # what is made once stays
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        life()
        assert tensors() == before
    finally:
        gc.enable()
