"""Triton kernels of matching and merging: one launch each for edges, plan and merge, and one for the gradient.

The launchers are in `tokenmerge.ops.launch`, the references in `tokenmerge.matching.bipartite` and
`tokenmerge.plan`. No kernel uses atomics, so results are the same in every run; all arithmetic is float32.
`TRITON_INTERPRET=1` runs them on a CPU, which is how the tests check them without a GPU.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _unit_keys(
    keys: Any,
    position: Any,
    valid: Any,
    stride_h: Any,
    stride_n: Any,
    stride_d: Any,
    heads: Any,
    dim: Any,
    D: tl.constexpr,
) -> Any:
    """Keys averaged over heads and divided by their norm, `[rows, D]` float32; 0 where not valid."""
    column = tl.arange(0, D)
    mask = valid[:, None] & (column < dim)[None, :]
    at = position[:, None] * stride_n + column[None, :] * stride_d
    total = tl.load(keys + at, mask=mask, other=0.0).to(tl.float32)
    for head in range(1, heads):
        total += tl.load(keys + head * stride_h + at, mask=mask, other=0.0).to(tl.float32)
    mean = total / heads
    norm = tl.sqrt(tl.sum(mean * mean, axis=1))
    return mean / tl.maximum(norm, 1e-12)[:, None]


@triton.jit
def edges_kernel(
    keys: Any,
    best: Any,
    partner: Any,
    stride_b: Any,
    stride_h: Any,
    stride_n: Any,
    stride_d: Any,
    heads: Any,
    dim: Any,
    first_a: Any,
    first_b: Any,
    count_a: Any,
    count_b: Any,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """For each A token its highest cosine similarity and the B token that has it; never more than a tile of scores.

    keys `[B, H, N, D]`, any strides -> best `[B, |A|]` float32, partner `[B, |A|]` int32 (the lowest one of equals).
    Grid: (tiles of A, B).
    """
    image = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keys += image * stride_b
    a = _unit_keys(keys, first_a + 2 * row.to(tl.int64), row < count_a, stride_h, stride_n, stride_d, heads, dim, D)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    where = tl.zeros((ROWS,), tl.int32)
    for start in range(0, count_b, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        b = _unit_keys(
            keys, first_b + 2 * column.to(tl.int64), column < count_b, stride_h, stride_n, stride_d, heads, dim, D
        )
        scores = tl.dot(a, tl.trans(b), input_precision="ieee")
        scores = tl.where((column < count_b)[None, :], scores, float("-inf"))
        top = tl.max(scores, axis=1)
        found = tl.argmax(scores, axis=1, tie_break_left=True).to(tl.int32) + start
        where = tl.where(top > highest, found, where)  # an equal one further right does not win
        highest = tl.maximum(top, highest)
    out = image * count_a + row
    tl.store(best + out, highest, mask=row < count_a)
    tl.store(partner + out, where, mask=row < count_a)


@triton.jit
def plan_kernel(
    best: Any,
    partner: Any,
    keep: Any,
    source: Any,
    target: Any,
    r: Any,
    protected: Any,
    first_a: Any,
    first_b: Any,
    count_a: Any,
    count_b: Any,
    TILE: tl.constexpr,
) -> None:
    """The plan of the r best edges of each image; equal scores go to the lower A position.

    best float32 and partner int32 `[B, |A|]` -> keep `[B, N']`, source and target `[B, r]`, all int64.
    An edge's rank is the number of edges before it, counted: |A|² comparisons, no sort. Grid: (B,).
    """
    image = tl.program_id(0).to(tl.int64)
    best += image * count_a
    partner += image * count_a
    rest = count_a - r
    keep += image * (protected + rest + count_b)
    source += image * r
    target += image * r
    left = 0  # A tokens in earlier tiles that stay
    for start in range(0, count_a, TILE):
        a = start + tl.arange(0, TILE)
        score = tl.load(best + a, mask=a < count_a, other=float("-inf"))
        rank = tl.zeros((TILE,), tl.int32)
        for other_start in range(0, count_a, TILE):
            other = other_start + tl.arange(0, TILE)
            rival = tl.load(best + other, mask=other < count_a, other=float("-inf"))
            before = (rival[None, :] > score[:, None]) | (
                (rival[None, :] == score[:, None]) & (other[None, :] < a[:, None])
            )
            rank += tl.sum((before & (other < count_a)[None, :]).to(tl.int32), axis=1)
        merged = (rank < r) & (a < count_a)
        stays = ((rank >= r) & (a < count_a)).to(tl.int32)
        to = tl.load(partner + a, mask=merged, other=0)
        tl.store(source + rank, (first_a + 2 * a).to(tl.int64), mask=merged)
        tl.store(target + rank, (protected + rest + to).to(tl.int64), mask=merged)
        at = protected + left + tl.cumsum(stays, axis=0) - 1
        tl.store(keep + at, (first_a + 2 * a).to(tl.int64), mask=stays > 0)
        left += tl.sum(stays, axis=0)
    for start in range(0, count_b, TILE):
        b = start + tl.arange(0, TILE)
        tl.store(keep + protected + rest + b, (first_b + 2 * b).to(tl.int64), mask=b < count_b)
    for start in range(0, protected, TILE):
        first = start + tl.arange(0, TILE)
        tl.store(keep + first, first.to(tl.int64), mask=first < protected)


@triton.jit
def merge_kernel(
    x: Any,
    size: Any,
    keep: Any,
    source: Any,
    target: Any,
    out: Any,
    out_size: Any,
    stride_b: Any,
    stride_n: Any,
    stride_c: Any,
    tokens: Any,
    kept: Any,
    r: Any,
    channels: Any,
    SIZED: tl.constexpr,
    ROWS: tl.constexpr,
    SOURCES: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Size-weighted mean of the tokens that become one, and its size.

    x `[B, N, C]`, any strides; size `[B, N]` float32, contiguous (unused unless SIZED) -> out `[B, N', C]` in the dtype
    of x, out_size `[B, N']` float32. A row that nothing joins is copied to the bit. Grid: (tiles of N', tiles of C, B).
    """
    image = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = row < kept
    mask = inside[:, None] & (column < channels)[None, :]
    x += image * stride_b
    position = tl.load(keep + image * kept + row, mask=inside, other=0)
    own = tl.load(x + position[:, None] * stride_n + column[None, :] * stride_c, mask=mask, other=0.0).to(tl.float32)
    if SIZED:
        total = tl.load(size + image * tokens + position, mask=inside, other=1.0)
    else:
        total = tl.full((ROWS,), 1.0, tl.float32)
    joined = tl.zeros((ROWS,), tl.float32)
    change = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, r, SOURCES):
        s = start + tl.arange(0, SOURCES)
        to = tl.load(target + image * r + s, mask=s < r, other=-1)
        hit = to[None, :] == row[:, None]
        if tl.max(tl.max(hit.to(tl.int32), axis=1), axis=0) > 0:  # most tiles of A tokens have none
            origin = tl.load(source + image * r + s, mask=s < r, other=0)
            if SIZED:
                weight = tl.load(size + image * tokens + origin, mask=s < r, other=0.0)
            else:
                weight = tl.full((SOURCES,), 1.0, tl.float32)
            weights = tl.where(hit, weight[None, :], 0.0)
            there = (s < r)[:, None] & (column < channels)[None, :]
            rows = tl.load(x + origin[:, None] * stride_n + column[None, :] * stride_c, mask=there, other=0.0)
            change += tl.dot(weights, rows.to(tl.float32), input_precision="ieee")
            joined += tl.sum(weights, axis=1)
    total += joined
    # x + Σ sᵢ(xᵢ − x)/S, as in the reference; padding has size 0 and S may be 0
    mean = own + (change - own * joined[:, None]) / tl.maximum(total, 1e-12)[:, None]
    mean = tl.where((joined > 0)[:, None], mean, own)  # to the bit, and infinities elsewhere in the tile stay there
    at = (image * kept + row)[:, None] * channels + column[None, :]
    tl.store(out + at, mean.to(out.dtype.element_ty), mask=mask)
    if tl.program_id(1) == 0:
        tl.store(out_size + image * kept + row, total, mask=inside)


@triton.jit
def merge_gradient_kernel(
    grad: Any,
    size: Any,
    new_size: Any,
    keep: Any,
    source: Any,
    target: Any,
    out: Any,
    stride_b: Any,
    stride_n: Any,
    stride_c: Any,
    tokens: Any,
    kept: Any,
    r: Any,
    channels: Any,
    SIZED: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Each token's share of the gradient of the token it became: `[B, N', C]` -> `[B, N, C]`.

    Rows 0 … N' − 1 of the grid write the tokens in `keep`, the others those in `source`: together each token once.
    Grid: (tiles of N, tiles of C, B).
    """
    image = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_kept = row < kept
    is_source = (row >= kept) & (row < tokens)
    position = tl.load(keep + image * kept + row, mask=is_kept, other=0)
    position += tl.load(source + image * r + row - kept, mask=is_source, other=0)
    become = tl.where(is_kept, row, 0) + tl.load(target + image * r + row - kept, mask=is_source, other=0)
    if SIZED:
        own = tl.load(size + image * tokens + position, mask=row < tokens, other=0.0)
    else:
        own = tl.full((ROWS,), 1.0, tl.float32)
    total = tl.load(new_size + image * kept + become, mask=row < tokens, other=1.0)
    clamped = tl.maximum(total, 1e-12)
    share = tl.where(is_kept, 1.0 - (total - own) / clamped, own / clamped)
    mask = (row < tokens)[:, None] & (column < channels)[None, :]
    at = image * stride_b + become[:, None] * stride_n + column[None, :] * stride_c
    given = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    to = (image * tokens + position)[:, None] * channels + column[None, :]
    tl.store(out + to, (given * share[:, None]).to(out.dtype.element_ty), mask=mask)
