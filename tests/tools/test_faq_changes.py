"""What docs/faq.md answers about training, hooks and changes is what happens; see test_faq.py."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tokenmerge
from tests.helpers.faq import claim, said, small  # noqa: F401  (a fixture that every test here uses)
from tests.helpers.tiny import images_for
from tests.helpers.towers import BY_NAME
from tokenmerge import PatchError

# --- training, hooks and changes ---------------------------------------------------------------------------


def gradients(model: Any, out: Tensor) -> Tensor:
    model.zero_grad()
    out.square().sum().backward()
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


@claim(
    "Does it work with gradient checkpointing?",
    "around blocks with `use_reentrant=False`, and around the whole model with either kind",
    "Reentrant and nested checkpoints between blocks create new tensors, which lose the sizes; they are refused with advice.",
)
def test_checkpointing() -> None:
    model = small()
    images = images_for(model).requires_grad_()
    tokenmerge.patch(model, r=5)
    wanted = gradients(model, model(images))
    for reentrant in (False, True):
        assert torch.equal(gradients(model, checkpoint(model, images, use_reentrant=reentrant)), wanted)

    def through(x: Tensor, reentrant: bool, nested: bool = False) -> Any:
        x = model._pos_embed(model.patch_embed(x))
        if nested:
            first, second, third = model.blocks
            inner = functools.partial(checkpoint, second, use_reentrant=False)
            return third(checkpoint(lambda y: inner(first(y)), x, use_reentrant=False))
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return model.forward_head(model.norm(x))

    assert torch.equal(gradients(model, through(images, reentrant=False)), wanted)
    for options in ({"reentrant": True}, {"reentrant": False, "nested": True}):
        with pytest.raises(PatchError, match="use_reentrant=False"):
            gradients(model, through(images, **options))


@claim(
    "Does it work with hooks, adapters, steering vectors?",
    "Without `carry` the next block raises an error, and so does a block whose pre-hook passes it another tensor on the same "
    "device and of the same dtype.",
    "Tensors that were moved or cast, as by device maps, are accepted",
    "Full backward hooks need no `carry`.",
)
def test_hooks() -> None:
    model = small()
    images = images_for(model)
    tokenmerge.patch(model, r=5)
    wanted = model(images)

    def after(change: Any) -> Any:
        return model.blocks[0].register_forward_hook(lambda block, args, output: change(output))

    hook = after(lambda output: tokenmerge.carry(output + 0, like=output))
    torch.testing.assert_close(model(images), wanted)
    hook.remove()
    hook = after(lambda output: output + 0)
    with pytest.raises(PatchError, match=r"tokenmerge\.carry"):
        model(images)
    hook.remove()
    before: dict[str, Any] = {"another": lambda x: x + 0, "cast": lambda x: x.double()}
    for name, change in before.items():
        twin = copy.deepcopy(model)
        twin.blocks[1].register_forward_pre_hook(lambda block, args, change=change: (change(args[0]), *args[1:]))
        if name == "cast":
            twin.blocks[1:].double(), twin.norm.double(), twin.head.double()
            torch.testing.assert_close(twin(images), wanted.double(), atol=1e-4, rtol=1e-4)
        else:
            with pytest.raises(PatchError, match=r"tokenmerge\.carry"):
                twin(images)
    seen: list[Any] = []
    model.blocks[1].register_full_backward_hook(lambda module, given, out: seen.append(out[0].shape))
    model(images).sum().backward()
    assert seen == [(2, 27, 48)]


@claim(
    "May settings change while the model runs?",
    "A pass ends with the settings that it began with, and the next pass uses the new ones.",
    "`remove` is refused while a pass runs, also from a hook of that pass.",
)
@torch.no_grad()
def test_changes_while_it_runs() -> None:
    model = small()
    images = images_for(model)
    handle = tokenmerge.patch(model, r=5)
    hook = model.blocks[1].register_forward_hook(lambda *_: handle.update(r=2))
    assert [model.forward_features(images).shape[1] for _ in range(2)] == [22, 31]
    hook.remove()
    model.blocks[1].register_forward_hook(lambda *_: handle.remove())
    with pytest.raises(PatchError, match="is running"):
        model(images)


@claim(
    "May I replace or add modules of a patched model?",
    "Not blocks, nor modules on which merging has placed a hook: a projection of keys",
    "The next pass raises an error. Unpatch, change the model, then patch again.",
    "A classifier may be replaced",
    "a FLOPs target then applies to the new model",
)
@torch.no_grad()
def test_exchanged_modules() -> None:
    for change in ("block", "keys"):
        model: Any = small() if change == "block" else BY_NAME["ViTModel"].build()
        feed = {"x": images_for(model)} if change == "block" else BY_NAME["ViTModel"].feed(2)
        handle = tokenmerge.patch(model, r=5)
        if change == "block":
            model.blocks[1] = copy.deepcopy(small().blocks[1])
        else:
            name = next(name for name, part in model.named_modules() if name.endswith(("key", "k_proj")))
            model.set_submodule(name, copy.deepcopy(nn.Linear(48, 48)))
        with pytest.raises(PatchError):
            model(**feed)
        handle.remove()
        with tokenmerge.patched(model, r=5):
            model(**feed)
    model = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=10).eval()
    handle = tokenmerge.patch(model, flops=0.7)
    before = handle.schedule
    model.reset_classifier(100_000)
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 100_000)
    assert handle.schedule != before


@claim(
    "May I run the blocks myself?",
    'Where the model returns full tokens (`output="full"`), so does each block then',
    "where it returns merged ones, `tokenmerge.token_sizes(x)` gives the number of patches per token",
    "Another model that shares the blocks cannot run them: it raises an error.",
)
@torch.no_grad()
def test_own_loops_over_blocks() -> None:
    for output in ("full", "merged"):
        model = small()
        with tokenmerge.patched(model, r=5, output=output):
            x = model._pos_embed(model.patch_embed(images_for(model)))
            for number, block in enumerate(model.blocks, 1):
                x = block(x)
                assert x.shape[1] == (37 if output == "full" else 37 - 5 * number)
                assert tokenmerge.token_sizes(x).sum(dim=1).tolist() == [37, 37]
    other = small()
    other.blocks = model.blocks
    with tokenmerge.patched(model, r=5), pytest.raises(PatchError, match="inside another"):
        other(images_for(other))
