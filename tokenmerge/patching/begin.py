"""How a pass begins: what is seen of its tokens, padding read off attention masks, and their coordinates."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from tokenmerge.errors import PatchError
from tokenmerge.ops.basics import is_exporting, unit
from tokenmerge.ops.modes import require
from tokenmerge.patching.entering import was_asked
from tokenmerge.patching.hooks import full_wanted, take_grid
from tokenmerge.patching.record import BlockRecord
from tokenmerge.patching.running import runs_by_hand
from tokenmerge.patching.state import GRID, UNMERGED, Pass, TokenState, attach, state_of
from tokenmerge.schedule import cut

_MASKED = -1e4  # additive masks use −inf or the smallest number of their dtype


def padding_sizes(mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """`[B, N]` float32 with 1 for tokens and 0 for padding; `None` without a mask.

    Args:
        mask: boolean (true = attend) or additive (0 = attend), `[B or 1, 1, 1 or N, N]`; every query that is
            no padding must see the same tokens.
        batch: B.
        tokens: N.

    Raises:
        PatchError: if the mask is anything but padding: then merged tokens cannot obey it.
    """
    if mask is None:
        return None
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] != tokens or mask.shape[2] not in (1, tokens):
        raise PatchError(
            f"an attention mask of shape {tuple(mask.shape)} was given to a model that merges tokens, but only padding "
            f"masks [B, 1, 1, {tokens}] fit merged tokens: call the model without it, or handle.update(r=0) first"
        )
    seen = (mask if mask.dtype == torch.bool else mask > _MASKED)[:, 0]
    valid = seen.any(dim=1)  # what any query sees; queries that are padding may see anything
    if not is_exporting():
        asks = valid.unsqueeze(2) if mask.shape[2] == tokens else torch.ones_like(seen[:, :, :1])
        fits = ((seen == valid.unsqueeze(1)) | ~asks).all()
        if mask.dtype != torch.bool:
            fits = fits & ((mask == 0) | (mask <= _MASKED)).all()
        require(
            fits,
            "the attention mask given to a model that merges tokens is more than padding (its queries see different "
            "tokens, or it holds a bias): merged tokens cannot obey it; run the images one by one or without it",
            PatchError,
        )
    return valid.to(torch.float32).expand(batch, -1)


def padding_in_pairs(bias: Tensor | None, check: bool) -> bool:
    """Whether what came as a bias `[1, H, N0, N0]` between tokens is a padding mask `[B, 1, 1 or N, N]` instead.

    Args:
        bias: what was given, or `None`.
        check: whether to look at its values, too.

    Raises:
        PatchError: if it is both in one, which cannot be taken apart.
    """
    if bias is None:
        return False
    if bias.shape[1] == 1:  # the same for every head: padding, not relative positions
        return True
    both = (
        "the mask given holds relative positions and padding in one, and merged tokens cannot obey it: "
        "run the images one by one, or without the mask"
    )
    if bias.shape[0] > 1:
        raise PatchError(both)
    if check and not is_exporting():
        require((bias > _MASKED).all(), both, PatchError)
    return False


def apart_from_padding(metric: Tensor, size: Tensor) -> Tensor:
    """The metric with one more axis, so that padding is like padding and unlike every token.

    Cosine similarity of two tokens becomes (1 + cos)/2, the same order; of padding with padding 1, so that it
    merges first; of a token with padding −1/√2, so that they meet only where a token has no other partner
    (and then padding, having size 0, changes nothing).
    """
    real = (size > 0).unsqueeze(2)
    return torch.cat([torch.where(real, unit(metric.detach()), 0.0), torch.where(real, 1.0, -1.0)], dim=2)


def _grid_of(given: Tensor, record: BlockRecord) -> tuple[int, ...] | None:
    """The grid of the tokens that a pass begins with; a tensor that begins several keeps that of the first."""
    if torch.compiler.is_compiling():
        return take_grid(record.model)
    # what is written into the same memory later, as into the static input of a CUDA graph, is other tokens
    key = (record.model.number, None if given.is_inference() else given._version)
    known: dict[tuple[int, int | None], tuple[int, ...] | None] = getattr(given, GRID, {})
    if key not in known:
        known = {key: take_grid(record.model), **{other: grid for other, grid in known.items() if other[0] != key[0]}}
        setattr(given, GRID, known)
    return known[key]


def begin_pass(record: BlockRecord, x: Tensor, mask: Tensor | None, given: Tensor, again: bool = False) -> TokenState:
    """The state of tokens that nothing has merged yet: counted, and on their grid, as they arrive.

    Args:
        record: of the block.
        x: the tokens.
        mask: of padding.
        given: the tensor that the block was called with, in whose place hooks may have put `x`.
        again: whether this happens in backward, where gradient checkpointing runs a pass again (or a hook runs one).

    Raises:
        PatchError: if blocks before this one have merged, so that a state should have come, or the mask is no padding.
    """
    settings, (batch, tokens) = record.model.settings, x.shape[:2]
    schedule = settings.schedule_for(tokens)
    if any(schedule[: record.index]) and again:
        raise PatchError(
            f"block {record.index} runs in backward on a tensor that was made anew, as reentrant or nested checkpointing does, so its "
            "sizes are lost: use use_reentrant=False, and let no checkpoint hold another"
        )
    if any(schedule[: record.index]):
        raise PatchError(
            f"block {record.index} received tokens without their sizes although earlier blocks merge, so something between the "
            "blocks made a new tensor (a hook, an adapter, reentrant checkpointing), or the model was patched while it ran: let "
            "hooks give tokenmerge.carry(new, like=old), and use use_reentrant=False"
        )
    full, size = full_wanted(record.model), padding_sizes(mask, batch, tokens)
    if not (again or was_asked(record.model)) and (torch.compiler.is_compiling() or runs_by_hand(record.model)):
        full = full or settings.full_output  # someone runs the blocks, and may read what each hands on
    grid = _grid_of(given, record)
    if grid is not None and math.prod(grid) != tokens - settings.protected:
        grid = None  # patches were dropped or masked out since
    entry = settings.entry
    if not (entry.adaptive or entry.learned):  # which may leave other numbers of tokens
        schedule = cut(schedule, tokens, settings.protected, entry.most)
    run = Pass(settings, batch, tokens, grid, schedule, full, size, size is not None)
    state = TokenState(run, size)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        before = state_of(given)  # gradient checkpointing finds what is attached when it runs the block again
        same = not hasattr(given, UNMERGED) and (
            before is None or (before.run.settings is settings and before.run.full == run.full)
        )
        attach(given, state if same else dataclasses.replace(state, run=dataclasses.replace(run, ambiguous=True)))
    return state


def with_positions(block: Any, x: Tensor, state: TokenState, given: dict[str, Any]) -> TokenState:
    """The state with the coordinates of its tokens, from the first block that needs to move them.

    Raises:
        PatchError: if there are positions for another number of tokens.
    """
    record: BlockRecord = block._tokenmerge
    family, protected = record.family, state.run.settings.protected
    if not state.run.schedule[record.index]:
        return state
    if family.positions is not None:
        positions = family.positions(block, x)
    elif family.rope is not None and record.rotary is not None and given.get(family.rope) is not None:
        positions = record.rotary.positions(given[family.rope])
    else:
        return state
    batch, tokens, _ = x.shape
    prefix = tokens - positions.shape[1]
    if prefix != protected:
        raise PatchError(
            f"block {record.index} received {tokens} tokens with positions for {positions.shape[1]}, but "
            f"{tokens - protected} were expected (all but the {protected} prefix tokens): do not drop tokens "
            "or change the image size of this model while it merges"
        )
    positions = torch.nn.functional.pad(positions.expand(batch, -1, -1), (0, 0, prefix, 0))
    return dataclasses.replace(state, positions=positions)
