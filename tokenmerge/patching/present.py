"""Checks that modules in use still carry the hooks and mix-ins of patching, since modules may be exchanged afterwards."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenmerge.errors import PatchError
from tokenmerge.patching.families.family import BlockFamily


def has_hook(module: nn.Module, hook: Any) -> bool:
    """Return whether a module has this forward hook or pre-hook; for a compiled module, its inner module is checked."""
    module = _compiled(module)
    return hook in module._forward_hooks.values() or hook in module._forward_pre_hooks.values()


def _compiled(module: nn.Module) -> nn.Module:
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def check_inside(family: BlockFamily, block: Any, index: int) -> None:
    """Raise unless the parts of a block's attention carry the hooks and mix-ins that patching installed.

    Otherwise matching would silently ignore a layer that was wrapped around another one later (an adapter), and sizes would be
    lost silently where a new layer replaced another one (a dropout).

    Args:
        family: row of the block.
        block: the block.
        index: position of the block, from 0.

    Raises:
        PatchError: if a part was exchanged or wrapped since.
    """
    try:
        present = _all_present(family, block)
    except AttributeError:  # the parent of a part was exchanged, and the new one lacks the part
        present = False
    if not present:
        raise PatchError(
            f"a module inside the attention of block {index} was exchanged or wrapped since the model was patched, and merging does "
            "not reach the new one: unpatch before changing modules (adapters, layers), and patch again"
        )


def _all_present(family: BlockFamily, block: Any) -> bool:
    # plain loops: this runs for every block in every pass, and a generator for each question takes longer than the question
    for module in family.keys(block):
        if not has_hook(module, family.tap):
            return False
    for module, hook in family.hooks(block):
        if not has_hook(module, hook):
            return False
    for module, hook in family.answers(block):
        if not has_hook(module, hook):
            return False
    return all(isinstance(_compiled(module), mixin) for module, mixin in family.mixins(block))
