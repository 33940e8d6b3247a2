"""Pictures of merged tokens: every token in the mean colour of its patches, borders between tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

_BORDER = 0.25  # how much of its colour a border pixel keeps


def merged_pixels(image: Tensor, source: Tensor, grid: tuple[int, int]) -> Tensor:
    """Paint each patch in the mean colour of the token it belongs to, and darken the borders.

    Args:
        image: `[C, H, W]` in [0, 1]; H and W are multiples of the grid.
        source: `[h·w]` integers: the token of each patch, row by row.
        grid: (h, w) patches.

    Returns:
        `[C, H, W]` in [0, 1].
    """
    (rows, columns), (channels, height, width) = grid, image.shape
    ph, pw = height // rows, width // columns
    patches = image.reshape(channels, rows, ph, columns, pw).mean(dim=(2, 4)).reshape(channels, -1)
    _, token = source.unique(return_inverse=True)
    count = torch.bincount(token).to(image.dtype)
    colour = torch.zeros(channels, len(count), dtype=image.dtype).index_add_(1, token, patches) / count
    region = token.reshape(grid).repeat_interleave(ph, 0).repeat_interleave(pw, 1)
    painted = colour[:, region.reshape(-1)].reshape(image.shape)
    border = torch.zeros_like(region, dtype=torch.bool)
    border[1:] |= region[1:] != region[:-1]
    border[:, 1:] |= region[:, 1:] != region[:, :-1]
    return torch.where(border, painted * _BORDER + 0.45 * (1 - _BORDER), painted)


def to_image(pixels: Tensor, scale: int = 1) -> Image.Image:
    """`[C, H, W]` in [0, 1], one or three channels, as a picture enlarged `scale` times without smoothing."""
    data = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    data = data.expand(3, -1, -1) if data.shape[0] == 1 else data
    picture = Image.fromarray(data.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def contact_sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], gap: int = 10) -> Image.Image:
    """Pictures of equal size in a grid on white, a title above each column."""
    width, height = rows[0][0].size
    head = 26
    sheet = Image.new("RGB", (gap + len(titles) * (width + gap), head + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((gap + column * (width + gap) + width / 2, head / 2), title, fill="black", anchor="mm", font_size=14)
        for row, pictures in enumerate(rows):
            sheet.paste(pictures[column], (gap + column * (width + gap), head + row * (height + gap)))
    return sheet
