"""The interactive page: one self-contained HTML file with all data about some images."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenmerge import files
from tokenmerge.tools.media import IMAGES, Medium
from tokenmerge.tools.models import RANDOM_WEIGHTS
from tokenmerge.tools.pages import about_this, embedded, finite, render, title_of
from tokenmerge.tools.visualize.flat import Flat, flat
from tokenmerge.tools.visualize.load import FRAMES_PER_SECOND, Shown
from tokenmerge.tools.visualize.looks import Look
from tokenmerge.tracing.colours import distinct
from tokenmerge.tracing.paint import table
from tokenmerge.tracing.sheet import to_image

_GONE, _HIDDEN = 65535, 65534
"""Codes in place of a cell, in unsigned 16-bit integers: of a dropped patch (−1 in plans), and of a token that lies in padding."""


def write_page(
    path: Path, model: str, shown: Sequence[Shown], looks: Sequence[Sequence[Look]], random: bool = False
) -> None:
    """Write the interactive page.

    Args:
        path: file to write.
        model: name of the model.
        shown: the images.
        looks: passes of each image: the unmerged model first, then the settings.
        random: whether the model has random weights, which the page then says.

    Raises:
        InputError: if Jinja2 is missing, or the file cannot be written.
    """
    images = [image_data(each, of_image) for each, of_image in zip(shown, looks, strict=True)]
    page = explorer_page(title_of(model), {"images": images, "live": False}, random=random)
    files.write(path, page, "--out")


def explorer_page(model: str, data: dict[str, Any], r: str = "", random: bool = False, medium: Medium = IMAGES) -> str:
    """Return the HTML of the page with the images of `data`, none if it is `live`, initial settings `r`, a warning if `random`,
    and a choice of files of `medium`.
    """
    heat = (table("cividis") * 255).round().to(torch.uint8)
    return render(
        "explorer/explorer.html.j2",
        model=model,
        live=data["live"],
        r=r,
        warning=RANDOM_WEIGHTS if random else "",
        accept="image/*" if medium is IMAGES else ",".join(medium.suffixes or ()),
        data=embedded({**data, "heat": _packed(heat)}),
        about=about_this() | ({"command": ""} if data["live"] else {}),  # visitors of a server must not see its paths
    )


def image_data(shown: Shown, looks: Sequence[Look], speeds: Sequence[float | None] | None = None) -> dict[str, Any]:
    """Return the data of one image for the page.

    Args:
        shown: the image.
        looks: passes of the unmerged model first, then of the settings.
        speeds: measured speed-ups of the settings over the unmerged model, if any.
    """
    picture = flat(shown, looks[0].trace)
    pixels, grid = picture.pixels, picture.grid
    height, width = pixels.shape[1:]
    # sums of pixels in each patch, from which the page computes the exact mean colour of tokens
    cells = _cells(grid, height, width)
    levels = (pixels * 255).round().reshape(3, -1).double()
    total = torch.zeros(3, grid[0] * grid[1], dtype=torch.float64).index_add_(1, cells, levels)
    found: dict[str, Any] = finite(
        {
            "name": shown.name,
            "medium": shown.medium.name,
            "width": width,
            "height": height,
            "grid": list(grid),
            "patches": len(picture.cell),
            "picture": _picture(pixels),
            "sums": _packed(total.T.float()),
            "palette": _packed((distinct(len(picture.patch)) * 255).round().to(torch.uint8)),
            **_in_time(shown, picture),
            "attention": "attention of the class token" if looks[0].class_token else "attention, mean of all tokens",
            "unmerged": _about(looks[0], None),
            "looks": [
                {**_about(look, None if speeds is None else speeds[i]), "blocks": blocks_of(look.trace, picture)}
                for i, look in enumerate(looks[1:])
            ],
        }
    )
    return found


def _picture(pixels: Tensor) -> str:
    file = io.BytesIO()
    to_image(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _in_time(shown: Shown, picture: Flat) -> dict[str, Any]:
    """Return what only videos and sounds have: the tiles of the sheet, or the sound itself and its scales."""
    if picture.tiles is not None:
        count, across, seconds = picture.tiles
        return {"tiles": {"count": count, "across": across, "seconds": seconds}}
    if shown.samples is None:
        return {}
    samples, rate = shown.samples
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes((samples.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return {
        "sound": "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode("ascii"),
        "seconds": picture.pixels.shape[2] / FRAMES_PER_SECOND,
        "padding": (shown.pixels.shape[2] - picture.pixels.shape[2]) / FRAMES_PER_SECOND,
        "bands": list(shown.bands),
    }


def _cells(grid: Sequence[int], height: int, width: int) -> Tensor:
    rows = torch.arange(height) * grid[0] // height
    columns = torch.arange(width) * grid[1] // width
    return (rows.unsqueeze(1) * grid[1] + columns).reshape(-1)


def _about(look: Look, speed: float | None) -> dict[str, Any]:
    return {
        "title": look.title,
        "gflops": look.gflops,
        "speed": speed,
        "top": [[name, share] for name, share in look.top],
    }


def blocks_of(trace: Any, picture: Flat) -> list[dict[str, Any]]:
    """Return for each block the token of each cell (named by its first cell), the merges, and the attention."""
    protected, found = trace.protected, []
    before = torch.arange(trace.tokens)
    for number, plan in enumerate(trace.plans):
        after = trace.source(number)[0].cpu()
        patches = after[protected:]
        names = _names(after, protected, picture)[patches.clamp_min(0)].where(patches >= 0, _GONE)
        block: dict[str, Any] = {
            "names": _packed(_in_cells(names, picture, _GONE).to(torch.int32), "<u2"),
            "tokens": int(trace.size(number).shape[1]) - protected,
        }
        if bool((picture.cell < 0).any()):  # members that are not drawn
            padding = torch.bincount(patches[(patches >= 0) & (picture.cell < 0)], minlength=int(after.max()) + 1)
            unseen = padding[patches.clamp_min(0)] * (patches >= 0)
            block["unseen"] = _packed(_in_cells(unseen, picture, 0).to(torch.int32), "<u2")
        if plan is not None and plan.r:
            block |= _events(trace, number, before, picture)
        attention = trace.attention[number] if number < len(trace.attention) else None
        if attention is not None:
            seen = (
                before if int(before.max()) + 1 == attention.shape[1] else after
            )  # place="before" merges before attention
            block["attention"] = _attention(attention[0].cpu(), seen, protected, picture)
        found.append(block)
        before = after
    return found


def _names(source: Tensor, protected: int, picture: Flat) -> Tensor:
    """Return the first cell of each token, by which the page calls it; `_HIDDEN` for tokens of which no cell is drawn."""
    first = torch.full((int(source.max()) + 1,), _HIDDEN)
    patches = source[protected:]
    drawn = (patches >= 0) & (picture.cell >= 0)
    return first.scatter_reduce_(0, patches[drawn], picture.cell[drawn], "amin")


def _in_cells(values: Tensor, picture: Flat, empty: int) -> Tensor:
    """Return values of patches in the order of the cells."""
    return values[picture.patch.clamp_min(0)].where(picture.patch >= 0, empty)


def _events(trace: Any, number: int, before: Tensor, picture: Flat) -> dict[str, str]:
    """Return the merges of a block: sources and targets by their first cell, and similarities."""
    plan = trace.plans[number]
    names = _names(before, trace.protected, picture)
    source, target = plan.source[0].cpu(), plan.target[0].cpu()
    joined = plan.kept[0].cpu()[target.clamp_min(0)]
    similarity = trace.similarities[number][0].float().cpu()
    to = names[joined].where(target >= 0, _GONE)
    return {
        "from": _packed(names[source].to(torch.int32), "<u2"),
        "to": _packed(to.to(torch.int32), "<u2"),
        "similarity": _packed(similarity),  # NaN for dropped tokens
    }


def _attention(attention: Tensor, before: Tensor, protected: int, picture: Flat) -> str:
    """Return the attention to each cell (its share of its token's) as bytes, where 255 is the maximum of the block."""
    patches = before[protected:]
    alive = patches >= 0
    share = attention / torch.bincount(before[before >= 0], minlength=len(attention)).clamp_min(1)
    level = _in_cells(share[patches.clamp_min(0)] * alive, picture, 0)
    return _packed((level / level.max().clamp_min(1e-12) * 255).round().to(torch.uint8))


def _packed(values: Tensor, kind: str | None = None) -> str:
    array = values.contiguous().numpy()
    return base64.b64encode((array if kind is None else array.astype(kind)).tobytes()).decode("ascii")
