"""Contact sheets: pictures side by side in one image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor


def to_image(pixels: Tensor, scale: int = 1) -> Image.Image:
    """Convert pixels `[C, H, W]` in [0, 1], C = 1 or 3, to a Pillow image enlarged `scale` times without smoothing."""
    data = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    data = data.expand(3, -1, -1) if data.shape[0] == 1 else data
    picture = Image.fromarray(data.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def enlarged(pixels: Tensor, scale: int) -> Tensor:
    """Enlarge pixels `[C, …, H, W]` to `[C, …, H·scale, W·scale]` without smoothing."""
    return pixels.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    names: Sequence[str] = (),
    foot: str = "",
    gap: int = 10,
) -> Image.Image:
    """Arrange pictures in a grid on a white background; rows may differ in size.

    Args:
        rows: rows of pictures, each with one picture per title.
        titles: titles of the columns.
        names: titles of the rows, or none.
        foot: one line below the grid.
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


def below(sheet: Image.Image, picture: Image.Image) -> Image.Image:
    """Return a sheet with a picture below it, in the middle of a white background that holds both."""
    both = Image.new("RGB", (max(sheet.width, picture.width), sheet.height + picture.height), "white")
    both.paste(sheet, ((both.width - sheet.width) // 2, 0))
    both.paste(picture, ((both.width - picture.width) // 2, sheet.height))
    return both


def _fitted(draw: ImageDraw.ImageDraw, text: str, width: float, size: int) -> str:
    """Return a text cut to `width` pixels at a font size, with an ellipsis if it was cut."""
    text = " ".join(text.split())
    while text and draw.textlength(text, font_size=size) > width:
        text = text[:-2].rstrip("…") + "…" if len(text) > 2 else ""
    return text
