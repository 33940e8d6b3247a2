"""Start and end of a model's own call: detect changes since patching, and know which model runs its own blocks."""

from __future__ import annotations

import dataclasses
import sys
import threading
import weakref
from typing import Any

import torch
from torch import nn

from tokenmerge.errors import PatchError
from tokenmerge.flops import Ends
from tokenmerge.patching.hooks import forget_grid, note_grid, unmerge_input
from tokenmerge.patching.present import check_inside, has_hook
from tokenmerge.patching.record import RECORD, BlockRecord, ModelRecord


class _Entered(threading.local):
    """Models whose own methods are running in the current thread.

    Attributes:
        numbers: numbers of their records, outermost first.
        inside: whether there are any. Compiled code reads only this flag; reading `numbers` would recompile it per model.
    """

    def __init__(
        self,
    ) -> None:  # set from the start in each thread, because compiled code would depend on whether the attributes exist
        self.numbers: tuple[int, ...] = ()
        self.inside = False


_entered = _Entered()


def enter_root(module: Any, args: tuple[Any, ...] = ()) -> None:
    """Check a patched model for changes made without its handle; a forward pre-hook of the model.

    Raises:
        PatchError: if `r` was set on the model, or modules were added, exchanged or removed.
    """
    record: ModelRecord = getattr(module, RECORD)
    eager = not torch.compiler.is_compiling()
    if eager and record.number in _entered.numbers and _called_by_itself(module):
        _entered.numbers = (*_entered.numbers, record.number)
        return
    check_blocks(record, record.settings.layers, module)
    check_around(record, module)
    if not eager:  # Dynamo cannot read weak references
        _entered.inside = True
        return
    record.root = record.root or weakref.ref(module)
    count_again(record, module)
    forget_grid(record)
    outer = record.outer() if record.outer is not None else None
    for owner, own in zip((module, outer), record.own_r, strict=True):
        if owner is not None and not own and "r" in vars(owner):
            raise PatchError(
                f"r={vars(owner)['r']!r} was set on {type(owner).__name__}, which changes nothing: delete that attribute and write "
                "tokenmerge.handle_of(model).update(r=…)"
            )
    _entered.numbers, _entered.inside = (*_entered.numbers, record.number), True


def _called_by_itself(module: Any) -> bool:
    """Return whether the model's `__call__`, whose hook made the checks, is running and has called the present method.

    The frames are, from here outwards: `enter_root`, the mix-in's method, upstream's `forward`, and torch's code of `__call__`.
    """
    frame = sys._getframe(3)
    if frame.f_back is None or frame.f_back.f_code.co_filename != _CALLING:
        return False
    return frame.f_code.co_name == "forward" and frame.f_locals.get("self") is module


_CALLING = nn.Module._call_impl.__code__.co_filename


def leave_root(module: Any, args: tuple[Any, ...] = (), output: Any = None) -> None:
    """Note the end of a patched model's own call; a forward hook that also runs after an error."""
    if torch.compiler.is_compiling():
        _entered.inside = False
        return
    number, numbers = getattr(module, RECORD).number, _entered.numbers
    if number in numbers:  # absent if entering raised; calls further inside have ended together with this one
        numbers = numbers[: len(numbers) - 1 - numbers[::-1].index(number)]
    _entered.numbers, _entered.inside = numbers, bool(numbers)


def was_asked(record: ModelRecord) -> bool:
    """Return whether this model's own call began the pass; check the model now if other code runs its blocks.

    Raises:
        PatchError: see `check_around`.
    """
    if torch.compiler.is_compiling():
        return _entered.inside
    if record.number in _entered.numbers:
        return True
    model = None if record.root is None else record.root()
    if model is not None:
        check_blocks(record, record.settings.layers, model)
        check_around(record, model)
    return False


# --- what has changed --------------------------------------------------------------------------------------


def check_blocks(record: ModelRecord, layers: int, model: Any) -> None:
    """Raise unless the blocks that the model runs are the ones that were patched.

    Args:
        record: record of the model.
        layers: number of patched blocks.
        model: the model.

    Raises:
        PatchError: if blocks were added, removed or exchanged.
    """
    try:
        blocks = record.family.blocks(model)
    except AttributeError:
        blocks = []
    if len(blocks) != layers:
        raise PatchError(
            f"the model has {len(blocks)} blocks, but {layers} were patched: unpatch before adding or removing blocks, and patch "
            "again"
        )
    for index, block in enumerate(blocks):
        own: BlockRecord | None = getattr(block, RECORD, None)
        strange = own is None or own.index != index
        if own is not None and not torch.compiler.is_compiling():
            strange = strange or own.model is not record
        if strange:
            raise PatchError(
                f"block {index} is not the one that was patched: unpatch before exchanging blocks, and patch again"
            )


def check_around(record: ModelRecord, model: Any) -> None:
    """Raise unless the patch still covers every module that runs in the blocks and after them.

    Raises:
        PatchError: if such a module was exchanged, or the number of prefix tokens changed.
    """
    settings, family = record.settings, record.family
    if not settings.merges:
        return
    for index, block in enumerate(family.blocks(model)):
        check_inside(getattr(block, RECORD).family, block, index)
    prefix = family.protected(model)
    if prefix != settings.protected:
        raise PatchError(
            f"the model has {prefix} prefix tokens, but {settings.protected} when it was patched: unpatch before changing them, and patch "
            "again"
        )
    reasons = [] if settings.full_output else family.merged_output(model)
    if reasons:
        raise PatchError(
            f"the model has changed since it was patched with output='merged': {'; '.join(reasons)}; use "
            "handle.update(output='full')"
        )
    for reader in family.readers(model):
        if not has_hook(reader, unmerge_input):
            raise PatchError(
                f"{type(reader).__name__}, which reads all tokens, has taken another's place since the model was patched: unpatch "
                "before exchanging it, and patch again"
            )
    if not torch.compiler.is_compiling():
        _watch_embedding(record, model)


def _embedding(record: ModelRecord, model: Any) -> nn.Module | None:
    """Return the module that makes the patches; `None` if there is none, or its attribute was replaced."""
    try:
        return record.family.embed(model)
    except AttributeError:
        return None


def _watch_embedding(record: ModelRecord, model: Any) -> None:
    """Register the hook that records the grid on an embedding that replaced the old one."""
    if record.embed is not None:
        try:
            if has_hook(model.get_submodule(record.embed), note_grid):  # the usual case, which needs no search
                return
        except AttributeError:  # the module has moved
            pass
    embed = _embedding(record, model)
    if embed is None:
        return
    if not has_hook(embed, note_grid):
        setattr(embed, RECORD, record)
        embed.register_forward_hook(note_grid)
        record.embeddings = (*record.embeddings, weakref.ref(embed))
    record.embed = next((name for name, module in model.named_modules() if module is embed), None)


def count_again(record: ModelRecord, model: Any) -> None:
    """Update the model's cost if the schedule depends on it and the model's head or embedding was exchanged."""
    settings, family = record.settings, record.family
    if settings.config.flops is None and settings.config.speedup is None:
        return
    parts = [part for part in (*model._modules.values(), _embedding(record, model)) if part is not None]
    numbers = [(id(part), sum(p.numel() for p in part._parameters.values() if p is not None)) for part in parts]
    ends = (*numbers, family.tokens(model))
    if record.ends is not None and record.ends != ends:
        found = Ends(*family.cost(model)).plus(record.around)._asdict()
        cost = dataclasses.replace(settings.cost, tokens=family.tokens(model), **found)
        cost = cost.with_full_output() if settings.full_output else cost
        if cost != settings.cost:
            record.settings = dataclasses.replace(settings, cost=cost)
    record.ends = ends
