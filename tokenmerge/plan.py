"""`MergePlan`, the result of matching: a map from the tokens before a merge to the tokens after it.

The map is stored as two parts: the token that represents each new position, and the tokens that join one of those
positions. Any map onto 0 … N' − 1 can be written that way, and a dropped token joins position −1. In this form merging
computes with the r joining rows only; all other rows are copied by one gather (`tokenmerge/ops/combine.py`).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from tokenmerge.config import Backend
from tokenmerge.errors import InputError, shown
from tokenmerge.ops.basics import ascending_order, counting, descending_order, is_exporting, spread_rows, take_rows
from tokenmerge.ops.combine import Reduce, merge_rows
from tokenmerge.ops.modes import has_values, require
from tokenmerge.schedule import is_count

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DROPPED = -1
"""Target position of a dropped token."""


class Carried(NamedTuple):
    """What a learned matcher hands to its call in the next block of the same pass.

    Attributes:
        tokens: `[B, N', K]` floating: values that belong to the tokens, in the order of the plan's new positions.
        images: tensors `[B, …]` that belong to the images.
    """

    tokens: Tensor
    images: tuple[Tensor, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class MergePlan:
    """A merge of N tokens into N' = N − r tokens per image (arXiv 2210.09461, section 3).

    The index tensors are int64, on the device of the tokens. In each image `kept` and `source` together contain every
    token exactly once.

    Attributes:
        kept: `[B, N']` int64: the token (by its old position) that represents each new position.
        source: `[B, r]` int64: the tokens (by their old positions) that are merged away or dropped.
        target: `[B, r]` int64: the new position that each source joins; −1 drops the source.
        drops: whether `target` may contain −1, known without reading its values.
        weight: `[B, N]` float32: weights of the mean in place of the token sizes; `None` uses the sizes.
        gate: `[B, N']` floating: factors on the sizes after the merge, through which a matcher in training receives its
            gradient (DynamicViT); `None` otherwise.
        features: `[B, N', C]`: tokens after the merge in place of the members' means, for a learned matcher that makes a token
            of its own (SPViT, A-ViT); `None` otherwise.
        carried: what a learned matcher hands to its call in the next block (A-ViT); `None` otherwise.

    Example:
        >>> import torch
        >>> from tokenmerge import MergePlan
        >>> plan = MergePlan.from_assign(torch.tensor([[0, 1, 1, 2]]))  # tokens 1 and 2 become token 1
        >>> merged, size = plan.merge(torch.tensor([[[1.0], [2.0], [4.0], [8.0]]]))
        >>> merged.flatten().tolist(), size.tolist()
        ([1.0, 3.0, 8.0], [[1.0, 2.0, 1.0]])
    """

    kept: Tensor
    source: Tensor
    target: Tensor
    drops: bool = False
    weight: Tensor | None = None
    gate: Tensor | None = None
    features: Tensor | None = None
    carried: Carried | None = None

    @property
    def tokens_in(self) -> int:
        """N, the tokens per image before the merge."""
        return self.kept.shape[1] + self.source.shape[1]

    @property
    def tokens_out(self) -> int:
        """N', the tokens per image after the merge."""
        return self.kept.shape[1]

    @property
    def r(self) -> int:
        """r, the tokens merged away or dropped per image."""
        return self.source.shape[1]

    @property
    def assign(self) -> Tensor:
        """`[B, N]` int64: the new position of each token; −1 for a dropped token."""
        new = counting(self.tokens_out, self.kept.device).expand_as(self.kept)
        out = self.kept.new_empty(self.kept.shape[0], self.tokens_in)
        return out.scatter_(1, self.kept, new).scatter_(1, self.source, self.target)

    @classmethod
    def identity(cls, batch: int, tokens: int, device: torch.device | str | None = None) -> MergePlan:
        """Return the plan that merges no tokens and keeps every position.

        Args:
            batch: B, images in the batch.
            tokens: N, tokens per image.
            device: device of the plan; `None` is PyTorch's default device.

        Raises:
            InputError: if `batch` or `tokens` is not a whole number of at least 0.
        """
        if not torch.compiler.is_compiling():
            batch, tokens = _count("batch", batch), _count("tokens", tokens)
        none = torch.empty(batch, 0, dtype=torch.int64, device=device)
        return cls(counting(tokens, none.device).expand(batch, tokens), none, none)

    @classmethod
    def from_assign(cls, assign: Tensor, tokens_out: int | None = None) -> MergePlan:
        """Build a plan from a map that is onto `0 … tokens_out − 1` in every image.

        The first token of each group represents it in `kept`.

        Args:
            assign: `[B, N]`, any integer dtype: the new position of each token; −1 drops the token.
            tokens_out: N', tokens per image after the merge; `None` reads it from the values of `assign`.

        Raises:
            InputError: if `assign` is not `[B, N]` integers, leaves the range, or leaves a position empty.
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
        if assign.numel() and not DROPPED <= low <= high < tokens_out:
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
        """Build a plan from a map that is known to be onto; `None` if N' would exceed N."""
        batch, tokens = assign.shape
        if tokens_out > tokens:
            return None
        position = counting(tokens, assign.device).expand_as(assign)
        kept = assign.new_full((batch, tokens_out + drops), tokens - 1 if tokens else 0)
        bucket = assign.where(assign >= 0, tokens_out) if drops else assign  # one more bucket, for dropped tokens
        kept = kept.scatter_reduce(1, bucket, position, "amin", include_self=True)[:, :tokens_out]
        is_source = torch.ones_like(assign).scatter_(1, kept, 0)
        source = descending_order(is_source)[:, : tokens - tokens_out]
        return cls(kept, source, assign.gather(1, source), drops)

    def in_order(self) -> MergePlan:
        """Return the same merge with the new positions sorted by the old position of their token (spatial order)."""
        order = ascending_order(self.kept)
        kept = self.kept.gather(1, order)
        target = _gather(ascending_order(order), self.target, self.drops)
        gate = None if self.gate is None else self.gate.gather(1, order)
        features = None if self.features is None else take_rows(self.features, order)
        carried = self.carried
        carried = None if carried is None else carried._replace(tokens=take_rows(carried.tokens, order))
        return MergePlan(kept, self.source, target, self.drops, self.weight, gate, features, carried)

    def recorded(self) -> MergePlan:
        """Return the merge alone, without gate, features and `carried`, which only its own pass needs."""
        return MergePlan(self.kept, self.source, self.target, self.drops, self.weight)

    def compose(self, then: MergePlan) -> MergePlan:
        """Return one plan for this merge followed by the merge `then`; weights and gates are left out.

        Args:
            then: the plan of the next merge, whose N is this plan's N'.

        Raises:
            InputError: if `then` expects another number of images or tokens than this plan leaves.

        Example:
            >>> import torch
            >>> from tokenmerge import MergePlan
            >>> first = MergePlan.from_assign(torch.tensor([[0, 0, 1, 2]]))
            >>> second = MergePlan.from_assign(torch.tensor([[0, 1, 1]]))
            >>> first.compose(second).assign
            tensor([[0, 0, 1, 1]])
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
        """Merge tokens by this plan.

        Args:
            x: tokens `[B, N, C]`, any floating dtype.
            size: patches that each token stands for, `[B, N]`; `None` means 1 for every token.
            reduce: how the members of a merged token are combined (see `tokenmerge/ops/combine.py`); "mean" is the
                paper's mean weighted by size.
            backend: "torch", "triton" (one fused kernel, mean only), or "auto": Triton on a GPU it supports.

        Returns:
            The merged tokens `[B, N', C]` in the dtype of `x`, accumulated in float32 (float64 for float64 tokens), and
            their sizes `[B, N']` float32. Dropped tokens contribute to neither.

        Raises:
            InputError: if a shape or device does not fit the plan, a size is negative or NaN, or `reduce` is unknown.
            ConfigError: if `backend="triton"` cannot run; the message lists the reasons.
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
        """Copy the value of every merged token back to all of its members.

        Args:
            x: tokens after the merge `[B, N', C]`, any dtype.

        Returns:
            Tokens `[B, N, C]` in the dtype of `x`; dropped tokens are 0.

        Raises:
            InputError: if `x` has another number of images or tokens than this plan leaves.
        """
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[:2] != self.kept.shape:
            raise InputError(
                f"x is {tuple(getattr(x, 'shape', ()))}, but this plan leaves tokens of shape {[*self.kept.shape]} and C channels"
            )
        return spread_rows(x, self.assign, self.drops)


def _count(name: str, value: Any) -> int:
    """Return a count as an `int`: from Python's or NumPy's integers, or a `SymInt` while code is traced.

    Raises:
        InputError: if `value` is not a whole number of at least 0; the message names it `name`.
    """
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
    """Return `table.gather(1, index)`, with −1 wherever `index` is −1 (a dropped token stays dropped)."""
    if not drops:
        return table.gather(1, index)
    return table.gather(1, index.clamp_min(0)).masked_fill(index < 0, DROPPED)


def source_map(plans: Iterable[MergePlan]) -> Tensor | None:
    """Return the token that each original token became after all of `plans`, applied in order.

    Returns:
        `[B, N₀]` int64, with −1 for dropped tokens; `None` if there are no plans.

    Example:
        >>> import torch
        >>> plans = [MergePlan.from_assign(torch.tensor([assign])) for assign in ([0, 0, 1, 2], [0, 1, 1])]
        >>> source_map(plans)
        tensor([[0, 0, 1, 1]])
    """
    total: Tensor | None = None
    dropped = False
    for plan in plans:
        total = plan.assign if total is None else _gather(plan.assign, total, dropped)
        dropped = dropped or plan.drops
    return total
