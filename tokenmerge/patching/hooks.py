"""What surrounds the blocks: what is noted before the first one, and how sizes pass norms and reach readers.

Hooks are module-level functions: closures would break when a model is copied.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy

from tokenmerge.errors import PatchError
from tokenmerge.patching.leaf import as_leaf
from tokenmerge.patching.record import RECORD, BlockRecord, ModelRecord
from tokenmerge.patching.state import attach, needed_state, plans_needed, state_of


class _Ahead(threading.local):
    """What is known before the first block, which takes it; one per thread.

    Attributes:
        full: whether the pass shall hand on unmerged tokens.
        owner: the module within which it shall; `None` for `full_outputs`.
        grid: patches along each axis that the embedding of a model has made.
        grid_of: the number of that model's record.
    """

    full = False
    owner: nn.Module | None = None
    grid: tuple[int, ...] | None = None
    grid_of: int | None = None


_ahead = _Ahead()


def full_wanted() -> bool:
    """Whether passes that begin now in this thread hand on unmerged tokens."""
    _drop_stale()
    return _ahead.full


def _drop_stale() -> None:
    """Forget the wish of a module that has ended without saying so: torch calls no hooks after a KeyboardInterrupt."""
    if _ahead.owner is None or torch.compiler.is_compiling():
        return
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_locals.get("self") is _ahead.owner:
            return
        frame = frame.f_back
    _ahead.full, _ahead.owner = False, None


def take_grid(record: ModelRecord) -> tuple[int, ...] | None:
    """The grid that the embedding of this very model has just made in this thread, once; `None` if it made none."""
    grid = _ahead.grid
    # (compiled code would be compiled anew for every model; it has the embedding in it, or the count of tokens must do)
    if not torch.compiler.is_compiling() and _ahead.grid_of != record.number:
        grid = None
    _ahead.grid = _ahead.grid_of = None
    return grid


def note_grid(module: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of what makes patches: `[B, C, *grid]`, or tokens and their grid (`None` where images differ in it)."""
    grid = output[1] if isinstance(output, tuple) else output.shape[2:]
    _ahead.grid = None if grid is None else tuple(grid)
    if not torch.compiler.is_compiling():
        _ahead.grid_of = getattr(module, RECORD).number


@contextlib.contextmanager
def full_outputs() -> Iterator[None]:
    """Passes that begin within it hand on unmerged tokens; what a pass began with stays, also when it is recomputed."""
    before, _ahead.full = _ahead.full, True
    try:
        yield
    finally:
        _ahead.full = before


def collect_if_asked(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of modules that may collect what their blocks put out (`output_hidden_states`)."""
    wanted = kwargs.get("output_hidden_states")
    if wanted is None:
        wanted = getattr(getattr(module, "config", None), "output_hidden_states", False)
    if wanted is not False and wanted is not None:
        collect(module, args, kwargs)


def collect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The same for modules that always collect: backbones."""
    _drop_stale()
    if not _ahead.full:
        _ahead.full, _ahead.owner = True, module


def end_collecting(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook, called also after an error: the wish for full outputs ends with its module."""
    if _ahead.owner is module:
        _ahead.full, _ahead.owner = False, None


def check_root(module: Any, args: tuple[Any, ...] = ()) -> None:
    """Forward pre-hook of a patched model: what was changed behind the handle's back is noticed.

    Raises:
        PatchError: if `r` was set on the model, or blocks were added, exchanged or taken away.
    """
    record: ModelRecord = getattr(module, RECORD)
    check_blocks(record, record.settings.layers, module)
    if torch.compiler.is_compiling():  # Dynamo looks into no weak reference
        return
    outer = record.outer() if record.outer is not None else None
    for owner in (module, outer):
        if owner is not None and "r" in vars(owner):
            raise PatchError(
                f"r={vars(owner)['r']!r} was set on {type(owner).__name__}, which changes nothing: delete that attribute and write "
                "tokenmerge.handle_of(model).update(r=…)"
            )


def check_blocks(record: ModelRecord, layers: int, model: Any) -> None:
    """Raise `PatchError` unless the blocks that the model runs are those that were patched."""
    blocks = record.family.blocks(model)
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
        if isinstance(x, Proxy):
            return as_leaf(self, x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # upstream's comes next
