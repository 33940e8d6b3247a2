"""What every hot operation needs: ranges, rows, orders, sums over heads, and arithmetic that autocast leaves alone."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from tokenmerge.ops import exported

# --- what PyTorch is doing ------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_exporting() -> bool:
    """Whether `torch.export`, TorchScript's tracer or an exporter built on them traces the model: compiling is not exporting.

    In torch 2.11, Dynamo takes `torch.compiler.is_exporting()` for true wherever it compiles. It runs this function
    instead of tracing it, so that the answer is Python's own.
    """
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


# --- ranges of integers ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=512)
def _made(count: int, step: int) -> Tensor:
    with torch.inference_mode(False):  # or a later training pass could not save it for backward
        return torch.arange(count).mul_(step)


def counting(count: int, device: torch.device, step: int = 1) -> Tensor:
    """`0, step, 2·step, …`, `[count]` int64. The same tensor each time on a CPU: never change it in place.

    Making a range takes as long as using it on a CPU, so it is made once there. It is made anew wherever code is traced,
    because another mode's tensor must not be found by the next caller, and on other devices, where memory may belong to a
    captured graph.
    """
    # not arange with a step: its length would be a quotient of symbols where N is dynamic, which Dynamo cannot print
    if device.type != "cpu" or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or is_exporting():
        numbers = torch.arange(count, device=device)
        return numbers.mul_(step)
    return _made(count, step)


# --- rows of tokens ----------------------------------------------------------------------------------------


def flat_rows(index: Tensor, rows: int) -> Tensor:
    """Row numbers into `[B·rows, C]` for an index `[B, M]` into `[B, rows, C]`; `[B·M]`, int64."""
    return (index + counting(index.shape[0], index.device, rows).unsqueeze(1)).reshape(-1)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """`out[b, m] = x[b, index[b, m]]` for x `[B, N, C]` and index `[B, M]`; `[B, M, C]`.

    Whole rows of the flattened tensor: on a CPU some ten times faster than `torch.gather` on an expanded index.
    """
    batch, rows, channels = x.shape
    out = x.reshape(batch * rows, channels).index_select(0, flat_rows(index, rows))
    return out.reshape(batch, index.shape[1], channels)


def spread_rows(x: Tensor, index: Tensor, drops: bool) -> Tensor:
    """`take_rows` where an index may be −1, if `drops` says so: those rows are 0."""
    if not drops:
        return take_rows(x, index)
    return take_rows(x, index.clamp_min(0)).masked_fill((index < 0).unsqueeze(2), 0)


# --- orders ------------------------------------------------------------------------------------------------


def descending_order(values: Tensor) -> Tensor:
    """Return the positions of `values [B, M]` from the largest to the smallest, equal ones by ascending position; int64."""
    if is_exporting():
        return exported.descending_order(values)
    return values.argsort(dim=1, descending=True, stable=True)


def ascending_order(values: Tensor) -> Tensor:
    """Return the positions from the smallest to the largest, equal ones by ascending position; int64."""
    if is_exporting():
        return exported.ascending_order(values)
    return values.argsort(dim=1, stable=True)


def ascending(values: Tensor) -> Tensor:
    """Return integers `[B, M]` from the smallest to the largest."""
    return values.gather(1, ascending_order(values)) if is_exporting() else values.sort(dim=1).values


# --- sums and maxima into rows -----------------------------------------------------------------------------


def add_rows(rows: Tensor, target: Tensor, values: Tensor, left: int) -> Tensor:
    """Return rows to which others were added; the memory of `rows` is used where that is faster.

    Args:
        rows: `[B·N']` or `[B·N', C]`.
        target: `[B·r]` int64: the row that each value is added to, of the same image.
        values: `[B·r]` or `[B·r, C]`.
        left: N'.
    """
    if is_exporting():
        return exported.add_rows(rows, target, values, left)
    return rows.index_add_(0, target, values)


def largest_rows(rows: Tensor, target: Tensor, values: Tensor, left: int) -> Tensor:
    """Return the maximum of each of `rows` and the values that join it; arguments as of `add_rows`."""
    if is_exporting():
        return exported.largest_rows(rows, target, values, left)
    index = target if rows.dim() == 1 else target.unsqueeze(1).expand(-1, rows.shape[1])
    return rows.scatter_reduce(0, index, values, "amax", include_self=True)


# --- arithmetic --------------------------------------------------------------------------------------------


def sum_over_heads(keys: Tensor, dim: int) -> Tensor:
    """`keys.sum(dim)` in float32 (float64 for float64); for few heads on a CPU by additions, twice as fast there."""
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    if keys.device.type != "cpu" or keys.dtype != wide or not 1 < keys.shape[dim] <= 6:
        return keys.sum(dim=dim, dtype=wide)
    first, second, *others = keys.unbind(dim)
    total = first + second
    for other in others:
        total += other
    return total


def unit(metric: Tensor) -> Tensor:
    """`metric [B, N, D]` in float32, every vector divided by its length."""
    metric = metric.to(torch.float32)
    normed: Tensor = metric / torch.linalg.vector_norm(metric, dim=2, keepdim=True).clamp_min_(1e-12)
    return normed


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast is casting to on this device right now, or `None`; the meta device knows no autocast."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast does nothing; free where it is off already."""
    if autocast_dtype(device_type) is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
