"""Merging over time in clips: which merges join tokens of one moment, and which join moments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.plan import MergePlan, source_map


@dataclasses.dataclass(frozen=True)
class Moments:
    """Merges of one block of a clip; a moment is a step along the time axis of the grid, such as the two frames of a tubelet.

    Attributes:
        block: index of the block.
        merged: number of merges in a clip, a mean over the batch.
        within: share of the merges that join two tokens of one and the same moment; NaN without merges.
        across: share of the other merges, which make a token that spans several moments; NaN without merges.
        spanned: number of moments that a token spans after the block, a mean over all tokens but class and register tokens.
    """

    block: int
    merged: float
    within: float
    across: float
    spanned: float


def moments_of(plans: Sequence[MergePlan | None], grid: Sequence[int], batch: int, protected: int) -> list[Moments]:
    """Return the merges of each block over time.

    Args:
        plans: plan of each block; `None` for blocks that merged nothing.
        grid: patches along each axis, `(t, h, w)`.
        batch: number of clips.
        protected: number of leading tokens that are no patches.

    Raises:
        InputError: if the grid has other axes than a clip's.
    """
    if len(grid) != 3:
        raise InputError(f"the grid is {tuple(grid)}, but (t, h, w) of a clip was expected: only clips have moments")
    patches, device = math.prod(grid), next((plan.kept.device for plan in plans if plan is not None), "cpu")
    moment = torch.arange(patches, device=device) // (grid[1] * grid[2])
    before = torch.arange(patches + protected, device=device).expand(batch, -1)
    spans = _spans(before[:, protected:], moment, patches + protected, grid[0])
    found: list[Moments] = []
    for block, plan in enumerate(plans):
        merged = within = 0
        if plan is not None:
            joins = plan.target >= 0  # (other tokens were dropped)
            into = plan.kept.gather(1, plan.target.clamp_min(0))
            one = (_at(spans, plan.source) | _at(spans, into)).sum(dim=2) == 1
            merged, within = int(joins.sum()), int((one & joins).sum())
            so_far = source_map([one for one in plans[: block + 1] if one is not None])
            assert so_far is not None
            spans = _spans(so_far[:, protected:], moment, plan.tokens_out, grid[0])
        share = within / merged if merged else math.nan
        alive = spans.sum(dim=2)
        spanned = float(alive[alive > 0].double().mean()) if bool((alive > 0).any()) else math.nan
        found.append(Moments(block, merged / batch, share, 1 - share, spanned))
    return found


def _spans(source: Tensor, moment: Tensor, tokens: int, moments: int) -> Tensor:
    """Return which moments each token spans, `[B, tokens, moments]` bool, from the token of each patch `[B, patches]`; −1 is dropped."""
    flat = source.new_zeros(source.shape[0], (tokens + 1) * moments)
    flat.scatter_(1, (source + 1) * moments + moment, 1)
    return flat.view(-1, tokens + 1, moments)[:, 1:] > 0


def _at(spans: Tensor, tokens: Tensor) -> Tensor:
    return spans.gather(1, tokens.unsqueeze(2).expand(-1, -1, spans.shape[2]))
