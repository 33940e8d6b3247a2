"""Matplotlib figures of merged tokens."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.tracing.moments import Moments
from tokenmerge.tracing.paint import View, needing_matplotlib, paint, span_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FRAMES = 6
"""Most frames of a video in a figure."""


def strip(blocks: int) -> list[int]:
    """Return the indices of four evenly spaced blocks, the last one included, of a model of `blocks` blocks."""
    step = -(-blocks // 4)
    return sorted({*range(step - 1, blocks, step), blocks - 1})


def new_figure(width: float, height: float) -> Figure:
    """Create a figure without a window that notebooks display with any backend.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        InputError: if matplotlib is not installed.
    """
    with needing_matplotlib():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure._repr_png_ = functools.partial(as_png, figure)  # type: ignore[attr-defined]  # the method that IPython calls
    return figure


def as_png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def as_pixels(picture: Any) -> Tensor:
    """Convert a picture to float32 pixels in [0, 1].

    Args:
        picture: a tensor `[C, H, W]` or (video) `[T, C, H, W]`, floating or uint8; an array `[H, W, C]` or `[H, W]`; or a Pillow
            image. C is 1 or 3.

    Returns:
        `[C, H, W]`, or `[C, T, H, W]` for video.

    Raises:
        InputError: if the picture has another shape.
    """
    if not isinstance(picture, Tensor):
        import numpy as np

        array = np.asarray(picture.convert("RGB") if hasattr(picture, "convert") else picture)
        if array.ndim == 2:
            array = array[:, :, None]
        if array.ndim != 3 or array.shape[2] not in (1, 3):
            raise InputError(
                f"the picture is {array.shape}, but [H, W, 1 or 3] was expected of an array: check its axes"
            )
        scale = 255 if array.dtype == np.uint8 else 1
        return torch.tensor(np.ascontiguousarray(array)).permute(2, 0, 1).float() / scale
    pixels = picture.detach().cpu()
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    if pixels.dim() == 4:
        pixels = pixels.transpose(0, 1)
    if pixels.dim() not in (3, 4) or pixels.shape[0] not in (1, 3):
        raise InputError(
            f"the picture is {tuple(picture.shape)}, but [1 or 3, H, W], or [T, 1 or 3, H, W] for video, was expected of a tensor"
        )
    return pixels.clamp(0, 1)


def plot_regions(
    regions: Callable[[Sequence[int], int | None], Tensor],
    titles: Sequence[str],
    patches: int,
    picture: Any,
    block: int | Sequence[int] | Literal["all"] | None,
    view: View,
) -> Figure:
    """Draw merged tokens after some blocks, side by side (see `Trace.plot`).

    Args:
        regions: function of pixels along each axis and a block (`None`: the last), which returns the token of each pixel.
        titles: the number of tokens after each block, as text.
        patches: number of patches in the picture.
        picture: the model's input as a picture, as for `as_pixels`.
        block: index of a block, or several, "all", or `None` for the last.
        view: see `paint`.

    Raises:
        InputError: if matplotlib is missing, or the picture or the block is invalid.
    """
    pixels = as_pixels(picture)
    whole = isinstance(block, str) and block == "all"
    if whole:
        blocks = strip(len(titles))
    elif block is None or (isinstance(block, int) and not isinstance(block, bool)):
        blocks = [len(titles) - 1 if block is None else block]
    elif isinstance(block, list | tuple | range) and block and all(type(number) is int for number in block):
        blocks = list(block)
    else:
        raise InputError(f'block={block!r:.60}, but a number, a list of some, None or "all" was expected')
    frames = 1 if pixels.dim() == 3 else min(_FRAMES, pixels.shape[1])
    columns = len(blocks) + whole
    figure = new_figure(2.3 * columns, 0.35 + 2.3 * frames * pixels.shape[-2] / pixels.shape[-1])
    axes = figure.subplots(frames, columns, squeeze=False)
    span = span_of(regions(pixels.shape[1:], None), patches)
    shown = [("input", pixels.expand(3, *pixels.shape[1:]))] if whole else []
    for number in blocks:
        painted = paint(pixels, regions(pixels.shape[1:], number), view, span)
        position = range(len(titles))[number]
        shown.append((f"after block {position}: {titles[position]}", painted))
    for column, (title, painted) in enumerate(shown):
        for row in range(frames):
            part = painted if painted.dim() == 3 else painted[:, row * painted.shape[1] // frames]
            _show(axes[row, column], part, title if row == 0 else "")
    return figure


def _show(axes: Axes, pixels: Tensor, title: str) -> None:
    axes.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def plot_moments(series: Sequence[tuple[str, Sequence[Moments]]]) -> Figure:
    """Draw the share of merges across moments, and the moments that a token spans, over the blocks of a model.

    Args:
        series: pairs of a title and the merges of each block (`Trace.over_time`).
    """
    figure = new_figure(8, 2.8)
    left, right = figure.subplots(1, 2)
    for number, (title, blocks) in enumerate(series):
        places, style = [one.block + 1 for one in blocks], {"ms": 3, "color": f"C{number}", "label": title}
        left.plot(places, [100 * one.across for one in blocks], "o-", **style)
        right.plot(places, [one.spanned for one in blocks], "o-", **style)
    left.set(ylabel="merges across moments, %", ylim=(-3, 103))
    right.set(ylabel="moments per token", ylim=(0.9, None))
    for axes in (left, right):
        axes.set_xlabel("block")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=8)
    return figure


def plot_spectrograms(parts: Sequence[tuple[str, Tensor]], rate: float, bands: Sequence[float]) -> Figure:
    """Draw painted spectrograms, one above the other, with axes.

    Args:
        parts: pairs of a title and a spectrogram `[3, bands, frames]` in [0, 1], lowest band first.
        rate: frames per second.
        bands: centre frequency of each band in Hz.
    """
    figure = new_figure(10, 0.6 + 2.4 * len(parts))
    rows = figure.subplots(len(parts), sharex=True, squeeze=False)[:, 0]
    longest = max(painted.shape[2] for _, painted in parts)
    marks = [hertz for hertz in (125, 250, 500, 1000, 2000, 4000, 8000) if bands[0] <= hertz <= bands[-1]]
    places = [min(range(len(bands)), key=lambda i: abs(bands[i] - hertz)) for hertz in marks]
    for axes, (title, painted) in zip(rows, parts, strict=True):
        axes.imshow(
            painted.permute(1, 2, 0).numpy(),
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            extent=(0, painted.shape[2] / rate, -0.5, len(bands) - 0.5),
        )
        axes.set_xlim(0, longest / rate)  # shared, because the scale of time is the same for all
        axes.set_yticks(places, [str(mark) for mark in marks])
        axes.set_ylabel("frequency, Hz (mel)", fontsize=8)
        axes.set_title(title, fontsize=9, loc="left", parse_math=False)  # titles are file names, which may contain $
    rows[-1].set_xlabel("time, s")
    return figure
