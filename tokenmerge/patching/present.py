"""Whether what patching put on upstream's modules is still on those that run: modules may be exchanged after it."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenmerge.errors import PatchError
from tokenmerge.patching.families.family import BlockFamily


def has_hook(module: nn.Module, hook: Any) -> bool:
    """Whether a module calls that function after its forward, or before it; one that was compiled, by what is inside."""
    module = _compiled(module)
    return hook in module._forward_hooks.values() or hook in module._forward_pre_hooks.values()


def _compiled(module: nn.Module) -> nn.Module:
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def check_inside(family: BlockFamily, block: Any, index: int) -> None:
    """Raise `PatchError` unless the parts of a block's attention that run are those that patching reached.

    A layer that was put around another one since (an adapter) would be left out of matching, and one that takes the place of
    another (a dropout) would let sizes go, both in silence.
    """
    try:
        missing = (
            any(not has_hook(module, family.tap) for module in family.keys(block))
            or any(not has_hook(module, hook) for module, hook in family.hooks(block))
            or any(not has_hook(module, hook) for module, hook in family.answers(block))
            or any(not isinstance(_compiled(module), mixin) for module, mixin in family.mixins(block))
        )
    except AttributeError:  # what a part is looked for in is another module
        missing = True
    if missing:
        raise PatchError(
            f"a module inside the attention of block {index} was exchanged or wrapped since the model was patched, and merging does "
            "not reach the new one: unpatch before changing modules (adapters, layers), and patch again"
        )
