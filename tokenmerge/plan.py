"""`MergePlan`: one merge as data.

A plan is an integer map from the tokens before a merge to the tokens after it. It is stored in the form that
makes merging cheap: which token sits at each new position, and which further tokens join it. Every onto map
has that form; tokens that are dropped join position −1. Merging then touches only the rows that really merge;
all others are one row gather (`ops/combine.py`).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from tokenmerge.config import Backend
from tokenmerge.errors import InputError, shown
from tokenmerge.ops.basics import ascending_order, counting, descending_order, is_exporting, spread_rows
from tokenmerge.ops.combine import Reduce, merge_rows
from tokenmerge.ops.modes import has_values, require
from tokenmerge.schedule import is_count

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DROPPED = -1
"""The position that a dropped token joins."""


@dataclasses.dataclass(frozen=True, eq=False)
class MergePlan:
    """Which tokens become one (paper, section 3).

    All fields are int64 on the device of the tokens. `kept` and `source` together name every token once.

    Attributes:
        kept: `[B, N']`: the position before the merge of the token that sits at each position after it.
        source: `[B, r]`: positions before the merge of the tokens that are merged away.
        target: `[B, r]`: position after the merge that each of those joins; −1 drops it.
        drops: whether any target may be −1; known without looking at values.
        weight: `[B, N]` float32: what tokens weigh in the mean of those they merge with; `None` stands for their sizes.
        gate: `[B, N']` factors on the sizes of the tokens that are left, through which a matcher that is being trained
            gets its gradient; `None` for all others.
    """

    kept: Tensor
    source: Tensor
    target: Tensor
    drops: bool = False
    weight: Tensor | None = None
    gate: Tensor | None = None

    @property
    def tokens_in(self) -> int:
        """N: tokens per image before the merge."""
        return self.kept.shape[1] + self.source.shape[1]

    @property
    def tokens_out(self) -> int:
        """N': tokens per image after the merge."""
        return self.kept.shape[1]

    @property
    def r(self) -> int:
        """Tokens merged away or dropped per image."""
        return self.source.shape[1]

    @property
    def assign(self) -> Tensor:
        """`[B, N]`, int64: position after the merge of each token before it; −1 for a token that was dropped."""
        new = counting(self.tokens_out, self.kept.device).expand_as(self.kept)
        out = self.kept.new_empty(self.kept.shape[0], self.tokens_in)
        return out.scatter_(1, self.kept, new).scatter_(1, self.source, self.target)

    @classmethod
    def identity(cls, batch: int, tokens: int, device: torch.device | str | None = None) -> MergePlan:
        """The plan that merges nothing and changes no position.

        Raises:
            InputError: if either is no number of images or tokens.
        """
        if not torch.compiler.is_compiling():
            batch, tokens = _count("batch", batch), _count("tokens", tokens)
        none = torch.empty(batch, 0, dtype=torch.int64, device=device)
        return cls(counting(tokens, none.device).expand(batch, tokens), none, none)

    @classmethod
    def from_assign(cls, assign: Tensor, tokens_out: int | None = None) -> MergePlan:
        """The plan of any map `assign [B, N]`, integers, onto `0 … tokens_out − 1` in every image.

        Args:
            assign: position after the merge of each token; −1 drops it.
            tokens_out: tokens after the merge; `None` reads it from the map.

        Raises:
            InputError: if the map is not `[B, N]` integers, leaves the range, or misses a position.
        """
        if not isinstance(assign, Tensor):
            raise InputError(f"assign is of type {type(assign).__name__}, but a tensor of integers [B, N] was expected")
        if assign.dim() != 2 or assign.dtype not in _INTEGERS:
            raise InputError(
                f"assign is {tuple(assign.shape)} {assign.dtype}, but integers of shape [B, N] were expected"
            )
        tokens_out = None if tokens_out is None else _count("tokens_out", tokens_out)
        assign = assign.to(torch.int64)
        if tokens_out is None:
            tokens_out = int(assign.max()) + 1 if assign.numel() else 0
        low, high = (int(assign.min()), int(assign.max())) if assign.numel() else (0, tokens_out - 1)
        if not DROPPED <= low <= high < tokens_out:
            raise InputError(
                f"assign holds values from {low} to {high}, but with tokens_out={tokens_out} they must lie in "
                f"0 … {tokens_out - 1} (or be −1, for tokens that are dropped)"
            )
        plan = cls._from_onto(assign, tokens_out, low < 0)
        if plan is None or not torch.equal(plan.assign, assign):
            raise InputError(
                f"assign leaves some of the {tokens_out} positions empty in some image, but the map must be onto"
            )
        return plan

    @classmethod
    def _from_onto(cls, assign: Tensor, tokens_out: int, drops: bool) -> MergePlan | None:
        """The plan of a map known to be onto; the first token of each group represents it."""
        batch, tokens = assign.shape
        if tokens_out > tokens:
            return None
        position = counting(tokens, assign.device).expand_as(assign)
        kept = assign.new_full((batch, tokens_out + drops), tokens - 1 if tokens else 0)
        bucket = assign.where(assign >= 0, tokens_out) if drops else assign  # one more, for those that are dropped
        kept = kept.scatter_reduce(1, bucket, position, "amin", include_self=True)[:, :tokens_out]
        is_source = torch.ones_like(assign).scatter_(1, kept, 0)
        source = descending_order(is_source)[:, : tokens - tokens_out]
        return cls(kept, source, assign.gather(1, source), drops)

    def in_order(self) -> MergePlan:
        """The same merge with the tokens left in ascending position: spatial order is kept."""
        order = ascending_order(self.kept)
        kept = self.kept.gather(1, order)
        target = _gather(ascending_order(order), self.target, self.drops)
        gate = None if self.gate is None else self.gate.gather(1, order)
        return MergePlan(kept, self.source, target, self.drops, self.weight, gate)

    def compose(self, then: MergePlan) -> MergePlan:
        """This merge followed by `then`, as one plan.

        Raises:
            InputError: if `then` does not start with as many tokens and images as this plan leaves.
        """
        if not isinstance(then, MergePlan):
            raise InputError(f"the next plan is of type {type(then).__name__}, but a MergePlan was expected: give one")
        if then.tokens_in != self.tokens_out or then.kept.shape[0] != self.kept.shape[0]:
            raise InputError(
                f"the next plan merges {then.kept.shape[0]}×{then.tokens_in} tokens, but this one leaves "
                f"{self.kept.shape[0]}×{self.tokens_out}: compose plans in the order in which they were made"
            )
        drops = self.drops or then.drops
        plan = self._from_onto(_gather(then.assign, self.assign, self.drops), then.tokens_out, drops)
        assert plan is not None  # a plan never grows
        return plan

    def merge(
        self, x: Tensor, size: Tensor | None = None, reduce: Reduce = "mean", backend: Backend = "auto"
    ) -> tuple[Tensor, Tensor]:
        """Merge tokens.

        Args:
            x: tokens `[B, N, C]`, any floating dtype.
            size: how many patches each token stands for, `[B, N]`; `None` means all ones.
            reduce: how the tokens that become one are combined (`ops/combine.py`); "mean" is the paper's, weighted by size.
            backend: "triton" for one fused kernel (mean only), "torch", or "auto": Triton on a GPU.

        Returns:
            The merged tokens `[B, N', C]` in the dtype of x, accumulated in float32 (float64 for float64),
            and their sizes `[B, N']` in float32. Dropped tokens count for nothing in either.

        Raises:
            InputError: if a shape or the device does not fit the plan, a size is negative or NaN, or `reduce` is unknown.
            ConfigError: if `backend` is "triton" and cannot run, with the reasons.
        """
        looked_at = isinstance(size, Tensor) and not torch.compiler.is_compiling() and not is_exporting()
        if looked_at and isinstance(size, Tensor) and has_values(size):
            require(
                (size >= 0).all(),
                "a size is negative or NaN, but each says how many patches a token stands for",
                InputError,
            )
        merged = merge_rows(x, size, self, reduce, backend)
        return merged.x, merged.size

    def unmerge(self, x: Tensor) -> Tensor:
        """Give every token before the merge the value of the token it became: `[B, N', C]` -> `[B, N, C]`.

        Tokens that were dropped get 0.

        Raises:
            InputError: if x has another number of images or tokens than this plan leaves.
        """
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[:2] != self.kept.shape:
            raise InputError(
                f"x is {tuple(getattr(x, 'shape', ()))}, but this plan leaves tokens of shape {[*self.kept.shape]} and C channels"
            )
        return spread_rows(x, self.assign, self.drops)


def _count(name: str, value: Any) -> int:
    """A whole number, of whatever class it is: Python's, NumPy's, or one that stands for a length while code is traced."""
    if isinstance(value, torch.SymInt):
        return cast("int", value)
    try:
        found = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = -1
    if not is_count(found):
        raise InputError(f"{name}={shown(value)}, but a whole number, 0 or more, was expected: change it")
    return found


def _gather(table: Tensor, index: Tensor, drops: bool) -> Tensor:
    """`table.gather(1, index)`, where what was dropped stays dropped."""
    if not drops:
        return table.gather(1, index)
    return table.gather(1, index.clamp_min(0)).masked_fill(index < 0, DROPPED)


def source_map(plans: Iterable[MergePlan]) -> Tensor | None:
    """`[B, N0]`, int64: the token after all of `plans` that each token before them became; `None` without plans.

    −1 for tokens that were dropped on the way.
    """
    total: Tensor | None = None
    dropped = False
    for plan in plans:
        total = plan.assign if total is None else _gather(plan.assign, total, dropped)
        dropped = dropped or plan.drops
    return total
