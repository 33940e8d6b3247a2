"""Merging of tokens by a plan: the paper's size-weighted mean, and the alternatives it was compared with (table 1d).

The code works on whole rows of `[B·N, C]`, with few operations, and in place on buffers of its own. A second buffer as
large as the tokens would cost page faults in every block, and each operation has a cost of its own, because the matrix
products of a block evict its code and operands from the caches. Rows that no token joins are copied bit for bit.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from tokenmerge.config import Backend
from tokenmerge.errors import InputError
from tokenmerge.ops import native
from tokenmerge.ops.basics import add_rows, counting, largest_rows
from tokenmerge.ops.choice import takes_c, takes_triton

Reduce = Literal["mean", "average", "max", "destination", "norm", "max_norm", "sum"]
_TINY = 1e-12


class Plan(Protocol):
    """The attributes of a `MergePlan` that merging reads."""

    @property
    def kept(self) -> Tensor:
        """`[B, N']` int64: the token that represents each new position."""
        ...

    @property
    def source(self) -> Tensor:
        """`[B, r]` int64: the tokens that are merged away."""
        ...

    @property
    def target(self) -> Tensor:
        """`[B, r]` int64: the new position that each source joins; −1 drops it."""
        ...

    @property
    def drops(self) -> bool:
        """Whether `target` may contain −1."""
        ...

    @property
    def weight(self) -> Tensor | None:
        """`[B, N]` float32: weights of the mean; `None` uses the sizes."""
        ...

    @property
    def gate(self) -> Tensor | None:
        """`[B, N']`: factors on the new sizes, or `None`."""
        ...

    @property
    def features(self) -> Tensor | None:
        """`[B, N', C]`: tokens after the merge in place of the members' means, or `None`."""
        ...


class Merged(NamedTuple):
    """Result of a merge.

    Attributes:
        x: tokens `[B, N', C]` in the dtype of the tokens before the merge.
        size: patches per token `[B, N']` float32.
        log_size: logarithms of the sizes `[B, N']` in the requested dtype if the fused kernel computed them, else `None`.
    """

    x: Tensor
    size: Tensor
    log_size: Tensor | None = None


class Members(NamedTuple):
    """A plan as row numbers into the flattened tokens `[B·N, C]` and `[B·N', C]`.

    Attributes:
        kept: `[B·N']` int64: rows before the merge that represent the new rows.
        source: `[B·r]` int64: rows before the merge that join a new row.
        target: `[B·r]` int64: the new row that each source joins.
        left: N', rows of each image after the merge.
        alive: `[B·r]` bool: false if a source is dropped; `None` if none is.
        weight: `[B·N]` float32: weights of the mean; `None` uses the sizes.
    """

    kept: Tensor
    source: Tensor
    target: Tensor
    left: int
    alive: Tensor | None = None
    weight: Tensor | None = None


def merge_rows(
    x: Tensor,
    size: Tensor | None,
    plan: Plan,
    reduce: Reduce = "mean",
    backend: Backend = "auto",
    log: torch.dtype | None = None,
) -> Merged:
    """Merge tokens and their sizes by a plan.

    Args:
        x: tokens `[B, N, C]`, any floating dtype.
        size: patches per token `[B, N]`, or `None` if all are 1.
        plan: the merge.
        reduce: how the members of a merged token are combined (see `combine`).
        backend: "torch", "triton" (one fused kernel, "mean" only), "c" (one function, "mean" only, without gradients), or
            "auto": Triton on a GPU it supports, C on a CPU.
        log: dtype in which the next attention needs the logarithms of the new sizes; only fused kernels write them.

    Raises:
        InputError: if a shape or device does not fit the plan, or `reduce` is unknown.
        ConfigError: if `backend="triton"` or `backend="c"` cannot run; the message lists the reasons.
    """
    batch, left = plan.kept.shape
    _check(x, size, plan.kept, left + plan.source.shape[1])
    own = plan.gate is not None or plan.features is not None
    plain = reduce == "mean" and not plan.drops and plan.weight is None and not own
    if plain and (x.is_cuda or backend not in ("auto", "torch", "c")) and takes_triton(backend, x):
        from tokenmerge.ops import merging

        size = None if size is None else size.to(torch.float32)
        return Merged(*merging.merge(x, size, plan.kept, plan.source, plan.target, log))
    if plain and takes_c(backend, x) and not native.learns(x, size):
        return Merged(*native.merge(x, size, plan.kept, plan.source, plan.target, log))
    merged, sizes = combine(x, size, _members(plan), reduce)
    merged, sizes = merged.view(batch, left, x.shape[2]), sizes.view(batch, left)
    merged = merged if plan.features is None else plan.features
    return Merged(merged, sizes if plan.gate is None else sizes * plan.gate)


def _check(x: Tensor, size: Tensor | None, kept: Tensor, tokens: int) -> None:
    batch = kept.shape[0]
    for name, tensor in (("x", x), ("size", size)):
        if not (isinstance(tensor, Tensor) and tensor.layout is torch.strided) and not (
            tensor is None and name == "size"
        ):
            kind = f"a {tensor.layout} tensor" if isinstance(tensor, Tensor) else f"of type {type(tensor).__name__}"
            raise InputError(f"{name} is {kind}, but this plan merges dense tensors: give one")
    if x.dim() != 3 or x.shape[:2] != (batch, tokens) or not x.is_floating_point():
        raise InputError(
            f"x is {tuple(x.shape)} {x.dtype}, but this plan merges floating-point tokens of shape [{batch}, {tokens}, C]"
        )
    if size is not None and size.shape != (batch, tokens):
        raise InputError(f"size is {tuple(size.shape)}, but this plan merges sizes of shape [{batch}, {tokens}]")
    for name, tensor in (("x", x), ("size", size)):
        if tensor is not None and tensor.device != kept.device:
            raise InputError(
                f"{name} is on {str(tensor.device)!r}, but this plan is on {str(kept.device)!r}: move one to the other"
            )


def _members(plan: Plan) -> Members:
    """Convert a plan to row numbers of the flattened tokens."""
    kept, source, target, alive = plan.kept, plan.source, plan.target, None
    (batch, left), r = kept.shape, source.shape[1]
    if plan.drops:
        alive, target = target >= 0, target.clamp_min(0)
        alive = alive.reshape(-1)
    weight = None if plan.weight is None else plan.weight.reshape(-1)
    if batch == 1:
        return Members(kept.view(-1), source.reshape(-1), target.reshape(-1), left, alive, weight)
    first = counting(batch, kept.device, left + r).unsqueeze(1)
    new = counting(batch, kept.device, left).unsqueeze(1)
    return Members((kept + first).view(-1), (source + first).view(-1), (target + new).view(-1), left, alive, weight)


def combine(x: Tensor, size: Tensor | None, members: Members, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Combine the members of each merged token (paper, section 3 and table 1d).

    Args:
        x: tokens `[B, N, C]`, any floating dtype.
        size: patches per token `[B, N]`, or `None` if all are 1.
        members: the plan as row numbers.
        reduce: "mean", weighted by size (the paper's); "average", the unweighted mean; "max", per channel;
            "destination", the token that the others join, unchanged; "norm", the direction of the size-weighted mean with
            the size-weighted mean of the members' norms, because a mean of vectors is shorter than they are; "max_norm",
            that direction with the largest norm of a member (ToFu); or "sum".

    Returns:
        Tokens `[B·N', C]` in the dtype of x, accumulated in float32 (float64 for float64), and sizes `[B·N']` float32.

    Raises:
        InputError: if `reduce` is unknown.
    """
    if reduce not in get_args(Reduce):
        raise InputError(f"reduce={reduce!r}, but it must be one of {', '.join(get_args(Reduce))}")
    stays, source, target, left, alive, weight = members
    rows = x.reshape(-1, x.shape[2])
    kept = rows.index_select(0, stays)
    if size is None:
        joining_size = torch.ones(source.shape, device=x.device)
        sizes = torch.ones(stays.shape, device=x.device)
    else:
        size = size.to(torch.float32).reshape(-1)
        joining_size, sizes = size.index_select(0, source), size.index_select(0, stays)
    if alive is not None:
        joining_size = joining_size * alive
    sizes = add_rows(sizes, target, joining_size, left)
    if reduce == "destination":
        return kept, sizes

    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    joining = rows.index_select(0, source)
    if x.dtype != wide:
        kept, joining = kept.to(wide), joining.to(wide)
    if reduce == "sum":
        kept = add_rows(kept, target, _only(joining, alive), left)
    elif reduce == "max":
        joining = joining if alive is None else joining.masked_fill(~alive.unsqueeze(1), -torch.inf)
        kept = largest_rows(kept, target, joining, left)
    else:
        share, total = joining_size, sizes
        if sizes.requires_grad:  # a matcher in training, whose gradient comes through attention alone
            share, total = share.detach().clone(), total.detach()
        if reduce == "average":
            share = torch.ones_like(share) if alive is None else alive.to(share.dtype)
            total = add_rows(torch.ones_like(sizes), target, share, left)
        elif weight is not None:
            share = weight.index_select(0, source)
            share = share if alive is None else share * alive
            total = add_rows(weight.index_select(0, stays), target, share, left)
        # clamped because two padding tokens, of size 0, may merge
        share = share.to(wide).div_(total.index_select(0, target).clamp_min_(_TINY))
        kept = _mean(kept, joining, members, share, reduce)
    return (kept if x.dtype == wide else kept.to(x.dtype)), sizes


def _only(joining: Tensor, alive: Tensor | None) -> Tensor:
    return joining if alive is None else joining * alive.unsqueeze(1)


def _mean(kept: Tensor, joining: Tensor, members: Members, share: Tensor, reduce: Reduce) -> Tensor:
    """Return the weighted mean as `x_t + Σ share_i (x_i − x_t)`, which does not change rows that no token joins."""
    target, left, alive = members.target, members.left, members.alive
    aimed = kept.index_select(0, target)
    if reduce not in ("norm", "max_norm"):
        return add_rows(kept, target, joining.sub_(aimed).mul_(share.unsqueeze(1)), left)
    own, theirs = torch.linalg.vector_norm(aimed, dim=1), torch.linalg.vector_norm(joining, dim=1)
    one = torch.ones_like(share) if alive is None else alive.to(share.dtype)
    nothing = share.new_zeros(kept.shape[0])
    # if several sources join one row, each adds an equal part of the terms that count once per row
    part = one / add_rows(nothing.clone(), target, one, left).index_select(0, target).clamp_min(1.0)
    if reduce == "norm":
        length = add_rows(nothing, target, own * part + share * (theirs - own), left)
    else:
        length = largest_rows(nothing, target, torch.maximum(own, theirs * one), left)
    kept = add_rows(kept, target, (joining - aimed) * share.unsqueeze(1), left)
    merged = kept.index_select(0, target)
    factor = length.index_select(0, target) / torch.linalg.vector_norm(merged, dim=1).clamp_min(_TINY)
    return add_rows(kept, target, merged * ((factor - 1) * part).unsqueeze(1), left)
