"""Triton kernels of bipartite matching: normalised keys, best edges and plans, and two kernels for long inputs.

`tokenmerge.ops.matching` launches them; the reference in torch is `tokenmerge.matching.bipartite`. Results do not depend
on the order in which programs run. Parameters have no annotations, because Triton's compiler would evaluate them.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Each number of a normalised key is stored as two float16 numbers, the rounded value and its rounding error: 22 bits of
# precision, where float32 has 24. _SCALE keeps both out of float16's subnormal range; powers of two scale exactly.
_SCALE = tl.constexpr(256.0)
_UNSCALE = tl.constexpr(1.0 / 65536.0)


@triton.jit(do_not_specialize=["stride_b", "stride_h", "stride_n", "tokens", "heads", "tiles"])
def unit_keys_kernel(
    keys,
    unit,
    arrived,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    tokens,
    heads,
    tiles,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum keys over heads and normalise them, with each number split into two parts; K is read once.

    keys `[B, H, N, D]` -> unit `[B, 2, N, WIDTH]` float16, zero beyond D; also sets `arrived [B]` int32 to 0 for `match_kernel`.
    Strides of B, H and N are passed divided by STEP, which tells the compiler their divisors, so that it loads 16 bytes at
    once. Loads of HEADS heads are in flight together. Grid: (B · tiles of N).
    """
    image = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    mask = (row < tokens)[:, None] & (column < DIM)[None, :]
    keys += image * stride_b * STEP
    at = row.to(tl.int64)[:, None] * stride_n * STEP + column[None, :] * stride_d
    total = tl.zeros((ROWS, PADDED), tl.float32)
    for first in range(0, heads, HEADS):
        for offset in tl.static_range(HEADS):
            head = first + offset
            there = mask & (tl.full((PADDED,), head, tl.int32) < heads)[None, :]
            total += tl.load(keys + head * stride_h * STEP + at, mask=there, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(total * total, axis=1))
    value = total / tl.maximum(length, 1e-12)[:, None] * _SCALE
    rounded = value.to(tl.float16)
    unit += image * 2 * tokens * WIDTH
    to = row[:, None] * WIDTH + column[None, :]
    mask = (row < tokens)[:, None] & (column < WIDTH)[None, :]
    tl.store(unit + to, rounded, mask=mask)
    tl.store(unit + tokens * WIDTH + to, (value - rounded.to(tl.float32)).to(tl.float16), mask=mask)
    if tl.program_id(0) % tiles == 0:
        tl.store(arrived + image, 0)


@triton.jit
def _sides(tokens, protected):
    """Return the first positions of A and B, and their numbers of tokens."""
    first_a = protected + protected % 2
    first_b = protected + 1 - protected % 2
    return first_a, first_b, (tokens - first_a + 1) // 2, (tokens - first_b + 1) // 2


@triton.jit
def _part(unit, tokens, position, valid, k, WIDTH: tl.constexpr, K: tl.constexpr):
    """Load both parts of K channels, from channel k on, `[rows, K]` float16 each."""
    at = position[:, None] * WIDTH + (k + tl.arange(0, K))[None, :]
    rounded = tl.load(unit + at, mask=valid[:, None], other=0.0)
    return rounded, tl.load(unit + tokens * WIDTH + at, mask=valid[:, None], other=0.0)


@triton.jit
def _add_product(scores, unit, tokens, a, in_a, b, in_b, k, WIDTH: tl.constexpr, K: tl.constexpr):
    """Add the product over K channels to scores; the product of both rounding errors is below float32's precision."""
    a_rounded, a_rest = _part(unit, tokens, a, in_a, k, WIDTH, K)
    b_rounded, b_rest = _part(unit, tokens, b, in_b, k, WIDTH, K)
    b_rounded = tl.trans(b_rounded)
    scores = tl.dot(a_rest, b_rounded, scores)
    scores = tl.dot(a_rounded, tl.trans(b_rest), scores)
    return tl.dot(a_rounded, b_rounded, scores)


@triton.jit
def _best_edges(
    unit,
    best,
    partner,
    row,
    tokens,
    first_a,
    first_b,
    count_a,
    count_b,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    UNROLLED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the highest similarity of each of ROWS A tokens, and the lowest B token that has it."""
    a, in_a = first_a + 2 * row, row < count_a
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    where = tl.zeros((ROWS,), tl.int32)
    for start in range(0, count_b, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        b, in_b = first_b + 2 * column, column < count_b
        scores = tl.zeros((ROWS, COLUMNS), tl.float32)
        if UNROLLED:  # the compiler then loads the keys of A once, before the loop
            for k in tl.static_range(0, WIDTH, K):
                scores = _add_product(scores, unit, tokens, a, in_a, b, in_b, k, WIDTH, K)
        else:
            for k in range(0, WIDTH, K):
                scores = _add_product(scores, unit, tokens, a, in_a, b, in_b, k, WIDTH, K)
        scores = tl.where(in_b[None, :], scores, float("-inf"))
        top = tl.max(scores, axis=1)
        # NaN compares unequal: count_b − 1 then keeps later writes in bounds
        found = tl.min(tl.where(scores == top[:, None], column[None, :], count_b - 1), axis=1)
        where = tl.where(top > highest, found, where)  # ties go to the lower B position
        highest = tl.maximum(top, highest)
    tl.store(best + row, highest * _UNSCALE, mask=in_a)
    tl.store(partner + row, where, mask=in_a)


@triton.jit
def _ranks(best, a, score, count_a, TILE: tl.constexpr, RIVALS: tl.constexpr):
    """Count the edges before each of these in rank (higher ones, and equal ones of lower A positions) without a sort."""
    before = tl.zeros((TILE, RIVALS), tl.int32)
    for start in range(0, count_a, RIVALS):
        other = start + tl.arange(0, RIVALS)
        rival = tl.load(best + other, mask=other < count_a, other=float("-inf"), cache_modifier=".cg")
        wins = (rival[None, :] > score[:, None]) | ((rival[None, :] == score[:, None]) & (other[None, :] < a[:, None]))
        before += (wins & (other < count_a)[None, :]).to(tl.int32)
    return tl.sum(before, axis=1)


@triton.jit
def _select(
    best,
    partner,
    rank,
    keep,
    source,
    target,
    r,
    protected,
    first_a,
    first_b,
    count_a,
    count_b,
    RANKED: tl.constexpr,
    TILE: tl.constexpr,
    RIVALS: tl.constexpr,
):
    """Write the plan of one image: its r best edges by rank, and the remaining tokens in the order of `bipartite_matching`."""
    rest = count_a - r
    left = 0  # unmerged A tokens in earlier tiles
    for start in range(0, count_a, TILE):
        a = start + tl.arange(0, TILE)
        inside = a < count_a
        if RANKED:
            position = tl.load(rank + a, mask=inside, other=0)
        else:
            # .cg: other programs wrote these values, and the L1 cache of this multiprocessor may be stale
            score = tl.load(best + a, mask=inside, other=float("-inf"), cache_modifier=".cg")
            position = _ranks(best, a, score, count_a, TILE, RIVALS)
        merged = (position < r) & inside
        stays = ((position >= r) & inside).to(tl.int32)
        to = tl.load(partner + a, mask=merged, other=0, cache_modifier=".cg")
        tl.store(source + position, (first_a + 2 * a).to(tl.int64), mask=merged)
        tl.store(target + position, (protected + rest + to).to(tl.int64), mask=merged)
        at = protected + left + tl.cumsum(stays, axis=0) - 1
        tl.store(keep + at, (first_a + 2 * a).to(tl.int64), mask=stays > 0)
        left += tl.sum(stays, axis=0)
    for start in range(0, count_b, TILE):
        b = start + tl.arange(0, TILE)
        tl.store(keep + protected + rest + b, (first_b + 2 * b).to(tl.int64), mask=b < count_b)
    for start in range(0, protected, TILE):
        first = start + tl.arange(0, TILE)
        tl.store(keep + first, first.to(tl.int64), mask=first < protected)


@triton.jit(do_not_specialize=["tokens", "tiles", "r", "protected"])
def match_kernel(
    unit,
    best,
    partner,
    arrived,
    keep,
    source,
    target,
    tokens,
    tiles,
    r,
    protected,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    UNROLLED: tl.constexpr,
    PLAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    RIVALS: tl.constexpr,
):
    """Find the best edge of each A token; with PLAN, the last program of each image also writes its plan.

    unit `[B, 2, N, WIDTH]` float16 -> best float32 and partner int32 `[B, |A|]`; keep `[B, N']`, source and target
    `[B, r]` int64. Only one tile of scores exists at a time. Grid: (B · tiles of A).
    """
    image = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    first_a, first_b, count_a, count_b = _sides(tokens, protected)
    unit += image * 2 * tokens * WIDTH
    best += image * count_a
    partner += image * count_a
    _best_edges(unit, best, partner, row, tokens, first_a, first_b, count_a, count_b, WIDTH, K, UNROLLED, ROWS, COLUMNS)
    if PLAN:
        # all threads write their edges before the release on `arrived`; the last program acquires and sees every edge
        tl.debug_barrier()
        if tl.atomic_add(arrived + image, 1, sem="acq_rel", scope="gpu") == tiles - 1:
            tl.debug_barrier()
            keep += image * (tokens - r)
            source += image * r
            target += image * r
            _select(
                best,
                partner,
                best,
                keep,
                source,
                target,
                r,
                protected,
                first_a,
                first_b,
                count_a,
                count_b,
                False,
                TILE,
                RIVALS,
            )


@triton.jit(do_not_specialize=["count", "tiles"])
def rank_kernel(best, rank, count, tiles, TILE: tl.constexpr, RIVALS: tl.constexpr):
    """Rank the edges: best `[B, |A|]` float32 -> rank `[B, |A|]` int32. Grid: (B · tiles of A)."""
    image = (tl.program_id(0) // tiles).to(tl.int64)
    a = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    best += image * count
    score = tl.load(best + a, mask=a < count, other=float("-inf"))
    tl.store(rank + image * count + a, _ranks(best, a, score, count, TILE, RIVALS), mask=a < count)


@triton.jit(do_not_specialize=["tokens", "r", "protected"])
def select_kernel(best, partner, rank, keep, source, target, tokens, r, protected, TILE: tl.constexpr):
    """Write the plans from the ranks of `rank_kernel`. Grid: (B)."""
    image = tl.program_id(0).to(tl.int64)
    first_a, first_b, count_a, count_b = _sides(tokens, protected)
    best += image * count_a
    partner += image * count_a
    rank += image * count_a
    keep += image * (tokens - r)
    source += image * r
    target += image * r
    _select(best, partner, rank, keep, source, target, r, protected, first_a, first_b, count_a, count_b, True, TILE, 1)
