"""What surrounds the blocks: what is noted before the first one, and how sizes pass norms and reach readers.

Hooks are module-level functions: closures would break when a model is copied.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Proxy

from tokenmerge.patching.leaf import as_leaf
from tokenmerge.patching.record import RECORD, ModelRecord
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
    """

    def __init__(self) -> None:  # in each thread
        # set from the start: code that was compiled while one was missing is not compiled anew when it is there
        self.full = False
        self.wishes: tuple[tuple[int, nn.Module | None], ...] = ()
        self.owner: nn.Module | None = None
        self.grid: tuple[int, ...] | None = None
        self.grid_of: int | None = None
        self.waiting = 0


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


def forget_grid(record: ModelRecord | None = None) -> None:
    """What was embedded so far, by that model or any, is not what the next pass begins with."""
    if record is not None and _ahead.grid_of != record.number:
        return
    _ahead.grid = _ahead.grid_of = None
    _ahead.waiting = 0


def note_grid(module: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of what makes patches: `[B, C, *grid]`, or tokens and their grid (`None` where images differ in it)."""
    found = output[1] if isinstance(output, tuple) else output.shape[2:]
    grid = None if found is None else tuple(found)
    if torch.compiler.is_compiling():
        _ahead.grid = grid
        return
    record = getattr(module, RECORD, None)
    if record is None:  # a copy that was made of the module and its hooks alone, as quantising does
        return
    number = record.number
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
