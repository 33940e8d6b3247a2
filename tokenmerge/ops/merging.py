"""Merging in Triton kernels: one launch for tokens, sizes and logarithms of sizes, and one for the gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from tokenmerge.ops.basics import is_plain
from tokenmerge.ops.launch import Launch, one_program_per, operator, start_all
from tokenmerge.ops.merge_kernels import merge_gradient_kernel, merge_kernel

_ROWS = 4  # with _CHANNELS and _WARPS: the fastest of 16 tile shapes on an H200
_CHANNELS = 256
_WARPS = 2
_GRADIENT_ROWS = 16
_GRADIENT_CHANNELS = 128
_SOURCES = 64  # source tokens that are searched at once
_ALIGNED = 8  # elements: PyTorch's memory-efficient attention copies masks whose rows are not aligned so


def _tile(channels: int, most: int) -> int:
    """Return how many channels one program handles, at most `most`."""
    return min(most, max(16, int(triton.next_power_of_2(channels))))


def _merge(
    x: Tensor, size: Tensor | None, keep: Tensor, source: Tensor, target: Tensor, out: tuple[Tensor, Tensor, Tensor]
) -> Launch:
    batch, tokens, channels = x.shape
    kept, r = keep.shape[1], source.shape[1]
    log = out[2]
    tile, tiles = _tile(channels, _CHANNELS), one_program_per(kept, _ROWS)
    tensors = (x, x if size is None else size.contiguous(), keep.contiguous(), source.contiguous(), target.contiguous())
    constants = {
        "SIZED": size is not None,
        "LOG": log.shape[1] > 0,
        "LEAST": torch.finfo(log.dtype).min,
        "ROWS": _ROWS,
        "SOURCES": _SOURCES,
        "CHANNELS": tile,
        "num_warps": _WARPS,
    }
    arguments = (*tensors, *out, *x.stride(), tokens, kept, r, channels, tiles, log.shape[1])
    return Launch(merge_kernel, batch * tiles * one_program_per(channels, tile), arguments, constants)


def _empty_merged(x: Tensor, keep: Tensor, log: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, kept = keep.shape
    width = 0 if log is None else -(-kept // _ALIGNED) * _ALIGNED
    out, size = x.new_empty(batch, kept, x.shape[2]), x.new_empty(batch, kept, dtype=torch.float32)
    return out, size, x.new_empty(batch, width, dtype=log or torch.float32)


def _run(
    x: Tensor, size: Tensor | None, keep: Tensor, source: Tensor, target: Tensor, log: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    out = _empty_merged(x, keep, log)
    start_all([_merge(x, size, keep, source, target, out)])
    return out


@operator("tokenmerge::merge", lambda x, size, keep, source, target, log: _empty_merged(x, keep, log))
def _operator(
    x: Tensor, size: Tensor | None, keep: Tensor, source: Tensor, target: Tensor, log: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _run(x, size, keep, source, target, log)


def merge(
    x: Tensor,
    size: Tensor | None,
    keep: Tensor,
    source: Tensor,
    target: Tensor,
    log: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Merge tokens into size-weighted means; differentiable with respect to x.

    Args:
        x: `[B, N, C]`, float16, bfloat16 or float32, any strides.
        size: patches per token `[B, N]` float32, or `None` if all are 1.
        keep: `[B, N']` int64: the token that represents each new position.
        source: `[B, r]` int64: the tokens that are merged away.
        target: `[B, r]` int64: the new position that each source joins.
        log: dtype of the logarithms of the new sizes, or `None` to leave them out.

    Returns:
        Tokens `[B, N', C]` in the dtype of x, sizes `[B, N']` float32, and the logarithms of the sizes `[B, N']`, clamped to
        the least number of their dtype, or `None`. The logarithms are a view with rows aligned as PyTorch's attention
        requires of masks.
    """
    learns = torch.is_grad_enabled() and x.requires_grad
    run = _run if is_plain(x) and not learns else _operator
    out, sizes, logs = run(x, size, keep, source, target, log)
    return out, sizes, None if log is None else logs[:, : keep.shape[1]]


def _gradient(
    grad: Tensor, size: Tensor | None, new_size: Tensor, keep: Tensor, source: Tensor, target: Tensor, out: Tensor
) -> Launch:
    batch, tokens, channels = out.shape
    tile, tiles = _tile(channels, _GRADIENT_CHANNELS), one_program_per(tokens, _GRADIENT_ROWS)
    tensors = (grad, grad if size is None else size.contiguous(), new_size)
    plan = (keep.contiguous(), source.contiguous(), target.contiguous())
    numbers = (*grad.stride(), tokens, keep.shape[1], source.shape[1], channels, tiles)
    constants = {"SIZED": size is not None, "ROWS": _GRADIENT_ROWS, "CHANNELS": tile}
    programs = batch * tiles * one_program_per(channels, tile)
    return Launch(merge_gradient_kernel, programs, (*tensors, *plan, out, *numbers), constants)


@operator(
    "tokenmerge::merge_gradient", lambda grad, size, new_size, keep, source, target: _empty_gradient(grad, source)
)
def _gradient_operator(
    grad: Tensor, size: Tensor | None, new_size: Tensor, keep: Tensor, source: Tensor, target: Tensor
) -> Tensor:
    out = _empty_gradient(grad, source)
    start_all([_gradient(grad, size, new_size, keep, source, target, out)])
    return out


def _empty_gradient(grad: Tensor, source: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], grad.shape[1] + source.shape[1], grad.shape[2])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, size, keep, source, target, _ = inputs
    ctx.save_for_backward(size, output[1], keep, source, target)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    size, new_size, keep, source, target = ctx.saved_tensors
    return _gradient_operator(grad, size, new_size, keep, source, target), None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_remember)


def launches(x: Tensor, sized: bool, r: int, log: torch.dtype | None) -> list[Launch]:
    """Return the launches of the merge of r of the tokens `x` and of its gradient; `x` may be on the "meta" device."""
    batch, tokens, _ = x.shape
    size = x.new_empty(batch, tokens, dtype=torch.float32) if sized else None
    keep, source, target = (x.new_empty(batch, n, dtype=torch.int64) for n in (tokens - r, r, r))
    out = _empty_merged(x, keep, log)
    gradient = _gradient(out[0], size, out[1], keep, source, target, x)
    return [_merge(x, size, keep, source, target, out), gradient]


def compiled_for(dtype: torch.dtype) -> list[Any]:
    """Compile the merge kernels for a dtype and Triton's current target, on "meta" tensors."""
    x = torch.empty(1, 197, 768, dtype=dtype, device="meta")
    return [launch.compile() for sized in (False, True) for launch in launches(x, sized, 8, dtype)]
