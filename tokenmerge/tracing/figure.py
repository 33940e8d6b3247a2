"""Merged tokens as a matplotlib figure."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.tracing.paint import View, needing_matplotlib, paint, span_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FRAMES = 6
"""How many frames of a video a figure shows."""


def strip(blocks: int) -> list[int]:
    """Which blocks tell the story of a model: four of them up to the last, evenly, from 0."""
    step = -(-blocks // 4)
    return sorted({*range(step - 1, blocks, step), blocks - 1})


def new_figure(width: float, height: float) -> Figure:
    """A figure that belongs to no window; its size in inches. A notebook shows it, whatever backend it has.

    Raises:
        InputError: if matplotlib is not installed.
    """
    with needing_matplotlib():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure._repr_png_ = functools.partial(_png, figure)  # type: ignore[attr-defined]  # what IPython asks for
    return figure


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def as_pixels(picture: Any) -> Tensor:
    """What people have as a picture, as `[C, H, W]`, or of a video `[C, T, H, W]`, float32 in [0, 1].

    Raises:
        InputError: if it is no picture.
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
    """`Trace.plot`.

    Args:
        regions: pixels along each axis, and after which block -> which token each pixel belongs to.
        titles: how many tokens are left after each block, in words.
        patches: that the picture has.
        picture: what the model was given.
        block: after which block; several; "all".
        view: see `paint`.
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


def plot_spectrograms(parts: Sequence[tuple[str, Tensor]], seconds: float, bands: Sequence[float]) -> Figure:
    """Painted spectrograms, one above the other, with their axes.

    Args:
        parts: titles, and spectrograms `[3, bands, frames]` in [0, 1], the lowest band first.
        seconds: that they last.
        bands: the middle of each band in Hz.
    """
    figure = new_figure(10, 0.6 + 2.4 * len(parts))
    rows = figure.subplots(len(parts), sharex=True, squeeze=False)[:, 0]
    marks = [hertz for hertz in (125, 250, 500, 1000, 2000, 4000, 8000) if bands[0] <= hertz <= bands[-1]]
    places = [min(range(len(bands)), key=lambda i: abs(bands[i] - hertz)) for hertz in marks]
    for axes, (title, painted) in zip(rows, parts, strict=True):
        axes.imshow(
            painted.permute(1, 2, 0).numpy(),
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            extent=(0, seconds, -0.5, len(bands) - 0.5),
        )
        axes.set_yticks(places, [str(mark) for mark in marks])
        axes.set_ylabel("frequency, Hz (mel)", fontsize=8)
        axes.set_title(title, fontsize=9, loc="left", parse_math=False)  # a file may have any name
    rows[-1].set_xlabel("time, s")
    return figure
