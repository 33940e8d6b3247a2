"""Launchers of the Triton kernels as torch custom ops, with fake kernels for `torch.compile` and autograd.

Importing this module needs Triton; `tokenmerge.ops.choice` says whether that is so.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from tokenmerge.ops.kernels import edges_kernel, merge_gradient_kernel, merge_kernel, plan_kernel


def _partition(tokens: int, protected: int) -> tuple[int, int, int, int]:
    """First position of A and of B, and how many tokens each has."""
    first_a, first_b = protected + protected % 2, protected + 1 - protected % 2
    return first_a, first_b, len(range(first_a, tokens, 2)), len(range(first_b, tokens, 2))


@torch.library.custom_op("tokenmerge::edges", mutates_args=())
def edges(keys: Tensor, protected: int) -> tuple[Tensor, Tensor]:
    """Each A token's best cosine similarity `[B, |A|]` float32, and the B token that has it `[B, |A|]` int32.

    Args:
        keys: `[B, H, N, D]`, any floating dtype and strides; averaged over H.
        protected: leading tokens that take no part.
    """
    batch, heads, tokens, dim = keys.shape
    first_a, first_b, count_a, count_b = _partition(tokens, protected)
    best = torch.empty(batch, count_a, dtype=torch.float32, device=keys.device)
    partner = torch.empty(batch, count_a, dtype=torch.int32, device=keys.device)
    rows = 64 if count_a > 32 else 16
    edges_kernel[(triton.cdiv(count_a, rows), batch)](
        keys,
        best,
        partner,
        *keys.stride(),
        heads,
        dim,
        first_a,
        first_b,
        count_a,
        count_b,
        D=max(16, triton.next_power_of_2(dim)),
        ROWS=rows,
        COLUMNS=64,
    )
    return best, partner


@edges.register_fake
def _(keys: Tensor, protected: int) -> tuple[Tensor, Tensor]:
    _, _, count_a, _ = _partition(keys.shape[2], protected)
    best = keys.new_empty(keys.shape[0], count_a, dtype=torch.float32)
    return best, torch.empty_like(best, dtype=torch.int32)


@torch.library.custom_op("tokenmerge::plan", mutates_args=())
def plan(best: Tensor, partner: Tensor, tokens: int, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """`keep [B, N']`, `source [B, r]`, `target [B, r]` of the r best of the `edges`; int64.

    Args:
        best: `[B, |A|]` float32.
        partner: `[B, |A|]` int32.
        tokens: N.
        r: tokens to merge away, at most |A|.
        protected: leading tokens that take no part.
    """
    batch = best.shape[0]
    first_a, first_b, count_a, count_b = _partition(tokens, protected)
    keep, source, target = _empty_plan(best, tokens, r)
    # the more edges, the larger the tile of ranks that pays
    plan_kernel[(batch,)](
        best, partner, keep, source, target, r, protected, first_a, first_b, count_a, count_b, TILE=128
    )
    return keep, source, target


@plan.register_fake
def _(best: Tensor, partner: Tensor, tokens: int, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_plan(best, tokens, r)


def _empty_plan(best: Tensor, tokens: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = best.shape[0]
    keep, source = (best.new_empty(batch, n, dtype=torch.int64) for n in (tokens - r, r))
    return keep, source, torch.empty_like(source)


def _tiles(channels: int) -> int:
    """Channels that one program takes; a power of two, at least 16 for the matrix units."""
    return min(128, max(16, int(triton.next_power_of_2(channels))))


@torch.library.custom_op("tokenmerge::merge", mutates_args=())
def merge(x: Tensor, size: Tensor | None, keep: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Size-weighted mean: merged tokens `[B, N', C]` in the dtype of x, sizes `[B, N']` float32.

    Args:
        x: `[B, N, C]` float16, bfloat16 or float32, any strides.
        size: `[B, N]` float32, or `None` for all ones.
        keep: `[B, N']`, int64; `source` and `target` are `[B, r]`, int64: see `MergePlan`.
        source: tokens that are merged away.
        target: the new positions that they join.
    """
    batch, tokens, channels = x.shape
    kept, r = keep.shape[1], source.shape[1]
    out, out_size = _empty_merged(x, keep)
    tile = _tiles(channels)
    merge_kernel[(triton.cdiv(kept, 32), triton.cdiv(channels, tile), batch)](
        x,
        x if size is None else size.contiguous(),
        keep.contiguous(),
        source.contiguous(),
        target.contiguous(),
        out,
        out_size,
        *x.stride(),
        tokens,
        kept,
        r,
        channels,
        SIZED=size is not None,
        ROWS=32,
        SOURCES=32,
        CHANNELS=tile,
    )
    return out, out_size


@merge.register_fake
def _(x: Tensor, size: Tensor | None, keep: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_merged(x, keep)


def _empty_merged(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape[0], keep.shape[1], x.shape[2])
    return out, x.new_empty(x.shape[0], keep.shape[1], dtype=torch.float32)


@torch.library.custom_op("tokenmerge::merge_gradient", mutates_args=())
def merge_gradient(
    grad: Tensor, size: Tensor | None, new_size: Tensor, keep: Tensor, source: Tensor, target: Tensor
) -> Tensor:
    """Gradient of `merge` with respect to x: `[B, N', C]` -> `[B, N, C]`, same dtype."""
    batch, kept, channels = grad.shape
    tokens, r = kept + source.shape[1], source.shape[1]
    out = grad.new_empty(batch, tokens, channels)
    tile = _tiles(channels)
    merge_gradient_kernel[(triton.cdiv(tokens, 32), triton.cdiv(channels, tile), batch)](
        grad,
        grad if size is None else size.contiguous(),
        new_size,
        keep.contiguous(),
        source.contiguous(),
        target.contiguous(),
        out,
        *grad.stride(),
        tokens,
        kept,
        r,
        channels,
        SIZED=size is not None,
        ROWS=32,
        CHANNELS=tile,
    )
    return out


@merge_gradient.register_fake
def _(grad: Tensor, size: Tensor | None, new_size: Tensor, keep: Tensor, source: Tensor, target: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], keep.shape[1] + source.shape[1], grad.shape[2])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, size, keep, source, target = inputs
    ctx.save_for_backward(size, output[1], keep, source, target)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _merge_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
    if grad is None:
        return None, None, None, None, None
    size, new_size, keep, source, target = ctx.saved_tensors
    return merge_gradient(grad, size, new_size, keep, source, target), None, None, None, None


merge.register_autograd(_merge_backward, setup_context=_remember)
