"""`MergePlan`: one merge as data.

A plan is an integer map from the tokens before a merge to the tokens after it. It is stored in the form that
makes merging cheap: which token sits at each new position, and which further tokens join it. Every onto map
has that form, so pruning aside nothing is lost by it. Merging then touches only the rows that really merge;
all others are one row gather.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.ops import Backend, descending_order, takes_triton

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
Reduce = Literal["mean", "sum", "max"]


def flat_rows(index: Tensor, rows: int) -> Tensor:
    """Row numbers into `[B·rows, C]` for an index `[B, M]` into `[B, rows, C]`; `[B·M]`, int64."""
    # not arange with a step: its length would be a quotient of symbols where N is dynamic, which Dynamo cannot print
    offset = torch.arange(index.shape[0], device=index.device).mul_(rows)
    return (index + offset.unsqueeze(1)).reshape(-1)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """`out[b, m] = x[b, index[b, m]]` for x `[B, N, C]` and index `[B, M]`; `[B, M, C]`.

    Whole rows of the flattened tensor: on CPU some ten times faster than `torch.gather` on an expanded index.
    """
    batch, rows, channels = x.shape
    out = x.reshape(batch * rows, channels).index_select(0, flat_rows(index, rows))
    return out.reshape(batch, index.shape[1], channels)


@dataclasses.dataclass(frozen=True, eq=False)
class MergePlan:
    """Which tokens become one (paper, section 3).

    All fields are int64 on the device of the tokens. `keep` and `source` together name every token once.

    Attributes:
        keep: `[B, N']`: the position before the merge of the token that sits at each position after it.
        source: `[B, r]`: positions before the merge of the tokens that are merged away.
        target: `[B, r]`: position after the merge that each of those joins.
    """

    keep: Tensor
    source: Tensor
    target: Tensor

    @property
    def tokens_in(self) -> int:
        """N: tokens per image before the merge."""
        return self.keep.shape[1] + self.source.shape[1]

    @property
    def tokens_out(self) -> int:
        """N': tokens per image after the merge."""
        return self.keep.shape[1]

    @property
    def r(self) -> int:
        """Tokens merged away per image."""
        return self.source.shape[1]

    @property
    def assign(self) -> Tensor:
        """`[B, N]`, int64: position after the merge of each token before it."""
        new = torch.arange(self.tokens_out, device=self.keep.device).expand_as(self.keep)
        out = self.keep.new_empty(self.keep.shape[0], self.tokens_in)
        return out.scatter_(1, self.keep, new).scatter_(1, self.source, self.target)

    @classmethod
    def identity(cls, batch: int, tokens: int, device: torch.device | str | None = None) -> MergePlan:
        """The plan that merges nothing and changes no position."""
        none = torch.empty(batch, 0, dtype=torch.int64, device=device)
        return cls(torch.arange(tokens, device=device).expand(batch, tokens), none, none)

    @classmethod
    def from_assign(cls, assign: Tensor, tokens_out: int | None = None) -> MergePlan:
        """The plan of any map `assign [B, N]`, integers, onto `0 … tokens_out − 1` in every image.

        Args:
            assign: position after the merge of each token.
            tokens_out: tokens after the merge; `None` reads it from the map.

        Raises:
            InputError: if the map is not `[B, N]` integers, leaves the range, or misses a position.
        """
        if assign.dim() != 2 or assign.dtype not in _INTEGERS:
            raise InputError(
                f"assign is {tuple(assign.shape)} {assign.dtype}, but integers of shape [B, N] were expected"
            )
        assign = assign.to(torch.int64)
        if tokens_out is None:
            tokens_out = int(assign.max()) + 1 if assign.numel() else 0
        if assign.numel() and not 0 <= int(assign.min()) <= int(assign.max()) < tokens_out:
            raise InputError(
                f"assign holds values from {int(assign.min())} to {int(assign.max())}, "
                f"but with tokens_out={tokens_out} they must lie in 0 … {tokens_out - 1}"
            )
        plan = cls._from_onto(assign, tokens_out)
        if plan is None or not torch.equal(plan.assign, assign):
            raise InputError(
                f"assign leaves some of the {tokens_out} positions empty in some image, but the map must be onto"
            )
        return plan

    @classmethod
    def _from_onto(cls, assign: Tensor, tokens_out: int) -> MergePlan | None:
        """The plan of a map known to be onto; the first token of each group represents it."""
        batch, tokens = assign.shape
        if tokens_out > tokens:
            return None
        position = torch.arange(tokens, device=assign.device).expand_as(assign)
        keep = assign.new_full((batch, tokens_out), tokens - 1 if tokens else 0)
        keep = keep.scatter_reduce(1, assign, position, "amin", include_self=True)
        is_source = torch.ones_like(assign).scatter_(1, keep, 0)
        source = descending_order(is_source)[:, : tokens - tokens_out]
        return cls(keep, source, assign.gather(1, source))

    def in_order(self) -> MergePlan:
        """The same merge with the tokens left in ascending position: spatial order is kept."""
        keep, order = self.keep.sort(dim=1)
        return MergePlan(keep, self.source, order.argsort(dim=1).gather(1, self.target))

    def compose(self, then: MergePlan) -> MergePlan:
        """This merge followed by `then`, as one plan.

        Raises:
            InputError: if `then` does not start with as many tokens and images as this plan leaves.
        """
        if then.tokens_in != self.tokens_out or then.keep.shape[0] != self.keep.shape[0]:
            raise InputError(
                f"the next plan merges {then.keep.shape[0]}×{then.tokens_in} tokens, but this one leaves "
                f"{self.keep.shape[0]}×{self.tokens_out}: compose plans in the order in which they were made"
            )
        plan = self._from_onto(then.assign.gather(1, self.assign), then.tokens_out)
        assert plan is not None  # a plan never grows
        return plan

    def merge(
        self, x: Tensor, size: Tensor | None = None, reduce: Reduce = "mean", backend: Backend = "auto"
    ) -> tuple[Tensor, Tensor]:
        """Merge tokens.

        Args:
            x: tokens `[B, N, C]`, any floating dtype.
            size: how many patches each token stands for, `[B, N]`; `None` means all ones.
            reduce: "mean" is the paper's, weighted by size; "sum" and "max" ignore the sizes.
            backend: "triton" for one fused kernel (mean only), "torch", or "auto": Triton on a GPU.

        Returns:
            The merged tokens `[B, N', C]` in the dtype of x, accumulated in float32 (float64 for float64),
            and their sizes `[B, N']` in float32.

        Raises:
            InputError: if a shape does not fit the plan, or `reduce` is unknown.
            ConfigError: if `backend` is "triton" and cannot run, with the reasons.
        """
        batch, tokens = self.keep.shape[0], self.tokens_in
        if x.dim() != 3 or x.shape[:2] != (batch, tokens) or not x.is_floating_point():
            found = f"{tuple(x.shape)} {x.dtype}"
            raise InputError(
                f"x is {found}, but this plan merges floating-point tokens of shape [{batch}, {tokens}, C]"
            )
        if size is not None and size.shape != (batch, tokens):
            raise InputError(f"size is {tuple(size.shape)}, but this plan merges sizes of shape [{batch}, {tokens}]")
        if reduce == "mean" and takes_triton(backend, x):
            from tokenmerge.ops import launch

            size = None if size is None else size.to(torch.float32)
            merged: tuple[Tensor, Tensor] = launch.merge(x, size, self.keep, self.source, self.target)
            return merged
        return self._merge_flat(x, size, reduce)

    def _merge_flat(self, x: Tensor, size: Tensor | None, reduce: Reduce) -> tuple[Tensor, Tensor]:
        """`merge` in plain torch, on whole rows of `[B·N, C]`: few operations, and in place where memory is fresh.

        A second buffer of the size of the tokens would cost page faults at every block, and every operation costs: after
        the matrix products of a block, neither its code nor its few numbers are in a cache.
        """
        if reduce not in ("mean", "sum", "max"):
            raise InputError(f"reduce={reduce!r}, but only 'mean', 'sum' and 'max' are known")
        channels = x.shape[2]
        keep, source, target = self._flat()
        rows = x.reshape(-1, channels)
        kept, joining = rows.index_select(0, keep), rows.index_select(0, source)
        if size is None:
            weight = kept.new_ones(source.shape, dtype=torch.float32)
            new_size = kept.new_ones(keep.shape, dtype=torch.float32)
        else:
            size = size.to(torch.float32).reshape(-1)
            weight, new_size = size.index_select(0, source), size.index_select(0, keep)
        new_size = new_size.index_add_(0, target, weight)
        if reduce == "max":
            index = target.unsqueeze(1).expand(-1, channels)
            kept = kept.scatter_reduce(0, index, joining, "amax", include_self=True)
        else:
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            if x.dtype != wide:
                kept, joining = kept.to(wide), joining.to(wide)
            if reduce == "mean":
                # x_t + Σ sᵢ/S (xᵢ − x_t) is the weighted mean, and leaves every other row alone
                # (clamped for padding, whose size is 0: it joins with weight 0, and gives way to what joins it)
                share = weight.to(wide).div_(new_size.index_select(0, target).clamp_min_(1e-12))
                joining = joining.sub_(kept.index_select(0, target)).mul_(share.unsqueeze(1))
            kept = kept.index_add_(0, target, joining)
            if x.dtype != wide:
                kept = kept.to(x.dtype)
        return kept.view(*self.keep.shape, channels), new_size.view(self.keep.shape)

    def _flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """`keep`, `source` and `target` as row numbers of the flattened tokens, `[B·N']`, `[B·r]` and `[B·r]`."""
        batch = self.keep.shape[0]
        if batch == 1:
            return self.keep.view(-1), self.source.reshape(-1), self.target.reshape(-1)
        image = torch.arange(batch, device=self.keep.device).unsqueeze(1)
        first = image * self.tokens_in
        target = self.target + image.mul_(self.tokens_out)
        return (self.keep + first).view(-1), (self.source + first).view(-1), target.view(-1)

    def unmerge(self, x: Tensor) -> Tensor:
        """Give every token before the merge the value of the token it became: `[B, N', C]` -> `[B, N, C]`.

        Raises:
            InputError: if x has another number of images or tokens than this plan leaves.
        """
        if x.dim() != 3 or x.shape[:2] != self.keep.shape:
            raise InputError(
                f"x is {tuple(x.shape)}, but this plan leaves tokens of shape {[*self.keep.shape]} and C channels"
            )
        return take_rows(x, self.assign)


def source_map(plans: Iterable[MergePlan]) -> Tensor | None:
    """`[B, N0]`, int64: the token after all of `plans` that each token before them became; `None` without plans."""
    total: Tensor | None = None
    for plan in plans:
        total = plan.assign if total is None else plan.assign.gather(1, total)
    return total
