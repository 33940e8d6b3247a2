"""Matching and merging by functions in C, for inference on a CPU in eager mode.

A block's matching and merging are some 40 operators of PyTorch, and at small batches each costs more than its arithmetic.
Here they are one call. Code that is traced or compiled, and merging with gradients, uses PyTorch's operators instead.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tokenmerge.errors import InputError
from tokenmerge.ops import native_build
from tokenmerge.ops.basics import is_plain
from tokenmerge.schedule import max_merges

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PER_THREAD = 2**18
"""Multiply-adds, or bytes, from which a second thread is worth its start."""

_PACK = struct.Struct("=27qd").pack
"""The arguments of `tokenmerge_match_and_merge`, `Both` in ops/c/merge.c."""

Plan = tuple[Tensor, Tensor, Tensor]


@functools.cache
def refusal() -> str | None:
    """Return why the functions cannot run on this machine, or `None` if they can; the first call may compile them."""
    found = native_build.library()
    return found if isinstance(found, str) else None


@functools.cache
def _functions() -> Any:
    found = native_build.library()
    count, pointer = ctypes.c_int64, ctypes.c_void_p
    found.tokenmerge_scratch.argtypes = [count] * 3
    found.tokenmerge_scratch.restype = found.tokenmerge_has_float16.restype = count
    found.tokenmerge_match.argtypes = [pointer, *[count] * 10, *[pointer] * 4, count]
    found.tokenmerge_merge.argtypes = [
        *(pointer, *[count] * 6, pointer, count, count),
        *(*[pointer] * 6, count, ctypes.c_float, count),
    ]
    found.tokenmerge_match_and_merge.argtypes = [ctypes.c_char_p]
    found.tokenmerge_match.restype = found.tokenmerge_match_and_merge.restype = None
    found.tokenmerge_merge.restype = count
    return found


def dtype_refusal(dtype: torch.dtype) -> str | None:
    """Return why the functions cannot compute on tokens of a dtype, or `None` if they can."""
    if dtype not in _DTYPES:
        return f"the tokens are {dtype}, and the functions in C compute float16, bfloat16 and float32"
    if dtype == torch.float16 and not _functions().tokenmerge_has_float16():
        return "the C compiler knows no float16"
    return None


def fits(x: Tensor) -> bool:
    """Return whether the functions can run on a tensor right now: plain eager code on a CPU, and a dtype they know."""
    plain = x.is_cpu and is_plain(x) and not x.is_neg() and forward_ad._current_level < 0
    return plain and x.numel() > 0 and knows(x.dtype)


@functools.cache
def knows(dtype: torch.dtype) -> bool:
    """Return whether the functions can run on this machine, and compute on tokens of a dtype."""
    return refusal() is None and dtype_refusal(dtype) is None


def learns(x: Tensor, size: Tensor | None) -> bool:
    """Return whether merging must record a gradient for tokens or sizes."""
    return torch.is_grad_enabled() and (x.requires_grad or (size is not None and size.requires_grad))


def fits_both(keys: Tensor, x: Tensor, size: Tensor | None, r: int, protected: int) -> bool:
    """Return whether `match_and_merge` can run; where it cannot, the usual way raises the errors.

    Args:
        keys: `[B, H, N, D]`.
        x: tokens `[B, N, C]`.
        size: patches per token `[B, N]` float32 on the device of the tokens, or `None`.
        r: tokens to merge away.
        protected: leading tokens that never merge.
    """
    if x.dim() != 3 or keys.dim() != 4:
        return False
    (batch, tokens, _), of_keys = x.shape, keys.shape
    if of_keys[0] != batch or of_keys[2] != tokens or r > (tokens - protected) // 2:
        return False
    if size is not None and size.shape != (batch, tokens):
        return False
    if learns(x, size):
        return False
    return fits(keys) and x.is_cpu and not x.is_neg() and knows(x.dtype)


def _threads(work: int) -> int:
    return 1 if work < 2 * _PER_THREAD else min(torch.get_num_threads(), work // _PER_THREAD)


class _Scratch(threading.local):
    """Memory that matching reuses; each thread has its own, because threads run their functions at the same time."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, device="cpu")

    def of(self, count: int) -> Tensor:
        """Return memory for `count` floats; little of it is kept, because fresh memory costs more than small matching."""
        if count <= self.memory.numel():
            return self.memory
        fresh = torch.empty(count, dtype=torch.float32, device="cpu")
        if count <= _KEPT:
            self.memory = fresh
        return fresh


_scratch = _Scratch()
_KEPT = 2**19  # floats, 2 MB


@functools.lru_cache(maxsize=512)
def _floats(tokens: int, dim: int, protected: int) -> int:
    return int(_functions().tokenmerge_scratch(tokens, dim, protected))


def _empty_plan(batch: int, tokens: int, r: int) -> Plan:
    return (
        torch.empty(batch, tokens - r, dtype=torch.int64, device="cpu"),
        torch.empty(batch, r, dtype=torch.int64, device="cpu"),
        torch.empty(batch, r, dtype=torch.int64, device="cpu"),
    )


def _empty_merged(
    batch: int, left: int, channels: int, dtype: torch.dtype, log: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return (
        torch.empty(batch, left, channels, dtype=dtype, device="cpu"),
        torch.empty(batch, left, dtype=torch.float32, device="cpu"),
        torch.empty(batch, left, dtype=log, device="cpu") if log is not None and knows(log) else None,
    )


def match(keys: Tensor, r: int, protected: int) -> Plan:
    """Match tokens by bipartite soft matching, see `tokenmerge.matching.bipartite`.

    Args:
        keys: `[B, H, N, D]`, a plain tensor on a CPU for which `fits` holds.
        r: tokens to merge away, at most `schedule.max_merges` of N.
        protected: leading tokens that never merge.

    Returns:
        `kept [B, N − r]`, `source [B, r]` and `target [B, r]`, int64.
    """
    if keys.stride(3) != 1:
        keys = keys.contiguous()
    batch, heads, tokens, dim = keys.shape
    r = min(r, max_merges(tokens, protected))  # memory of a larger plan would stay unwritten
    per_image, per_head, per_token, _ = keys.stride()
    kept, source, target = _empty_plan(batch, tokens, r)
    scratch = _scratch.of(batch * _floats(tokens, dim, protected))
    _functions().tokenmerge_match(
        keys.data_ptr(), _DTYPES[keys.dtype], batch, heads, tokens, dim, per_image, per_head, per_token, r, protected,
        kept.data_ptr(), source.data_ptr(), target.data_ptr(), scratch.data_ptr(),
        _threads(batch * tokens * tokens * dim // 4),
    )  # fmt: skip
    return kept, source, target


def merge(
    x: Tensor, size: Tensor | None, kept: Tensor, source: Tensor, target: Tensor, log: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Merge tokens into size-weighted means, without gradient.

    The means are those of PyTorch's operators to the bit.

    Args:
        x: `[B, N, C]`, a plain tensor on a CPU for which `fits` holds.
        size: patches per token `[B, N]`, or `None` if all are 1.
        kept: `[B, N']` int64: the token that represents each new position.
        source: `[B, r]` int64: the tokens that are merged away.
        target: `[B, r]` int64: the new position that each source joins; none is −1.
        log: dtype of the logarithms of the new sizes, or `None` to leave them out.

    Returns:
        Tokens `[B, N', C]` in the dtype of x, sizes `[B, N']` float32, and the logarithms of the sizes `[B, N']`, clamped to
        the least number of their dtype, or `None`.
    """
    (batch, tokens, channels), (per_image, per_token, step) = x.shape, x.stride()
    if step != 1:
        x, per_image, per_token = x.contiguous(), tokens * channels, channels
    left, r = kept.shape[1], source.shape[1]
    if kept.shape[0] != batch or source.shape != (batch, r) or target.shape != (batch, r):
        raise InputError(
            f"a plan holds kept {tuple(kept.shape)}, source {tuple(source.shape)} and target {tuple(target.shape)}, but [B, N'], "
            f"[B, r] and [B, r] with B={batch} were expected: make plans with a matcher or MergePlan.from_assign"
        )
    kept, source, target = (_indices(part) for part in (kept, source, target))
    size = None if size is None else size.to(torch.float32).resolve_neg().contiguous()
    out, sizes, logs = _empty_merged(batch, left, channels, x.dtype, log)
    done = _functions().tokenmerge_merge(
        x.data_ptr(), _DTYPES[x.dtype], batch, tokens, channels, per_image, per_token,
        None if size is None else size.data_ptr(), left, r, kept.data_ptr(), source.data_ptr(), target.data_ptr(),
        out.data_ptr(), sizes.data_ptr(), None if logs is None else logs.data_ptr(), 0 if logs is None else _DTYPES[logs.dtype],
        0.0 if logs is None else _least(logs.dtype), _threads(batch * left * channels),
    )  # fmt: skip
    if not done:
        raise InputError(
            f"a plan names tokens outside 0 … {tokens - 1}, or positions outside 0 … {left - 1}, but each must exist: make plans "
            "with a matcher or MergePlan.from_assign"
        )
    return out, sizes, logs


def match_and_merge(
    keys: Tensor, x: Tensor, size: Tensor | None, r: int, protected: int, log: torch.dtype | None
) -> tuple[Plan, tuple[Tensor, Tensor, Tensor | None]]:
    """Match tokens and merge them, in one call; arguments and results are those of `match` and `merge`."""
    if keys.stride(3) != 1 or x.stride(2) != 1 or (size is not None and not size.is_contiguous()):
        plan = match(keys, r, protected)
        return plan, merge(x, size, *plan, log)
    (batch, heads, tokens, dim), (key_image, key_head, key_token, _) = keys.shape, keys.stride()
    channels, (per_image, per_token, _), left = x.shape[2], x.stride(), tokens - r
    kept, source, target = _empty_plan(batch, tokens, r)
    out, sizes, logs = _empty_merged(batch, left, channels, x.dtype, log)
    scratch = _scratch.of(batch * _floats(tokens, dim, protected))  # a name keeps the memory until the call has ended
    # packed, because ctypes takes longer to convert an argument than struct takes to pack a number
    _functions().tokenmerge_match_and_merge(_PACK(
        keys.data_ptr(), _DTYPES[keys.dtype], batch, heads, tokens, dim, key_image, key_head, key_token, r, protected,
        kept.data_ptr(), source.data_ptr(), target.data_ptr(), scratch.data_ptr(),
        _threads(batch * tokens * tokens * dim // 4), x.data_ptr(), _DTYPES[x.dtype], channels, per_image, per_token,
        0 if size is None else size.data_ptr(), out.data_ptr(), sizes.data_ptr(), 0 if logs is None else logs.data_ptr(),
        0 if logs is None else _DTYPES[logs.dtype], _threads(batch * left * channels),
        0.0 if logs is None else _least(logs.dtype),
    ))  # fmt: skip
    return (kept, source, target), (out, sizes, logs)


def _indices(part: Tensor) -> Tensor:
    """Return a part of a plan as C reads it."""
    if part.is_floating_point() or part.is_complex() or part.dtype == torch.bool or not part.is_cpu:
        raise InputError(
            f"a plan holds {part.dtype} on {str(part.device)!r}, but int64 on the device of the tokens was expected: make plans with "
            "a matcher or MergePlan.from_assign"
        )
    return part.to(torch.int64).contiguous()


@functools.cache
def _least(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).min)
