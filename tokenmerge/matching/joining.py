"""Building blocks of matchers: from a choice of source tokens to a plan."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmerge.ops.basics import ascending_order, counting, marked, places_of
from tokenmerge.plan import DROPPED, MergePlan


def lowest(score: Tensor, count: int, protected: int) -> Tensor:
    """Return the unprotected tokens of lowest score.

    Args:
        score: `[B, N]`, any real dtype.
        count: how many tokens to return per image.
        protected: leading tokens to leave out.

    Returns:
        Positions `[B, count]` int64 by ascending score; ties go to the lower position.
    """
    order = ascending_order(score[:, protected:])
    return order[:, :count] + protected


def rest_of(source: Tensor, tokens: int) -> Tensor:
    """Return the tokens that are not in `source [B, r]`: positions `[B, N − r]` int64, ascending, for N = `tokens`."""
    goes = marked(source, tokens).to(torch.int64)
    return ascending_order(goes)[:, : tokens - source.shape[1]]


def join(source: Tensor, joined: Tensor, tokens: int) -> MergePlan:
    """Return the plan in which each source token joins another token; the remaining tokens keep their order.

    Args:
        source: positions of the tokens that merge away, `[B, r]` int64.
        joined: positions of the tokens that they join, `[B, r]` int64; none of them may be in `source`.
        tokens: N.
    """
    kept = rest_of(source, tokens)
    return MergePlan(kept, source, places_of(joined, kept, tokens))


def join_nearest(similarity: Tensor, source: Tensor, protected: int) -> MergePlan:
    """Return the plan in which each source token joins the most similar token that remains.

    Args:
        similarity: `[B, N, N]`, floating.
        source: positions of the tokens that merge away, `[B, r]` int64.
        protected: leading tokens that nothing may join.
    """
    tokens = similarity.shape[1]
    rows = similarity.gather(1, source.unsqueeze(2).expand(-1, -1, tokens))
    closed = torch.logical_or(marked(source, tokens), counting(tokens, source.device) < protected)
    return join(source, rows.masked_fill(closed.unsqueeze(1), -torch.inf).argmax(dim=2), tokens)


def drop(source: Tensor, tokens: int) -> MergePlan:
    """Return the plan that drops the tokens of `source [B, r]` (int64 positions) from N = `tokens` tokens."""
    return MergePlan(rest_of(source, tokens), source, torch.full_like(source, DROPPED), drops=True)
