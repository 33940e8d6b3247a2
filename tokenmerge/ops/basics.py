"""Shared operations: ranges, row gathers, sorting, sums over heads, and arithmetic without autocast."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor
from torch.nn import Parameter

from tokenmerge.ops import exported

# --- what PyTorch is doing ------------------------------------------------------------------------------------


def is_recomputing() -> bool:
    """Return whether gradient checkpointing is recomputing a part of a model within backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_exporting() -> bool:
    """Return whether `torch.export` or an ONNX exporter is tracing; `torch.compile` and `torch.jit.trace` do not count.

    In torch 2.11, Dynamo evaluates `torch.compiler.is_exporting()` as true whenever it compiles. The decorator makes
    Dynamo call this function instead of tracing it.
    """
    # the older ONNX exporter traces; asking it first would take a microsecond at every call
    traced = torch._C._get_tracing_state() is not None and torch.onnx.is_in_onnx_export()
    return torch.compiler.is_exporting() or traced


def is_plain(x: Tensor) -> bool:
    """Return whether `x` is an ordinary tensor with memory whose operations are not being traced."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    traced = torch._C._len_torch_dispatch_stack() or torch._C._functorch.is_functorch_wrapped_tensor(x)
    return type(x) in (Tensor, Parameter) and not traced


# --- ranges of integers ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=512)
def _made(count: int, step: int) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be saved for backward later
        return torch.arange(count, device="cpu").mul_(step)  # whatever the default device is


def counting(count: int, device: torch.device, step: int = 1) -> Tensor:
    """Return `0, step, 2·step, …`, `[count]` int64, from a cache on a CPU: never modify the result in place.

    On a CPU, making a range takes as long as using it. The cache is bypassed while code is traced, because a tensor of one
    tracing mode must not reach other code, and on other devices, where memory may belong to a captured graph.

    Args:
        count: number of entries.
        device: device of the result.
        step: difference between entries.
    """
    # arange with a step has a length that Dynamo cannot print if N is dynamic (a quotient of symbols)
    if device.type != "cpu" or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        numbers = torch.arange(count, device=device)
        return numbers.mul_(step)
    return _made(count, step)


# --- rows of tokens ----------------------------------------------------------------------------------------


def flat_rows(index: Tensor, rows: int) -> Tensor:
    """Convert an index `[B, M]` into `[B, rows, C]` to an index `[B·M]` into `[B·rows, C]`, int64."""
    return (index + counting(index.shape[0], index.device, rows).unsqueeze(1)).reshape(-1)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows of each image: `out[b, m] = x[b, index[b, m]]`.

    Gathering whole rows of the flattened tensor is about ten times faster on a CPU than `torch.gather` with an expanded
    index.

    Args:
        x: `[B, N, C]`, any dtype.
        index: `[B, M]` int64.

    Returns:
        `[B, M, C]` in the dtype of `x`.
    """
    batch, rows, channels = x.shape
    out = x.reshape(batch * rows, channels).index_select(0, flat_rows(index, rows))
    return out.reshape(batch, index.shape[1], channels)


def spread_rows(x: Tensor, index: Tensor, drops: bool) -> Tensor:
    """Gather rows as `take_rows`; if `drops`, `index` may contain −1, whose rows are 0."""
    if not drops:
        return take_rows(x, index)
    return take_rows(x, index.clamp_min(0)).masked_fill((index < 0).unsqueeze(2), 0)


# --- orders ------------------------------------------------------------------------------------------------


def descending_order(values: Tensor) -> Tensor:
    """Return the positions of `values [B, M]` by descending value, `[B, M]` int64; ties go to the lower position."""
    if is_exporting():
        return exported.descending_order(values)
    return values.argsort(dim=1, descending=True, stable=True)


def ascending_order(values: Tensor) -> Tensor:
    """Return the positions of `values [B, M]` by ascending value, `[B, M]` int64; ties go to the lower position."""
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


def largest_by(values: Tensor, group: Tensor, groups: int, least: float) -> Tensor:
    """Return the largest value of each group.

    Args:
        values: `[B, M]`.
        group: `[B, M]` int64: the group of each value.
        groups: number of groups G.
        least: result for a group without values; no value is smaller.

    Returns:
        `[B, G]` in the dtype of `values`.
    """
    if is_exporting():
        return exported.largest_by(values, group, groups, least)
    return values.new_full((values.shape[0], groups), least).scatter_reduce(1, group, values, "amax")


def marked(index: Tensor, count: int) -> Tensor:
    """Return which of `0 … count − 1` are in `index [B, M]`, `[B, count]` bool."""
    if is_exporting():
        return exported.marked(index, count)
    marks = torch.zeros(index.shape[0], count, dtype=torch.bool, device=index.device)
    return marks.scatter_(1, index, True)


def places_of(wanted: Tensor, among: Tensor, count: int) -> Tensor:
    """Return where each of `wanted [B, r]` stands in `among [B, M]`, `[B, r]` int64.

    Args:
        wanted: int64 numbers, each of which is in `among`.
        among: different int64 numbers of `0 … count − 1`.
        count: how many numbers there are.
    """
    if is_exporting():
        return exported.places_of(wanted, among)
    place = among.new_zeros(among.shape[0], count)
    return place.scatter_(1, among, counting(among.shape[1], among.device).expand_as(among)).gather(1, wanted)


def first_reaching(ascending: Tensor, levels: Tensor) -> Tensor:
    """Return for each of `levels [M]` the position of the first of the `ascending [B, K]` numbers that reaches it, `[B, M]` int64."""
    if is_exporting():
        return (ascending.unsqueeze(1) < levels.view(1, -1, 1)).to(torch.int64).sum(dim=2)
    return torch.searchsorted(ascending, levels.expand(ascending.shape[0], -1).contiguous())


# --- arithmetic --------------------------------------------------------------------------------------------


def sum_over_heads(keys: Tensor, dim: int) -> Tensor:
    """Return `keys.sum(dim)` in float32 (float64 for float64); few heads on a CPU are added one by one, twice as fast."""
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    if keys.device.type != "cpu" or keys.dtype != wide or not 1 < keys.shape[dim] <= 6:
        return keys.sum(dim=dim, dtype=wide)
    first, second, *others = keys.unbind(dim)
    total = first + second
    for other in others:
        total += other
    return total


def unit(metric: Tensor) -> Tensor:
    """Return `metric [B, N, D]` in float32 with every vector divided by its norm (zero vectors stay 0)."""
    metric = metric.to(torch.float32)
    normed: Tensor = metric / torch.linalg.vector_norm(metric, dim=2, keepdim=True).clamp_min_(1e-12)
    return normed


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype of autocast if it is enabled for a device type, else `None`; the meta device has no autocast."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Return a context manager that disables autocast for a device type; a no-op if autocast is off."""
    if autocast_dtype(device_type) is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
