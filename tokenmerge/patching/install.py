"""Putting hooks and classes on upstream's modules, and taking the hooks off again."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenmerge.attention.tap import note_input
from tokenmerge.patching.block import MergeBlock
from tokenmerge.patching.families.family import BlockFamily, ModelFamily
from tokenmerge.patching.state import CarryThrough, end_wish, note_wish, unmerge_input, wish_always, wish_hidden_states
from tokenmerge.patching.swap import swap_class


def install_inside(row: BlockFamily, block: Any) -> None:
    """What a block's attention needs to show K and to take sizes."""
    for module in row.keys(block):
        if row.tap is note_input:
            module.register_forward_pre_hook(row.tap, with_kwargs=True)
        else:
            module.register_forward_hook(row.tap)
    for module, hook in row.hooks(block):
        module.register_forward_pre_hook(hook)
    for module, mixin in row.mixins(block):
        swap_class(module, mixin)


def install_block(row: BlockFamily, block: Any) -> None:
    """Make one block merge."""
    install_inside(row, block)
    swap_class(block, MergeBlock)


def install_model(family: ModelFamily, model: Any) -> None:
    """What surrounds the blocks."""
    if family.swap is not None:
        swap_class(model, family.swap)
    family.blocks(model)[0].register_forward_pre_hook(note_wish, with_kwargs=True)
    for norm in family.norms(model):
        if not isinstance(norm, CarryThrough):  # one norm in two places
            swap_class(norm, CarryThrough)
    for module in family.collectors(model):
        wish = wish_always if family.always_collects else wish_hidden_states
        module.register_forward_pre_hook(wish, with_kwargs=True)
        module.register_forward_hook(end_wish, always_call=True)
    for module in family.readers(model):
        module.register_forward_pre_hook(unmerge_input)


def remove_hooks(module: nn.Module) -> None:
    """Remove our hooks; found by where they were written, because a deep copy has no `RemovableHandle`s."""
    tables = (
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
    )
    for hooks, flags in tables:
        for key, hook in list(hooks.items()):
            if (getattr(hook, "__module__", None) or "").startswith("tokenmerge."):
                del hooks[key]
                for flag in flags:
                    flag.pop(key, None)
