"""Proportional attention by a Triton kernel: sizes are added to scores on the chip, at the cost of no mask at all.

PyTorch's flash attention takes no mask, and its other kernels take a general one, `[B, H, N, N]` in effect, of which they read
a number for each score. A logarithm for each key needs N numbers. Half precision only: products in float32 on the matrix unit
(three of tf32) take more registers than there are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tokenmerge.ops.attention_kernels import attention_kernel
from tokenmerge.ops.launch import INTERPRETED, Launch, divisor, is_plain, one_program_per, operator, start_all

_FACTORS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16,  # the interpreter cannot multiply matrices of bfloat16
}


def _constants(channels: int, dtype: torch.dtype) -> dict[str, Any]:
    """Sizes of tiles: of 11 the fastest for heads of 64 channels on an H200."""
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
    """Memory for the output: heads lie side by side in it, as the projection after attention reads them."""
    batch, heads, queries, channels = query.shape
    return query.new_empty(batch, queries, heads, channels)


def _aligned(x: Tensor) -> bool:
    """Whether each row lies in one piece that begins at a multiple of 16 bytes, as far as the tensor can tell."""
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
    """`softmax(QKᵀ·scale + log size) V`, `[B, H, M, D]` in the dtype of the query; takes no gradient.

    Args:
        query: `[B, H, M, D]`, float16 or bfloat16, any strides, D 16, 32 or 64.
        key: `[B, H, N, D]`.
        value: `[B, H, N, D]`.
        log: `[B, H, N]`, any floating dtype: the logarithms of sizes. −inf and the least number of the dtype are padding.
        scale: factor of QKᵀ.
    """
    run = _run if is_plain(query) else _operator
    return run(query, key, value, log, scale).transpose(1, 2)


def launches(query: Tensor, key: Tensor, value: Tensor, log: Tensor) -> list[Launch]:
    """The one that attends; the tensors may be on the "meta" device."""
    return [_launch(query, key, value, log, _empty(query), 1.0)]


def compiled_for(dtype: torch.dtype, heads: int, dim: int) -> list[Any]:
    """Compile what attention over heads of that size needs, for Triton's current target, without any memory."""
    qkv = torch.empty(1, 197, 3, heads, dim, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
    log = torch.empty(1, 1, 197, dtype=dtype, device="meta").expand(1, heads, 197)
    return [launch.compile() for launch in launches(qkv[0], qkv[1], qkv[2], log)]
