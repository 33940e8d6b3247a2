"""Pictures side by side, as image files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor


def to_image(pixels: Tensor, scale: int = 1) -> Image.Image:
    """`[C, H, W]` in [0, 1], one or three channels, as a picture enlarged `scale` times without smoothing."""
    data = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    data = data.expand(3, -1, -1) if data.shape[0] == 1 else data
    picture = Image.fromarray(data.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def enlarged(pixels: Tensor, scale: int) -> Tensor:
    """`[C, …, H, W]` -> `[C, …, H·scale, W·scale]`, without smoothing."""
    return pixels.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    names: Sequence[str] = (),
    foot: str = "",
    gap: int = 10,
) -> Image.Image:
    """Pictures in a grid on white; the size of a row's pictures is its own.

    Args:
        rows: pictures, as many in each row as there are titles.
        titles: above the columns.
        names: above the rows, or none.
        foot: one line below all.
        gap: pixels between pictures.
    """
    width = max(picture.width for row in rows for picture in row)
    heights = [max(picture.height for picture in row) for row in rows]
    head, line = 26, 20 if names else 0
    size = (
        gap + len(titles) * (width + gap),
        head + sum(heights) + len(rows) * (gap + line) + (24 if foot else 0),
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        at = gap + column * (width + gap) + width / 2
        draw.text((at, head / 2), _fitted(draw, title, width, 14), fill="black", anchor="mm", font_size=14)
    top = head
    for number, row in enumerate(rows):
        if names:
            text = _fitted(draw, names[number], size[0] - 2 * gap, 13)
            draw.text((gap, top + line / 2), text, fill="#444", anchor="lm", font_size=13)
        for column, picture in enumerate(row):
            sheet.paste(picture, (gap + column * (width + gap), top + line))
        top += heights[number] + gap + line
    if foot:
        draw.text((gap, top + 6), _fitted(draw, foot, size[0] - 2 * gap, 12), fill="#444", anchor="lm", font_size=12)
    return sheet


def _fitted(draw: ImageDraw.ImageDraw, text: str, width: float, size: int) -> str:
    """The text, its end cut if it is too long."""
    text = " ".join(text.split())
    while text and draw.textlength(text, font_size=size) > width:
        text = text[:-2].rstrip("…") + "…" if len(text) > 2 else ""
    return text
