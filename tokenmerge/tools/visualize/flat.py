"""Inputs of every medium as one flat picture with a grid of cells, which the interactive page draws.

An image is its own picture. The spectrogram of a sound has time across and frequency up, and ends
with the sound, although the model sees padding after it. A video becomes a sheet with one tile per
step in time, whose cells keep the numbers of their patches.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from tokenmerge.tools.media import SOUNDS, VIDEOS
from tokenmerge.tools.visualize.load import Shown
from tokenmerge.tracing.trace import Trace


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """A picture whose cells are the patches of a model.

    Attributes:
        pixels: `[3, h, w]` float32 in [0, 1].
        grid: rows and columns of cells; the picture is divided evenly among them.
        patch: `[rows·columns]` int64: the patch in each cell, in the order of the model's tokens; −1 for cells that hold none.
        cell: `[patches]` int64: the cell of each patch; −1 for patches of padding, which are not drawn.
        tiles: of a video, how many frames the sheet has, how many are beside each other, and seconds between them.
    """

    pixels: Tensor
    grid: tuple[int, int]
    patch: Tensor
    cell: Tensor
    tiles: tuple[int, int, float] | None = None


def flat(shown: Shown, trace: Trace) -> Flat:
    """Return an input as a flat picture.

    Args:
        shown: the input.
        trace: trace of a pass on it, which knows the model's grid of patches.
    """
    grid = tuple(trace.known_grid)
    if shown.medium is VIDEOS:
        return _sheet(shown.pixels, grid, shown.rate)
    if shown.medium is not SOUNDS:
        return _in_order(shown.pixels, (grid[0], grid[1]))
    pixels = shown.pixels.flip(1)  # the lowest band below
    if len(grid) == 1:  # Whisper's positions are moments of all bands
        return _heard(pixels, torch.arange(grid[0])[None], shown.heard)
    time_first = shown.batch.dim() == 4
    bands, moments = (grid[1], grid[0]) if time_first else (grid[0], grid[1])
    numbers = torch.arange(bands * moments)
    numbers = numbers.view(moments, bands).T if time_first else numbers.view(bands, moments)
    return _heard(pixels, numbers.flip(0), shown.heard)


def _heard(pixels: Tensor, cells: Tensor, heard: int) -> Flat:
    """Return a spectrogram without the cells that lie in its padding; the padding in the last cell is grey."""
    frames, moments = pixels.shape[2], cells.shape[1]
    kept = min(moments, max(1, -(-heard * moments // frames)))
    shown = pixels[:, :, : max(1, round(kept * frames / moments))].clone()
    shown[:, :, heard:] = 0.5
    return _of_cells(shown, cells[:, :kept], cells.numel())


def _in_order(pixels: Tensor, grid: tuple[int, int]) -> Flat:
    return _of_cells(pixels, torch.arange(grid[0] * grid[1]).view(grid), grid[0] * grid[1])


def _sheet(pixels: Tensor, grid: tuple[int, ...], rate: float) -> Flat:
    """Return a sheet of frames, one per step of the grid in time, in rows of about the shape of a screen."""
    steps, rows, columns = grid
    frames, height, width = pixels.shape[1:]
    across = math.ceil(math.sqrt(steps * 1.8 * height / width))
    down = -(-steps // across)
    sheet = torch.ones(3, down * height, across * width)
    cells = torch.full((down * rows, across * columns), -1)
    patches = torch.arange(steps * rows * columns).view(steps, rows, columns)
    for step in range(steps):
        top, left = divmod(step, across)
        frame = pixels[:, step * frames // steps]
        sheet[:, top * height : (top + 1) * height, left * width : (left + 1) * width] = frame
        cells[top * rows : (top + 1) * rows, left * columns : (left + 1) * columns] = patches[step]
    found = _of_cells(sheet, cells, patches.numel())
    return dataclasses.replace(found, tiles=(steps, across, frames / steps / rate))


def _of_cells(pixels: Tensor, cells: Tensor, patches: int) -> Flat:
    patch = cells.reshape(-1)
    held = patch >= 0
    cell = torch.full((patches,), -1)
    cell[patch[held]] = torch.arange(len(patch))[held]
    return Flat(pixels, (cells.shape[0], cells.shape[1]), patch, cell)
