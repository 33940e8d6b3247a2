"""What matchers share: from "these tokens go" to a plan."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmerge.ops.basics import ascending_order, counting
from tokenmerge.plan import DROPPED, MergePlan


def lowest(score: Tensor, count: int, protected: int) -> Tensor:
    """`[B, count]` int64: the tokens of lowest score, lowest first; never a protected one. Ties: lower position first."""
    order = ascending_order(score[:, protected:])
    return order[:, :count] + protected


def rest_of(source: Tensor, tokens: int) -> Tensor:
    """`[B, N − r]` int64: the tokens not in `source [B, r]`, ascending."""
    goes = torch.zeros(source.shape[0], tokens, dtype=torch.int64, device=source.device).scatter_(1, source, 1)
    return ascending_order(goes)[:, : tokens - source.shape[1]]


def positions_in(kept: Tensor, tokens: int) -> Tensor:
    """`[B, N]` int64: where each token is in `kept [B, N']`; of others, anything."""
    positions = kept.new_zeros(kept.shape[0], tokens)
    return positions.scatter_(1, kept, counting(kept.shape[1], kept.device).expand_as(kept))


def join(source: Tensor, joined: Tensor, tokens: int) -> MergePlan:
    """The plan in which each token of `source [B, r]` joins the token `joined [B, r]`; the others keep their order.

    No token of `joined` may be in `source`.
    """
    kept = rest_of(source, tokens)
    return MergePlan(kept, source, positions_in(kept, tokens).gather(1, joined))


def join_nearest(similarity: Tensor, source: Tensor, protected: int) -> MergePlan:
    """Each token of `source [B, r]` joins the most similar token that stays, by `similarity [B, N, N]`."""
    batch, tokens, _ = similarity.shape
    rows = similarity.gather(1, source.unsqueeze(2).expand(-1, -1, tokens))
    closed = torch.zeros(batch, tokens, dtype=torch.bool, device=source.device).scatter_(1, source, True)
    closed[:, :protected] = True
    return join(source, rows.masked_fill(closed.unsqueeze(1), -torch.inf).argmax(dim=2), tokens)


def drop(source: Tensor, tokens: int) -> MergePlan:
    """The plan in which the tokens of `source [B, r]` are dropped."""
    return MergePlan(rest_of(source, tokens), source, torch.full_like(source, DROPPED), drops=True)
