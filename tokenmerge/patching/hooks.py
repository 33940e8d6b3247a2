"""What surrounds the blocks: what is noted before the first one, and how sizes pass norms and reach readers.

Hooks are module-level functions: closures would break when a model is copied.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Proxy

from tokenmerge.errors import PatchError
from tokenmerge.flops import Ends
from tokenmerge.patching.leaf import as_leaf
from tokenmerge.patching.present import check_inside, has_hook
from tokenmerge.patching.record import RECORD, BlockRecord, ModelRecord
from tokenmerge.patching.state import attach, needed_state, plans_needed, state_of


class _Ahead(threading.local):
    """What is known before the first block, which takes it; one per thread.

    Compiled code looks at `full` and `grid` alone: it would be compiled anew for every model, if it knew which one.

    Attributes:
        full: whether passes are to hand on unmerged tokens.
        wishes: for which models, by the numbers of their records, each with the module within which that holds (`None` for
            `full_outputs`).
        owner: that module, where the wish is met in compiled code.
        grid: patches along each axis that the embedding of a model has made; empty where several embeddings wait for
            their blocks and differ.
        grid_of: the number of that model's record.
        waiting: how many embeddings of that model wait.
        entered: the number of the record of the model whose own methods run, until its first block takes it.
    """

    def __init__(self) -> None:  # in each thread
        # set from the start: code that was compiled while one was missing is not compiled anew when it is there
        self.full = False
        self.wishes: tuple[tuple[int, nn.Module | None], ...] = ()
        self.owner: nn.Module | None = None
        self.grid: tuple[int, ...] | None = None
        self.grid_of: int | None = None
        self.waiting = 0
        self.entered: int | None = None


_ahead = _Ahead()


def full_wanted(record: ModelRecord) -> bool:
    """Whether passes of that model that begin now in this thread hand on unmerged tokens."""
    if torch.compiler.is_compiling():
        return _ahead.full
    _drop_stale()
    return _ahead.full and (not _ahead.wishes or any(number == record.number for number, _ in _ahead.wishes))


def _drop_stale() -> None:
    """Forget the wishes of modules that have ended without saying so: torch calls no hooks after a KeyboardInterrupt."""
    owners = [owner for _, owner in _ahead.wishes if owner is not None]
    if not owners and _ahead.owner is None:
        return
    running, frame = set(), cast("Any", sys._getframe(1))
    while frame is not None:
        running.add(id(frame.f_locals.get("self")))
        frame = frame.f_back
    if _ahead.owner is not None and id(_ahead.owner) not in running:
        _ahead.full, _ahead.owner = False, None
    _wish(tuple(wish for wish in _ahead.wishes if wish[1] is None or id(wish[1]) in running))


def _wish(wishes: tuple[tuple[int, nn.Module | None], ...]) -> None:
    _ahead.wishes, _ahead.full = wishes, bool(wishes) or _ahead.owner is not None


def take_grid(record: ModelRecord) -> tuple[int, ...] | None:
    """The grid that the embedding of this very model has just made in this thread, once; `None` if that is not known."""
    if torch.compiler.is_compiling():  # the code has the embedding in it, or the count of tokens must do
        grid, _ahead.grid = _ahead.grid, None
        return grid or None
    if _ahead.grid_of != record.number:
        return None
    grid, _ahead.waiting = _ahead.grid, _ahead.waiting - 1
    if _ahead.waiting <= 0:
        forget_grid()
    return grid or None


def forget_grid() -> None:
    """What was embedded so far is not what the next pass begins with."""
    _ahead.grid = _ahead.grid_of = None
    _ahead.waiting = 0


def note_grid(module: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of what makes patches: `[B, C, *grid]`, or tokens and their grid (`None` where images differ in it)."""
    found = output[1] if isinstance(output, tuple) else output.shape[2:]
    grid = None if found is None else tuple(found)
    if torch.compiler.is_compiling():
        _ahead.grid = grid
        return
    number = getattr(module, RECORD).number
    if _ahead.grid_of != number:
        forget_grid()
    if _ahead.waiting and _ahead.grid != grid:
        grid = ()  # which of them comes first cannot be told
    _ahead.grid, _ahead.grid_of, _ahead.waiting = grid, number, _ahead.waiting + 1


@contextlib.contextmanager
def full_outputs(record: ModelRecord) -> Iterator[None]:
    """Passes of that model that begin within it hand on unmerged tokens, also when they are run again in backward."""
    if torch.compiler.is_compiling():
        before, _ahead.full = _ahead.full, True
        try:
            yield
        finally:
            _ahead.full = before
        return
    wishes = _ahead.wishes
    _wish((*wishes, (record.number, None)))
    try:
        yield
    finally:
        _wish(wishes)


def collect_if_asked(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of modules that may collect what their blocks put out (`output_hidden_states`)."""
    wanted = kwargs.get("output_hidden_states")
    if wanted is None:
        wanted = getattr(getattr(module, "config", None), "output_hidden_states", False)
    if wanted is not False and wanted is not None:
        collect(module, args, kwargs)


def collect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The same for modules that always collect: backbones."""
    if torch.compiler.is_compiling():
        if not _ahead.full:
            _ahead.full, _ahead.owner = True, module
        return
    _drop_stale()
    record: ModelRecord = getattr(module, RECORD)
    if not any(number == record.number for number, _ in _ahead.wishes):
        _wish((*_ahead.wishes, (record.number, module)))


def end_collecting(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook, called also after an error: the wish for full outputs ends with its module."""
    if _ahead.owner is module:
        _ahead.full, _ahead.owner = False, None
    if not torch.compiler.is_compiling():
        _wish(tuple(wish for wish in _ahead.wishes if wish[1] is not module))


def check_root(module: Any, args: tuple[Any, ...] = ()) -> None:
    """Forward pre-hook of a patched model: what was changed behind the handle's back is noticed.

    Raises:
        PatchError: if `r` was set on the model, or blocks were added, exchanged or taken away.
    """
    record: ModelRecord = getattr(module, RECORD)
    check_blocks(record, record.settings.layers, module)
    check_around(record, module)
    if torch.compiler.is_compiling():  # Dynamo looks into no weak reference
        return
    record.root = record.root or weakref.ref(module)
    count_again(record, module)
    _ahead.entered = record.number
    if _ahead.grid_of == record.number:
        forget_grid()
    outer = record.outer() if record.outer is not None else None
    for owner, own in zip((module, outer), record.own_r, strict=True):
        if owner is not None and not own and "r" in vars(owner):
            raise PatchError(
                f"r={vars(owner)['r']!r} was set on {type(owner).__name__}, which changes nothing: delete that attribute and write "
                "tokenmerge.handle_of(model).update(r=…)"
            )


def check_around(record: ModelRecord, model: Any) -> None:
    """Raise `PatchError` unless patching reaches what runs, in the blocks and after them; modules may have been exchanged."""
    settings, family = record.settings, record.family
    if not settings.merges:
        return
    for index, block in enumerate(family.blocks(model)):
        check_inside(getattr(block, RECORD).family, block, index)
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
        watch_embedding(record, model)


def watch_embedding(record: ModelRecord, model: Any) -> None:
    """See the grid of an embedding that has taken another's place, for other patches or channels, as the old one's was."""
    if record.embed is not None:
        try:
            if has_hook(model.get_submodule(record.embed), note_grid):  # the usual case, without a search for it
                return
        except AttributeError:  # it is elsewhere now
            pass
    embed = record.family.embed(model)
    if embed is None:
        return
    if not has_hook(embed, note_grid):
        setattr(embed, RECORD, record)
        embed.register_forward_hook(note_grid)
    record.embed = next(name for name, module in model.named_modules() if module is embed)


def count_again(record: ModelRecord, model: Any) -> None:
    """Bring up to date what the model costs, where the schedule follows from that and its head or its embedding was exchanged."""
    settings, family = record.settings, record.family
    if settings.config.flops is None and settings.config.speedup is None:
        return
    parts = [*model._modules.values(), family.embed(model)]
    numbers = [(id(part), sum(p.numel() for p in part._parameters.values() if p is not None)) for part in parts if part]
    ends = (*numbers, family.tokens(model))
    if record.ends is not None and record.ends != ends:
        found = Ends(*family.cost(model))._asdict()
        cost = dataclasses.replace(settings.cost, tokens=family.tokens(model), **found)
        if cost != settings.cost:
            record.settings = dataclasses.replace(settings, cost=cost)
    record.ends = ends


def take_entered(record: ModelRecord) -> bool:
    """Whether the pass that begins was asked of this very model, once; if someone else runs its blocks, it is looked at now.

    Raises:
        PatchError: as `check_around`.
    """
    if torch.compiler.is_compiling():
        return True
    entered, _ahead.entered = _ahead.entered, None
    model = None if record.root is None else record.root()
    if entered != record.number and model is not None:
        check_blocks(record, record.settings.layers, model)
        check_around(record, model)
    return entered == record.number


def check_blocks(record: ModelRecord, layers: int, model: Any) -> None:
    """Raise `PatchError` unless the blocks that the model runs are those that were patched."""
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


def unmerge_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook of heads that read all tokens and know nothing of sizes: they get the unmerged ones.

    Raises:
        PatchError: if the tokens came without what says which patch each stands for.
    """
    record: ModelRecord = getattr(module, RECORD)
    reader = type(module).__name__
    state = needed_state(args[0], reader) if record.settings.merges else state_of(args[0])
    if state is None or state.merged is not None:
        return None
    return (plans_needed(state, reader).unmerge(args[0]), *args[1:])


class CarryThrough:
    """Mix-in before modules that map tokens one by one (the final norm): the state passes through.

    Not a hook, because hooks that ran before it may have put another tensor in place of what came in: FSDP2's do.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's call."""
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]  # nn.Module's
        state = state_of(args[0]) if args else None
        if state is not None and state_of(output) is None:
            attach(output, state)
        return output

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Upstream's; one call of this module where torch.fx traces the model, so that the state passes then, too."""
        if isinstance(x, Proxy) and getattr(self, RECORD).settings.merges:
            return as_leaf(self, x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # upstream's comes next
