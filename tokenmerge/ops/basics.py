"""Shared operations: ranges, row gathers, sorting, sums over heads, and arithmetic without autocast."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from tokenmerge.ops.modes import is_exporting

# --- ranges of integers ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=512)
def _made(count: int, step: int) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be saved for backward later
        return torch.arange(count).mul_(step)


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
    """Return the positions of `values [B, M]` by descending value, `[B, M]` int64; ties go to the lower position.

    ONNX has no stable sort, but its TopK also returns the lower one of equal positions first.
    """
    if torch.onnx.is_in_onnx_export() and is_exporting():
        return values.topk(values.shape[1], dim=1).indices
    return values.argsort(dim=1, descending=True, stable=True)


def ascending_order(values: Tensor) -> Tensor:
    """Return the positions of integers `values [B, M]` by ascending value, `[B, M]` int64; ties go to the lower position."""
    return descending_order(-values)


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
