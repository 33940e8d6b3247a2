"""Triton kernels of merging: the size-weighted mean with sizes and their logarithms, and its gradient.

`tokenmerge.ops.merging` launches them; the reference in torch is `tokenmerge.ops.combine`. All arithmetic is float32.
Parameters have no annotations, because Triton's compiler would evaluate them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "kept", "r", "tiles", "log_width"])
def merge_kernel(
    x,
    size,
    keep,
    source,
    target,
    out,
    out_size,
    out_log,
    stride_b,
    stride_n,
    stride_c,
    tokens,
    kept,
    r,
    channels,
    tiles,
    log_width,
    SIZED: tl.constexpr,
    LOG: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    SOURCES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute the size-weighted means of the merged tokens, their sizes, and the logarithms of the sizes.

    x `[B, N, C]`, any strides; size `[B, N]` float32, contiguous (used only if SIZED) -> out `[B, N', C]` in the dtype of
    x; out_size `[B, N']` float32; out_log `[B, log_width]` in its own dtype (only if LOG), at least LEAST, and 0 beyond N'.
    Rows that no token joins are copied bit for bit. Grid: (B · tiles of N' · tiles of C).
    """
    columns = tl.cdiv(channels, CHANNELS)
    part = tl.program_id(0) % columns
    image = (tl.program_id(0) // columns // tiles).to(tl.int64)
    row = tl.program_id(0) // columns % tiles * ROWS + tl.arange(0, ROWS)
    column = part * CHANNELS + tl.arange(0, CHANNELS)
    inside = row < kept
    within = (column < channels)[None, :]
    x += image * stride_b
    across = column[None, :] * stride_c
    position = tl.load(keep + image * kept + row, mask=inside, other=0)
    own = tl.load(x + position[:, None] * stride_n + across, mask=inside[:, None] & within, other=0.0)
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
        most = tl.max(tl.sum(hit.to(tl.int32), axis=1), axis=0)  # 0 in most tiles, rarely more than 2
        last = tl.full((ROWS,), -1, tl.int32)
        for _ in range(0, most):  # each row's next source, in the order of the plan
            last = tl.min(tl.where(hit & (s[None, :] > last[:, None]), s[None, :], r), axis=1)
            found = last < r
            origin = tl.load(source + image * r + last, mask=found, other=0)
            if SIZED:
                weight = tl.load(size + image * tokens + origin, mask=found, other=0.0)
            else:
                weight = found.to(tl.float32)
            rows = tl.load(x + origin[:, None] * stride_n + across, mask=found[:, None] & within, other=0.0)
            difference = rows.to(tl.float32) - own.to(tl.float32)
            change += tl.where(found[:, None], weight[:, None] * difference, 0.0)
            joined += weight
    total += joined
    # x + Σ sᵢ(xᵢ − x)/S as in the reference; S is 0 if only padding merges
    mean = own.to(tl.float32) + change / tl.maximum(total, 1e-12)[:, None]
    mean = tl.where((joined > 0)[:, None], mean, own.to(tl.float32))  # bit for bit: −0 + 0 would be 0
    at = (image * kept + row)[:, None] * channels + column[None, :]
    tl.store(out + at, mean.to(out.dtype.element_ty), mask=inside[:, None] & within)
    if part == 0:
        tl.store(out_size + image * kept + row, total, mask=inside)
        if LOG:
            log = tl.where(inside, tl.maximum(tl.log(total), LEAST), 0.0).to(out_log.dtype.element_ty)
            tl.store(out_log + image * log_width + row, log, mask=row < log_width)


@triton.jit(do_not_specialize=["tokens", "kept", "r", "tiles"])
def merge_gradient_kernel(
    grad,
    size,
    new_size,
    keep,
    source,
    target,
    out,
    stride_b,
    stride_n,
    stride_c,
    tokens,
    kept,
    r,
    channels,
    tiles,
    SIZED: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Give each token its share of the gradient of the token it became: grad `[B, N', C]` -> out `[B, N, C]`.

    Rows 0 … N' − 1 of an image write the tokens in `keep`, the other rows those in `source`, so each token is written once.
    Grid: (B · tiles of N · tiles of C).
    """
    columns = tl.cdiv(channels, CHANNELS)
    part = tl.program_id(0) % columns
    image = (tl.program_id(0) // columns // tiles).to(tl.int64)
    row = tl.program_id(0) // columns % tiles * ROWS + tl.arange(0, ROWS)
    column = part * CHANNELS + tl.arange(0, CHANNELS)
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
