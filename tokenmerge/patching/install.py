"""Installation of hooks, classes and records on upstream's modules, and their removal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tokenmerge.attention.tap import note_input
from tokenmerge.patching.block import MergeBlock
from tokenmerge.patching.entering import enter_root, leave_root
from tokenmerge.patching.families.family import BlockFamily
from tokenmerge.patching.hooks import (
    CarryThrough,
    collect,
    collect_if_asked,
    end_collecting,
    note_grid,
    unmerge_input,
)
from tokenmerge.patching.record import RECORD, BlockRecord, ModelRecord
from tokenmerge.patching.swap import Swapped, check_restorable, is_ours, restore_class, swap_class
from tokenmerge.patching.target import Target


def install_inside(row: BlockFamily, block: Any) -> None:
    """Install on a block the hooks and mix-ins by which its attention shows K and takes the sizes."""
    for module in row.keys(block):
        if row.tap is note_input:
            module.register_forward_pre_hook(row.tap, with_kwargs=True)
        else:
            module.register_forward_hook(row.tap)
    for module, hook in row.hooks(block):
        module.register_forward_pre_hook(hook)
    for module, hook in row.answers(block):
        module.register_forward_hook(hook)
    for module, mixin in row.mixins(block):
        swap_class(module, mixin)


def install(target: Target, record: ModelRecord) -> None:
    """Install hooks, classes and records on a model; `restore` removes all of them."""
    model, family = target.model, target.family
    setattr(model, RECORD, record)
    _install_model(record, model)
    for index, (block, row) in enumerate(target.blocks):
        install_inside(row, block)
        rotary = family.rotary(model, index) if row.rope else None
        setattr(block, RECORD, BlockRecord(record, index, row, rotary))
        swap_class(block, MergeBlock)


def _install_model(record: ModelRecord, model: Any) -> None:
    """Install the hooks and mix-ins of everything around the blocks."""
    family = record.family
    if family.swap is not None:
        swap_class(model, family.swap)
    model.register_forward_pre_hook(enter_root)
    model.register_forward_hook(leave_root, always_call=True)
    embed = family.embed(model)
    for module in _told(record, [] if embed is None else [embed]):
        module.register_forward_hook(note_grid)
    for norm in _told(record, family.norms(model)):
        if not isinstance(norm, CarryThrough):  # the same norm may stand in two places
            swap_class(norm, CarryThrough)
    for module in _told(record, family.collectors(model)):
        module.register_forward_pre_hook(collect if family.always_collects else collect_if_asked, with_kwargs=True)
        module.register_forward_hook(end_collecting, always_call=True)
    for module, hook in family.hooks(model):
        module.register_forward_pre_hook(hook)
    for module in _told(record, family.readers(model)):
        module.register_forward_pre_hook(unmerge_input)


def _told(record: ModelRecord, modules: Iterable[nn.Module]) -> Iterable[nn.Module]:
    """Set the model's record on modules, whose hooks read it, and yield them."""
    for module in modules:
        setattr(module, RECORD, record)
        yield module


def restore(model: nn.Module) -> None:
    """Remove everything that `install` added; it searches the modules themselves, and therefore works on copies, too.

    Raises:
        PatchError: if something else has changed the class of a patched module since.
    """
    swapped: list[nn.Module] = [module for module in model.modules() if issubclass(type(module), Swapped)]
    for module in swapped:
        check_restorable(module)  # before anything is removed
    for module in swapped:
        restore_class(module)
    for module in model.modules():
        vars(module).pop(RECORD, None)
        remove_hooks(module)


def remove_hooks(module: nn.Module) -> None:
    """Remove this library's hooks one by one, because a deep copy has no `RemovableHandle`s."""
    tables = (
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
    )
    for hooks, flags in tables:
        for key, hook in list(hooks.items()):
            if is_ours(hook):
                del hooks[key]
                for flag in flags:
                    flag.pop(key, None)
