"""Which pixel belongs to which token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenmerge.errors import InputError


def region_map(source: Tensor, grid: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The token of every pixel.

    Pixel p of S along an axis of g patches lies in patch `⌊p·g/S⌋`: exactly its own where patches tile the input, the
    nearest one where they overlap (spectrograms of AST).

    Args:
        source: `[N]` integers: the token that each patch has become, prefix tokens left out; −1 if it was dropped.
        grid: patches along each axis: `(h, w)`, or `(t, h, w)` for video.
        shape: pixels along each axis: `(H, W)` or `(T, H, W)`.

    Returns:
        int64, of that shape.

    Raises:
        InputError: if the grid does not hold N patches, or the picture has other axes.
    """
    sides = shape if isinstance(shape, list | tuple) else (None,)
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise InputError(f"shape={shape!r:.60}, but pixels along each axis were expected: give (height, width)")
    if source.dim() != 1 or len(source) != math.prod(grid) or len(grid) != len(shape):
        raise InputError(
            f"{tuple(source.shape)} patches were to be drawn on a grid of {tuple(grid)} in a picture of {tuple(shape)} pixels: "
            "give one number per patch, and as many axes to the picture as to the grid"
        )
    region = source.to("cpu", torch.int64).reshape(tuple(grid))
    for axis, (patches, pixels) in enumerate(zip(grid, shape, strict=True)):
        region = region.index_select(axis, torch.arange(pixels) * patches // pixels)
    return region


def borders(region: Tensor) -> Tensor:
    """`[…, H, W]` bool: pixels whose upper or left neighbour belongs to another token."""
    border = torch.zeros_like(region, dtype=torch.bool)
    border[..., 1:, :] |= region[..., 1:, :] != region[..., :-1, :]
    border[..., :, 1:] |= region[..., :, 1:] != region[..., :, :-1]
    return border


def anchors(source: Tensor) -> Tensor:
    """`[N]` int64: for each patch the first patch that became the same token, which names it; −1 if it was dropped."""
    source = source.to("cpu", torch.int64)
    first = torch.full((int(source.max()) + 2,), len(source), dtype=torch.int64)
    first.scatter_reduce_(0, source + 1, torch.arange(len(source)), "amin")
    return first[source + 1].masked_fill(source < 0, -1)
