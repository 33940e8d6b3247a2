"""Hooks around the blocks: record the grid before the first block, pass sizes through norms, and unmerge for readers.

Hooks are module-level functions, because closures would break when a model is copied.
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
    """Facts recorded before the first block, which reads them; each thread has its own.

    Compiled code reads only `full` and `grid`; reading which model they belong to would recompile it for every model.

    Attributes:
        full: whether passes are to return unmerged tokens from every block.
        wishes: requests for that: the number of a model's record, and the module within whose call the request holds (`None`
            for `full_outputs`).
        owner: that module, if the request was made in compiled code.
        grid: patches along each axis from a model's embedding; empty if several embeddings ran before their blocks and their
            grids differ.
        grid_of: number of that model's record.
        waiting: how often that embedding ran without its blocks having run yet.
    """

    def __init__(self) -> None:  # runs in each thread
        # set from the start, because code compiled without an attribute is not recompiled when the attribute appears
        self.full = False
        self.wishes: tuple[tuple[int, nn.Module | None], ...] = ()
        self.owner: nn.Module | None = None
        self.grid: tuple[int, ...] | None = None
        self.grid_of: int | None = None
        self.waiting = 0


_ahead = _Ahead()


def full_wanted(record: ModelRecord) -> bool:
    """Return whether passes of this model that begin now in this thread are to return unmerged tokens from every block."""
    if torch.compiler.is_compiling():
        return _ahead.full
    _drop_stale()
    return _ahead.full and (not _ahead.wishes or any(number == record.number for number, _ in _ahead.wishes))


def _drop_stale() -> None:
    """Drop the requests of modules that ended without calling their hooks: torch calls none after a KeyboardInterrupt."""
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
    """Return the grid that this model's embedding has just recorded in this thread, and forget it; `None` if unknown."""
    if torch.compiler.is_compiling():  # the embedding is in the same compiled code, or the number of tokens must do
        grid, _ahead.grid = _ahead.grid, None
        return grid or None
    if _ahead.grid_of != record.number:
        return None
    grid, _ahead.waiting = _ahead.grid, _ahead.waiting - 1
    if _ahead.waiting <= 0:
        forget_grid()
    return grid or None


def forget_grid(record: ModelRecord | None = None) -> None:
    """Forget grids recorded by the embedding of one model, or of any, because the next pass does not begin with them."""
    if record is not None and _ahead.grid_of != record.number:
        return
    _ahead.grid = _ahead.grid_of = None
    _ahead.waiting = 0


def note_grid(module: Any, args: tuple[Any, ...], output: Any) -> None:
    """Record the grid: a forward hook of the module that makes the patches.

    The module returns `[B, C, *grid]`, or its tokens and their grid (`None` if images of one batch have different grids).
    """
    found = output[1] if isinstance(output, tuple) else output.shape[2:]
    grid = None if found is None else tuple(found)
    if torch.compiler.is_compiling():
        _ahead.grid = grid
        return
    record = getattr(module, RECORD, None)
    if record is None:  # a copy of the module with its hooks only, as quantisation makes
        return
    number = record.number
    if _ahead.grid_of != number:
        forget_grid()
    if _ahead.waiting and _ahead.grid != grid:
        grid = ()  # it is unknown which of the grids the next blocks use
    _ahead.grid, _ahead.grid_of, _ahead.waiting = grid, number, _ahead.waiting + 1


@contextlib.contextmanager
def full_outputs(record: ModelRecord) -> Iterator[None]:
    """Make passes of this model that begin within the context return unmerged tokens, also when backward recomputes them."""
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
    """Request full outputs if the caller collects hidden states (`output_hidden_states`); a forward pre-hook."""
    wanted = kwargs.get("output_hidden_states")
    if wanted is None:
        wanted = getattr(getattr(module, "config", None), "output_hidden_states", False)
    if wanted is not False and wanted is not None:
        collect(module, args, kwargs)


def collect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Request full outputs while a backbone runs, which always collects hidden states; a forward pre-hook."""
    if torch.compiler.is_compiling():
        if not _ahead.full:
            _ahead.full, _ahead.owner = True, module
        return
    _drop_stale()
    record: ModelRecord = getattr(module, RECORD)
    if not any(number == record.number for number, _ in _ahead.wishes):
        _wish((*_ahead.wishes, (record.number, module)))


def end_collecting(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """End a module's request for full outputs; a forward hook that also runs after an error."""
    if _ahead.owner is module:
        _ahead.full, _ahead.owner = False, None
    if not torch.compiler.is_compiling():
        _wish(tuple(wish for wish in _ahead.wishes if wish[1] is not module))


def unmerge_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Replace merged tokens by unmerged ones; a forward pre-hook of heads that read all tokens without sizes.

    Raises:
        PatchError: if the tokens carry no state, or a state without the plans of their merges.
    """
    record: ModelRecord = getattr(module, RECORD)
    reader = type(module).__name__
    state = needed_state(args[0], reader) if record.settings.merges else state_of(args[0])
    if state is None or state.merged is not None:
        return None
    return (plans_needed(state, reader).unmerge(args[0]), *args[1:])


class CarryThrough:
    """Mix-in for modules that map tokens one by one, such as the final norm: the state of the input passes to the output.

    This is not a hook, because hooks that run before it may replace the input by a new tensor, as FSDP2's do.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, and attach the state of its input to its output."""
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]  # nn.Module's
        state = state_of(args[0]) if args else None
        if state is not None and state_of(output) is None:
            attach(output, state)
        return output

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Run upstream's forward; torch.fx traces it as one node, so that the state passes through in its graphs, too."""
        if isinstance(x, Proxy) and getattr(self, RECORD).settings.merges:
            return as_leaf(self, x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # upstream's comes next
