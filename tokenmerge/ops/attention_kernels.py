"""Triton kernel of proportional attention: `softmax(QKᵀ·scale + log size) V` without a mask in memory.

`tokenmerge.ops.attending` launches it; its reference is PyTorch's attention with a mask. The softmax is computed online,
one tile of keys after the other (arXiv 2205.14135), so scores and weights never leave the chip. Parameters have no
annotations, because Triton's compiler would evaluate them.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The softmax uses powers of two, for which GPUs have an instruction.
_LOG2_E = tl.constexpr(1.4426950408889634)
# Initial maximum, below all scores except those of padding; finite, so that a tile of padding alone gives no NaN.
_LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def _rows(x, at, inside, D: tl.constexpr, FACTOR: tl.constexpr, TAIL: tl.constexpr):
    """Load the rows that start at offsets `at` as `[rows, D]` in dtype FACTOR; if TAIL, rows not `inside` are 0."""
    to = x + at[:, None] + tl.arange(0, D)[None, :]
    if TAIL:
        return tl.load(to, mask=inside[:, None], other=0.0).to(FACTOR)
    return tl.load(to).to(FACTOR)


@triton.jit
def _add_keys(
    query,
    k,
    v,
    log,
    k_at,
    v_at,
    column,
    there,
    scale,
    highest,
    divisor,
    total,
    D: tl.constexpr,
    FACTOR: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Add one tile of keys to the running sums of the online softmax; only a TAIL tile may lack keys."""
    # loaded before the product, which hides their latency
    if TAIL:
        bias = tl.load(log + column, mask=there, other=float("-inf")).to(tl.float32)
    else:
        bias = tl.load(log + column).to(tl.float32)
    scores = tl.dot(query, tl.trans(_rows(k, k_at, there, D, FACTOR, TAIL)))
    scores = scores * scale + bias[None, :]
    top = tl.maximum(highest, tl.max(scores, axis=1))
    weights = tl.exp2(scores * _LOG2_E - (top * _LOG2_E)[:, None])
    less = tl.exp2((highest - top) * _LOG2_E)
    divisor = divisor * less + tl.sum(weights, axis=1)
    value = _rows(v, v_at, there, D, FACTOR, TAIL)
    total = tl.dot(weights.to(FACTOR), value, total * less[:, None])
    return top, divisor, total


@triton.jit(
    do_not_specialize=[
        "q_b",
        "q_h",
        "q_n",
        "k_b",
        "k_h",
        "k_n",
        "v_b",
        "v_h",
        "v_n",
        "log_b",
        "log_h",
        "queries",
        "keys",
        "tiles",
    ]
)
def attention_kernel(
    q,
    k,
    v,
    log,
    out,
    scale,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    log_b,
    log_h,
    heads,
    queries,
    keys,
    tiles,
    D: tl.constexpr,
    STEP: tl.constexpr,
    LOG_STEP: tl.constexpr,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute attention for one tile of queries of one head.

    q `[B, H, M, D]`, k and v `[B, H, N, D]`, log `[B, H, N]` -> out `[B, M, H, D]`, contiguous; D is a power of two. Strides
    are passed divided by STEP and LOG_STEP, which tells the compiler their divisors, so that it loads 16 bytes at once.
    FACTOR is the dtype of the operands of products. Grid: (B · H · tiles of M).
    """
    image = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    start = tl.program_id(0) % tiles * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    asks = start + row < queries
    q += (image * q_b + head * q_h + start.to(tl.int64) * q_n) * STEP
    k += (image * k_b + head * k_h) * STEP
    v += (image * v_b + head * v_h) * STEP
    log += (image * log_b + head * log_h) * LOG_STEP
    out += ((image * queries + start) * heads + head) * D
    k_at, v_at = column * (k_n * STEP), column * (v_n * STEP)
    # numbers from Inductor may be constants, which have no .to(), and floats arrive as float64
    further = tl.full((), COLUMNS * STEP, tl.int64)
    scale = tl.full((), scale, tl.float32)
    query = _rows(q, row * (q_n * STEP), asks, D, FACTOR, True)
    total = tl.zeros((ROWS, D), tl.float32)
    highest = tl.full((ROWS,), _LOWEST, tl.float32)
    divisor = tl.zeros((ROWS,), tl.float32)
    whole = keys // COLUMNS
    for _ in range(0, whole):
        highest, divisor, total = _add_keys(
            query, k, v, log, k_at, v_at, column, column < COLUMNS, scale, highest, divisor, total, D, FACTOR, False
        )
        k += further * k_n
        v += further * v_n
        log += COLUMNS
    if whole * COLUMNS < keys:
        there = column < keys - whole * COLUMNS
        highest, divisor, total = _add_keys(
            query, k, v, log, k_at, v_at, column, there, scale, highest, divisor, total, D, FACTOR, True
        )
    divisor = tl.maximum(divisor, 1e-30)  # 0 if all keys are padding, else at least 1
    to = out + row[:, None] * (heads * D) + tl.arange(0, D)[None, :]
    tl.store(to, (total / divisor[:, None]).to(out.dtype.element_ty), mask=asks[:, None])
