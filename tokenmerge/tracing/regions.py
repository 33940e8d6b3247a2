"""Region maps: the token that each pixel belongs to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenmerge.errors import InputError


def region_map(source: Tensor, grid: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return the token of every pixel.

    Along an axis with g patches and S pixels, pixel p lies in patch `⌊p·g/S⌋`. That is exact where patches tile the input,
    and about the nearest patch where they overlap (spectrograms of AST).

    Args:
        source: `[patches]` integers: the token that each patch has become, without protected tokens; −1 for dropped ones.
        grid: patches along each axis: `(h, w)`, or `(t, h, w)` for video.
        shape: pixels along each axis: `(H, W)` or `(T, H, W)`.

    Returns:
        int64 tensor of shape `shape`, on the CPU.

    Raises:
        InputError: if the grid has another number of patches than `source`, or `shape` another number of axes.

    Example:
        >>> import torch
        >>> from tokenmerge.tracing.regions import region_map
        >>> region_map(torch.tensor([0, 0, 1, 2]), grid=(2, 2), shape=(2, 4))
        tensor([[0, 0, 0, 0],
                [1, 1, 2, 2]])
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
    """Return which pixels of a region map `[…, H, W]` have an upper or left neighbour of another token, as bool."""
    border = torch.zeros_like(region, dtype=torch.bool)
    border[..., 1:, :] |= region[..., 1:, :] != region[..., :-1, :]
    border[..., :, 1:] |= region[..., :, 1:] != region[..., :, :-1]
    return border


def anchors(source: Tensor) -> Tensor:
    """Return for each patch the first patch of its token: `[patches]` int64 from a source map; −1 for dropped patches."""
    source = source.to("cpu", torch.int64)
    first = torch.full((int(source.max()) + 2,), len(source), dtype=torch.int64)
    first.scatter_reduce_(0, source + 1, torch.arange(len(source)), "amin")
    return first[source + 1].masked_fill(source < 0, -1)
