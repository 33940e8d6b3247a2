"""Colours of tokens in pictures: mean colour, outlines, size, or a fixed colour per token."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.tracing.colours import distinct
from tokenmerge.tracing.regions import borders

View = Literal["picture", "outlines", "sizes", "tokens", "frames"]
VIEWS = ("picture", "outlines", "sizes", "tokens", "frames")
_LINE = 0.75
"""Share of black or white in a pixel of a border: black on light colours, white on dark ones."""
_WEIGHTS, _MIDDLE = (0.2126, 0.7152, 0.0722), 0.18
"""Weights of the primaries in luminance, and the luminance on which black and white have the same contrast (WCAG 2)."""
_DROPPED = 0.12  # brightness of dropped patches


def paint(pixels: Tensor, region: Tensor, view: View = "picture", span: tuple[float, float] | None = None) -> Tensor:
    """Paint the tokens of one picture or video.

    Args:
        pixels: `[C, H, W]`, or `[C, T, H, W]` for video, in [0, 1]; C is 1 or 3.
        region: `[H, W]` or `[T, H, W]` int64: the token of each pixel (`Trace.regions`); −1 for dropped patches.
        view: "picture", each token in the mean colour of its pixels over all frames; "outlines", the picture with the
            borders of tokens; "sizes", the size of tokens on a logarithmic scale, dark for single patches; "tokens", a
            colour of its own for each token, the same from block to block; "frames", how many frames of the video each token lies
            in, from dark for one moment to bright for all.
        span: for "sizes", the numbers of pixels of the darkest and of the brightest colour; `None` takes the smallest and
            the largest token of `region`.

    Returns:
        `[3, H, W]` or `[3, T, H, W]` float32 in [0, 1]; dropped patches are dark.

    Raises:
        InputError: if `region` and `pixels` have different shapes, the view is unknown, or "frames" is asked for a picture.
    """
    if pixels.shape[1:] != region.shape or pixels.shape[0] not in (1, 3):
        raise InputError(
            f"the picture is {tuple(pixels.shape)}, but [1 or 3, {', '.join(map(str, region.shape))}] was expected for this map"
        )
    if not isinstance(view, str) or view not in VIEWS:
        raise InputError(f"view={view!r}, but it must be one of {', '.join(VIEWS)}")
    pixels = pixels.to("cpu", torch.float32).expand(3, *region.shape)
    if view == "picture":
        painted = _mean_colours(pixels, region)
    elif view == "outlines":
        painted = torch.where(region < 0, pixels * 2 * _DROPPED, pixels)
    elif view == "sizes":
        painted = _sizes(region, span)
    elif view == "frames":
        painted = _frames(region)
    else:
        painted = _named(region)
    return torch.where(borders(region), lined(painted), painted)


def lined(colours: Tensor) -> Tensor:
    """Return colours `[3, …]` in [0, 1] as pixels of a border have them: towards black if they are light, towards white if dark."""
    weights = colours.new_tensor(_WEIGHTS).view(3, *(1,) * (colours.dim() - 1))
    dark = (colours.clamp_min(0) ** 2.2 * weights).sum(dim=0) < _MIDDLE
    return colours * (1 - _LINE) + _LINE * dark


def _mean_colours(pixels: Tensor, region: Tensor) -> Tensor:
    flat = region.reshape(-1) + 1
    count = torch.bincount(flat)
    total = torch.zeros(3, len(count), dtype=torch.float64).index_add_(1, flat, pixels.reshape(3, -1).double())
    colour = (total / count.clamp_min(1)).float()
    colour[:, 0] = _DROPPED
    return colour[:, flat].reshape(pixels.shape)


def _sizes(region: Tensor, span: tuple[float, float] | None) -> Tensor:
    flat = region.reshape(-1) + 1
    count = torch.bincount(flat)
    count[0] = 0
    per_token = count[count > 0]
    low, high = span or (float(per_token.min()), float(per_token.max()))
    level = (count.clamp_min(1).float() / low).log() / max(math.log(high / low), 1e-6)
    colour = table("cividis")[(level.clamp(0, 1) * 255).round().long()].T
    colour[:, 0] = _DROPPED
    return colour[:, flat].reshape(3, *region.shape)


def _frames(region: Tensor) -> Tensor:
    if region.dim() != 3:
        raise InputError("view='frames' shows how many frames a token lies in, but one picture was given: give a video")
    frames, flat = region.shape[0], region.flatten(1) + 1
    lies_in = torch.zeros(frames, int(flat.max()) + 1)
    lies_in.scatter_(1, flat, 1.0)
    count = lies_in.sum(dim=0)
    level = (count - 1) / max(1, frames - 1)
    colour = table("cividis")[(level.clamp(0, 1) * 255).round().long()].T.clone()
    colour[:, 0] = _DROPPED
    return colour[:, flat.flatten()].reshape(3, *region.shape)


def _named(region: Tensor) -> Tensor:
    flat = region.reshape(-1)
    colour = distinct(max(0, int(flat.max())) + 1)[flat.clamp_min(0)].T.clone()
    colour[:, flat < 0] = _DROPPED
    return colour.reshape(3, *region.shape)


def span_of(region: Tensor, patches: int) -> tuple[float, float]:
    """Return the `span` of `paint` for a region map: the pixels of one patch, and of the largest token."""
    return region.numel() / patches, float(torch.bincount(region.flatten() + 1)[1:].max())


@contextlib.contextmanager
def needing_matplotlib() -> Iterator[None]:
    """Convert an `ImportError` of the imports inside to an `InputError` that asks for matplotlib."""
    try:
        yield
    except ImportError:
        raise InputError(
            "matplotlib is not installed, but pictures need it: pip install 'tokenmerge[visualize]'"
        ) from None


@functools.cache
def table(name: str) -> Tensor:
    """Return one of matplotlib's colour maps as `[256, 3]` float32 in [0, 1].

    Raises:
        InputError: if matplotlib is not installed.
    """
    with needing_matplotlib():
        from matplotlib import colormaps
    return torch.tensor(colormaps[name](range(256)), dtype=torch.float32)[:, :3]
