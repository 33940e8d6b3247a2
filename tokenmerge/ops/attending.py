"""Proportional attention in a Triton kernel, which adds `log size` to the scores at the cost of attention without a mask.

PyTorch's flash attention takes no mask, and its other kernels read a general mask, in effect one number per score
(`[B, H, N, N]`). One logarithm per key is only N numbers. The kernel supports half precision only: float32 products on
tensor cores (three tf32 products each) need more registers than a GPU has.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tokenmerge.ops.attention_kernels import attention_kernel
from tokenmerge.ops.basics import is_plain
from tokenmerge.ops.launch import INTERPRETED, Launch, divisor, one_program_per, operator, start_all

_FACTORS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16,  # the interpreter cannot multiply bfloat16 matrices
}


def _constants(channels: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the compile-time constants of the kernel: the fastest of 11 tile shapes for D = 64 on an H200."""
    return {"D": channels, "FACTOR": _FACTORS[dtype], "ROWS": 64, "COLUMNS": 64, "num_warps": 4, "num_stages": 3}


def _launch(query: Tensor, key: Tensor, value: Tensor, log: Tensor, out: Tensor, scale: float) -> Launch:
    batch, heads, queries, channels = query.shape
    strides = [stride for x in (query, key, value) for stride in x.stride()[:3]]
    constants = _constants(channels, query.dtype)
    step, log_step = divisor(*strides), min(8, divisor(*log.stride()[:2]))
    tiles = one_program_per(queries, constants["ROWS"])
    numbers = (scale, *(stride // step for stride in strides), *(stride // log_step for stride in log.stride()[:2]))
    arguments = (query, key, value, log, out, *numbers, heads, queries, key.shape[2], tiles)
    return Launch(attention_kernel, batch * heads * tiles, arguments, {**constants, "STEP": step, "LOG_STEP": log_step})


def _empty(query: Tensor) -> Tensor:
    """Allocate the output as `[B, M, H, D]`, the layout that the projection after attention reads."""
    batch, heads, queries, channels = query.shape
    return query.new_empty(batch, queries, heads, channels)


def _aligned(x: Tensor) -> bool:
    """Return whether each row of D channels is contiguous and starts at a multiple of 16 bytes within its storage."""
    return bool(x.stride(3) == 1 and x.storage_offset() % 8 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3]))


def _run(query: Tensor, key: Tensor, value: Tensor, log: Tensor, scale: float) -> Tensor:
    query, key, value = (x if _aligned(x) else x.contiguous() for x in (query, key, value))
    log = log if log.stride(2) == 1 else log.contiguous()
    out = _empty(query)
    start_all([_launch(query, key, value, log, out, scale)])
    return out


@operator("tokenmerge::attend", lambda query, key, value, log, scale: _empty(query))
def _operator(query: Tensor, key: Tensor, value: Tensor, log: Tensor, scale: float) -> Tensor:
    return _run(query, key, value, log, scale)


def attend(query: Tensor, key: Tensor, value: Tensor, log: Tensor, scale: float) -> Tensor:
    """Compute `softmax(QKᵀ·scale + log size) V` without gradient.

    Args:
        query: M queries `[B, H, M, D]`, float16 or bfloat16, any strides; D is 16, 32 or 64.
        key: `[B, H, N, D]`, the dtype of the query.
        value: `[B, H, N, D]`, the dtype of the query.
        log: logarithms of the sizes `[B, H, N]`, any floating dtype; −inf or the least number of the dtype marks padding.
        scale: factor of QKᵀ.

    Returns:
        `[B, H, M, D]` in the dtype of the query.
    """
    run = _run if is_plain(query) else _operator
    return run(query, key, value, log, scale).transpose(1, 2)


def launches(query: Tensor, key: Tensor, value: Tensor, log: Tensor) -> list[Launch]:
    """Return the launch that computes attention, for tests and compilation; tensors may be on the "meta" device."""
    return [_launch(query, key, value, log, _empty(query), 1.0)]


def compiled_for(dtype: torch.dtype, heads: int, dim: int) -> list[Any]:
    """Compile the attention kernel for H heads of D = `dim` channels and Triton's current target, on "meta" tensors."""
    qkv = torch.empty(1, 197, 3, heads, dim, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
    log = torch.empty(1, 1, 197, dtype=dtype, device="meta").expand(1, heads, 197)
    return [launch.compile() for launch in launches(qkv[0], qkv[1], qkv[2], log)]
