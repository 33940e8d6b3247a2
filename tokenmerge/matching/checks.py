"""Checks of a matcher's arguments (in direct calls) and of its plans (for third-party matchers)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenmerge.errors import InputError, PatchError, shown
from tokenmerge.ops.basics import counting, is_exporting
from tokenmerge.ops.modes import require
from tokenmerge.plan import DROPPED, MergePlan
from tokenmerge.schedule import is_number

_SHAPES: dict[str, tuple[str, ...]] = {
    "size": ("B", "N"),
    "attention": ("B", "N"),
    "anchor": ("B", "N"),
    "tokens": ("B", "N", "C"),
    "values": ("B", "H", "N", "D"),
}
"""Axes of the tensors in `OFFERED`; B and N must equal the metric's."""


def check_matching_input(metric: Tensor, r: int, protected: int, per_head: bool = False) -> None:
    """Check the first three arguments of a matcher.

    Args:
        metric: must be a dense floating tensor `[B, N, D]`.
        r: must be a whole number of at least 0.
        protected: must be a whole number of at least 0.
        per_head: whether keys `[B, H, N, D]` are allowed as well.

    Raises:
        InputError: if one of them is not.
    """
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in (r, protected)):
        raise InputError(f"r={shown(r)} and protected={shown(protected)} count tokens: use whole numbers")
    if not isinstance(metric, Tensor):
        raise InputError(f"metric is of type {type(metric).__name__}, but a tensor [B, N, D] was expected")
    if metric.layout is not torch.strided:
        raise InputError(f"metric is a {metric.layout} tensor, but a dense one was expected: give metric.to_dense()")
    if metric.dim() not in ((3, 4) if per_head else (3,)) or not metric.is_floating_point():
        shapes = "[B, N, D] or [B, H, N, D]" if per_head else "[B, N, D]"
        raise InputError(
            f"metric is {tuple(metric.shape)} {metric.dtype}, but floating point of shape {shapes} was expected"
        )
    if r < 0 or protected < 0:
        raise InputError(f"r={r} and protected={protected} count tokens, but one of them is negative: use 0 or more")


def check_offered(metric: Tensor, given: Mapping[str, Any]) -> None:
    """Check further arguments of a matcher against its metric.

    Args:
        metric: `[B, N, D]` or `[B, H, N, D]`.
        given: values by their names in `OFFERED`; `None` is allowed for each.

    Raises:
        InputError: if a tensor has another B, N, number of axes or device than the metric requires, `anchor` is not
            int64, or `grid` is not a sequence of positive whole numbers.
    """
    counts = {"B": metric.shape[0], "N": metric.shape[-2]}
    for name, axes in _SHAPES.items():
        value = given.get(name)
        if value is None:
            continue
        wanted = f"a tensor [{', '.join(axes)}] on {metric.device} with B={counts['B']} and N={counts['N']}, as the metric has"
        if not isinstance(value, Tensor):
            raise InputError(f"{name} is of type {type(value).__name__}, but {wanted}, was expected")
        fits = len(axes) == value.dim() and all(
            counts.get(axis, length) == length for axis, length in zip(axes, value.shape, strict=True)
        )
        if not fits or value.device != metric.device:
            raise InputError(f"{name} is {tuple(value.shape)} on {value.device}, but {wanted}, was expected")
    anchor, grid = given.get("anchor"), given.get("grid")
    if anchor is not None and anchor.dtype != torch.int64:
        raise InputError(f"anchor is {anchor.dtype}, but positions of tokens were expected: use int64")
    lengths = grid if isinstance(grid, list | tuple) else (None,)
    if grid is not None and not all(
        is_number(length) and isinstance(length, int) and 0 < length < 2**31 for length in lengths
    ):
        raise InputError(
            f"grid={shown(grid)}, but the number of patches along each axis was expected: use (height, width)"
        )


def _check_factors(plan: MergePlan, name: str, tokens: int) -> None:
    """Raise `PatchError` unless the weights and gates of a plan have one number of at least 0 for each token."""
    batch = plan.kept.shape[0]
    for field, value, count in (("weight", plan.weight, tokens), ("gate", plan.gate, plan.tokens_out)):
        if value is None:
            continue
        if not isinstance(value, Tensor) or tuple(value.shape) != (batch, count) or not value.is_floating_point():
            found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise PatchError(
                f"matcher {shown(name)} gave a plan whose {field} is {found}, but floating point of shape [{batch}, {count}] was expected: "
                "give one number for each token"
            )
        if not is_exporting():
            require(
                ~(
                    (value < 0) & value.isfinite()
                ).any(),  # values that are not finite come from such an image, and affect no other image
                f"matcher {shown(name)} gave a plan whose {field} holds a negative number: give numbers from 0 on",
                PatchError,
            )


def check_plan(plan: Any, name: str, metric: Tensor, protected: int) -> None:
    """Check that a plan contains each token once, leaves protected tokens alone, and has valid targets.

    Merging relies on these properties; a plan without them would silently give wrong results. Eager code on a CPU reads
    the values. Compiled code and other devices check them asynchronously, by PyTorch's own assertion.

    Args:
        plan: return value of the matcher.
        name: name of the matcher, for messages.
        metric: `[B, N, D]` or `[B, H, N, D]`, the metric that the matcher received.
        protected: leading tokens that must neither merge nor be merged into.

    Raises:
        PatchError: if the plan violates one of these properties, or is not a `MergePlan`.
    """
    if not isinstance(plan, MergePlan):
        raise PatchError(
            f"matcher {shown(name)} gave a {type(plan).__name__}, but a MergePlan was expected: return one"
        )
    batch, tokens = metric.shape[0], metric.shape[-2]
    fields = {"kept": plan.kept, "source": plan.source, "target": plan.target}
    shapes = {field: tuple(value.shape) for field, value in fields.items()}
    fits = all(value.dim() == 2 and value.shape[0] == batch and value.dtype == torch.int64 for value in fields.values())
    if not fits or plan.source.shape != plan.target.shape or plan.tokens_in != tokens:
        raise PatchError(
            f"matcher {shown(name)} gave a plan of shapes {shapes} for {batch}×{tokens} tokens, but kept [B, N − r], source [B, r] and "
            "target [B, r], all int64, were expected: build it with MergePlan.from_assign"
        )
    _check_factors(plan, name, tokens)
    if is_exporting():
        return
    named = torch.cat([plan.kept, plan.source], dim=1).sort(dim=1).values
    require(
        (named == counting(tokens, named.device)).all(),
        f"matcher {shown(name)} gave a plan that leaves out a token or names one twice: build it with MergePlan.from_assign",
        PatchError,
    )
    joins = (plan.target >= protected) & (plan.target < plan.tokens_out)
    if plan.drops:
        joins = joins | (plan.target == DROPPED)
    require(
        (plan.kept[:, :protected] == counting(protected, named.device)).all() & joins.all(),
        f"matcher {shown(name)} gave a plan that moves or merges one of the first {protected} tokens, which are protected, or lets a token "
        "join a position that is not there (−1 drops it, where drops=True says so): leave them alone",
        PatchError,
    )
