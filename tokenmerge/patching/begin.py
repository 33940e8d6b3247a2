"""Start of a forward pass: number of tokens, padding from attention masks, and coordinates."""

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
from tokenmerge.patching.log import log_cut
from tokenmerge.patching.record import BlockRecord
from tokenmerge.patching.running import runs_by_hand
from tokenmerge.patching.state import GRID, UNMERGED, Pass, TokenState, attach, state_of
from tokenmerge.schedule import cut

_MASKED = -1e4  # additive masks mark padding by −inf or by the smallest number of their dtype


def padding_sizes(mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """Return the first sizes `[B, N]` float32: 1 for tokens, 0 for padding; `None` without a mask.

    Args:
        mask: `[B or 1, 1, 1 or N, N]`, boolean (true = attend) or additive (0 = attend); all queries that are not padding
            must see the same tokens.
        batch: B.
        tokens: N.

    Raises:
        PatchError: if the mask does anything but mask padding, because merged tokens cannot support that.
    """
    if mask is None:
        return None
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] != tokens or mask.shape[2] not in (1, tokens):
        raise PatchError(
            f"an attention mask of shape {tuple(mask.shape)} was given to a model that merges tokens, but only padding "
            f"masks [B, 1, 1, {tokens}] fit merged tokens: call the model without it, or handle.update(r=0) first"
        )
    seen = (mask if mask.dtype == torch.bool else mask > _MASKED)[:, 0]
    valid = seen.any(dim=1)  # tokens that some query sees; queries that are padding may see anything
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
    """Return whether a tensor passed as a bias `[1, H, N₀, N₀]` is a padding mask `[B, 1, 1 or N, N]` instead.

    Args:
        bias: the tensor, or `None`.
        check: whether to check its values, too.

    Raises:
        PatchError: if it combines relative positions and padding, which cannot be separated.
    """
    if bias is None:
        return False
    if bias.shape[1] == 1:  # relative positions differ between heads, padding does not
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
    """Return the metric with one more channel, so that padding is similar to padding and dissimilar to every token.

    The cosine similarity of two tokens becomes (1 + cos)/2, which keeps the order. Padding has similarity 1 to padding, so it
    merges first, and −1/√2 to tokens, so the two merge only if a token has no other partner; because padding has size 0,
    such a merge changes nothing.

    Args:
        metric: `[B, N, D]`, any floating dtype.
        size: patches per token `[B, N]`; 0 for padding.

    Returns:
        Metric `[B, N, D + 1]`, without gradient.
    """
    real = (size > 0).unsqueeze(2)
    return torch.cat([torch.where(real, unit(metric.detach()), 0.0), torch.where(real, 1.0, -1.0)], dim=2)


def _grid_of(given: Tensor, record: BlockRecord) -> tuple[int, ...] | None:
    """Return the grid of the tokens with which a pass begins; a tensor that begins several passes keeps its first grid."""
    if torch.compiler.is_compiling():
        return take_grid(record.model)
    # the version tells later contents of the same memory apart, such as those of the static input of a CUDA graph
    key = (record.model.number, None if given.is_inference() else given._version)
    known: dict[tuple[int, int | None], tuple[int, ...] | None] = getattr(given, GRID, {})
    if key not in known:
        known = {key: take_grid(record.model), **{other: grid for other, grid in known.items() if other[0] != key[0]}}
        setattr(given, GRID, known)
    return known[key]


def begin_pass(record: BlockRecord, x: Tensor, mask: Tensor | None, given: Tensor, again: bool = False) -> TokenState:
    """Return the state of tokens before any merge.

    Args:
        record: record of the block.
        x: tokens `[B, N, C]`.
        mask: padding mask, or `None`.
        given: the tensor that the block was called with, which hooks may have replaced by `x`.
        again: whether backward is running, in which gradient checkpointing recomputes a pass (or a hook runs one).

    Raises:
        PatchError: if earlier blocks merge, so that the tokens should carry a state, or the mask is not a padding mask.
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
        full = full or settings.full_output  # the user's code runs the blocks, and may read the output of each
    grid = _grid_of(given, record)
    if grid is not None and math.prod(grid) != tokens - settings.protected:
        grid = None  # patches were dropped or masked out after the embedding
    entry = settings.entry
    if not (entry.adaptive or entry.learned):  # such matchers may leave other numbers of tokens
        asked, schedule = schedule, cut(schedule, tokens, settings.protected, entry.most)
        if not torch.compiler.is_compiling():
            log_cut(settings, tokens, asked, schedule)
    run = Pass(settings, batch, tokens, grid, schedule, full, size, size is not None)
    state = TokenState(run, size)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        before = state_of(given)  # gradient checkpointing finds the attached state when it recomputes the block
        same = not hasattr(given, UNMERGED) and (
            before is None or (before.run.settings is settings and before.run.full == run.full)
        )
        attach(given, state if same else dataclasses.replace(state, run=dataclasses.replace(run, ambiguous=True)))
    return state


def with_positions(block: Any, x: Tensor, state: TokenState, given: dict[str, Any]) -> TokenState:
    """Return the state with the coordinates of its tokens, read in the first block that merges.

    Args:
        block: the patched block.
        x: tokens `[B, N, C]`.
        state: state of the tokens.
        given: arguments for attention, which may include the rotary table.

    Raises:
        PatchError: if the positions are for another number of tokens.
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
