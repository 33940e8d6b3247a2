"""How tokens that become one are combined: the paper's size-weighted mean, and what it was compared with.

Everything works on whole rows of `[B·N, C]`, with few operations, and in place where memory is fresh: a second buffer of
the size of the tokens would cost page faults at every block, and every operation costs, because after the matrix products
of a block neither its code nor its few numbers are in a cache. Rows that nothing joins keep every bit.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tokenmerge.errors import InputError

Reduce = Literal["mean", "average", "max", "keep", "norm", "max_norm", "sum"]
REDUCTIONS = ("mean", "average", "max", "keep", "norm", "max_norm", "sum")
_TINY = 1e-12


class Members(NamedTuple):
    """A plan in row numbers of flattened tokens.

    Attributes:
        keep: `[B·N']` rows of `[B·N]` that stay.
        source: `[B·r]` rows of `[B·N]` that join one of them.
        target: `[B·r]` the row of `[B·N']` that each of those joins.
        alive: `[B·r]` false where a row is dropped instead; `None` if none is.
        weight: `[B·N]` float32, what rows weigh in means; `None` stands for their sizes.
    """

    keep: Tensor
    source: Tensor
    target: Tensor
    alive: Tensor | None = None
    weight: Tensor | None = None


def combine(x: Tensor, size: Tensor | None, members: Members, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Merge rows (paper, section 3 and table 1d).

    Args:
        x: tokens `[B, N, C]`.
        size: patches per token `[B, N]`, or `None` for all ones.
        members: which rows become one.
        reduce: "mean", weighted by size (the paper's); "average", each member alike; "max" of every channel; "keep", the
            token that is joined, unchanged; "norm", the direction of the size-weighted mean and the size-weighted mean of
            the members' lengths, since a mean of vectors is shorter than they are; "max_norm", that direction and the
            largest member's length (ToFu); "sum".

    Returns:
        Tokens `[B·N', C]` in the dtype of x, accumulated in float32 (float64 for float64); sizes `[B·N']` float32.

    Raises:
        InputError: if `reduce` is unknown.
    """
    if reduce not in REDUCTIONS:
        raise InputError(f"reduce={reduce!r}, but it must be one of {', '.join(REDUCTIONS)}")
    keep, source, target, alive, weight = members
    rows = x.reshape(-1, x.shape[2])
    kept = rows.index_select(0, keep)
    if size is None:
        joining_size = kept.new_ones(source.shape, dtype=torch.float32)
        sizes = kept.new_ones(keep.shape, dtype=torch.float32)
    else:
        size = size.to(torch.float32).reshape(-1)
        joining_size, sizes = size.index_select(0, source), size.index_select(0, keep)
    if alive is not None:
        joining_size = joining_size * alive
    sizes = sizes.index_add_(0, target, joining_size)
    if reduce == "keep":
        return kept, sizes

    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    joining = rows.index_select(0, source)
    if x.dtype != wide:
        kept, joining = kept.to(wide), joining.to(wide)
    if reduce == "sum":
        kept = kept.index_add_(0, target, _only(joining, alive))
    elif reduce == "max":
        joining = joining if alive is None else joining.masked_fill(~alive.unsqueeze(1), -torch.inf)
        index = target.unsqueeze(1).expand(-1, x.shape[2])
        kept = kept.scatter_reduce(0, index, joining, "amax", include_self=True)
    else:
        share, total = joining_size, sizes
        if sizes.requires_grad:  # of a matcher that learns: its gradient comes through attention
            share, total = share.detach().clone(), total.detach()
        if reduce == "average":
            share = torch.ones_like(share) if alive is None else alive.to(share.dtype)
            total = torch.ones_like(sizes).index_add_(0, target, share)
        elif weight is not None:
            share = weight.index_select(0, source)
            share = share if alive is None else share * alive
            total = weight.index_select(0, keep).index_add_(0, target, share)
        # (clamped for padding, whose size is 0: it joins with weight 0, and gives way to what joins it)
        share = share.to(wide).div_(total.index_select(0, target).clamp_min_(_TINY))
        kept = _mean(kept, joining, target, share, alive, reduce)
    return (kept if x.dtype == wide else kept.to(x.dtype)), sizes


def _only(joining: Tensor, alive: Tensor | None) -> Tensor:
    return joining if alive is None else joining * alive.unsqueeze(1)


def _mean(kept: Tensor, joining: Tensor, target: Tensor, share: Tensor, alive: Tensor | None, reduce: Reduce) -> Tensor:
    """`x_t + Σ share_i (x_i − x_t)` is the weighted mean, and leaves every other row alone."""
    aimed = kept.index_select(0, target)
    if reduce not in ("norm", "max_norm"):
        return kept.index_add_(0, target, joining.sub_(aimed).mul_(share.unsqueeze(1)))
    own, theirs = torch.linalg.vector_norm(aimed, dim=1), torch.linalg.vector_norm(joining, dim=1)
    one = torch.ones_like(share) if alive is None else alive.to(share.dtype)
    nothing = share.new_zeros(kept.shape[0])
    # where several join one row, each brings its part of what is said of that row
    part = one / nothing.index_add(0, target, one).index_select(0, target).clamp_min(1)
    if reduce == "norm":
        length = nothing.index_add(0, target, own * part + share * (theirs - own))
    else:
        length = nothing.scatter_reduce(0, target, torch.maximum(own, theirs * one), "amax", include_self=True)
    kept = kept.index_add_(0, target, (joining - aimed) * share.unsqueeze(1))
    merged = kept.index_select(0, target)
    factor = length.index_select(0, target) / torch.linalg.vector_norm(merged, dim=1).clamp_min(_TINY)
    return kept.index_add_(0, target, merged * ((factor - 1) * part).unsqueeze(1))
