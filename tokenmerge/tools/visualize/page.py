"""The interactive page: one self-contained HTML file with all data about some images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenmerge import files
from tokenmerge.tools.media import IMAGES, Medium
from tokenmerge.tools.models import RANDOM_WEIGHTS
from tokenmerge.tools.pages import about_this, embedded, finite, render
from tokenmerge.tools.visualize.flat import Flat, flat
from tokenmerge.tools.visualize.load import Shown
from tokenmerge.tools.visualize.looks import Look
from tokenmerge.tracing.paint import table
from tokenmerge.tracing.regions import anchors
from tokenmerge.tracing.sheet import to_image

_GONE = 65535
"""Code of a dropped patch (−1 in plans), in unsigned 16-bit integers."""


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
    page = explorer_page(model, {"images": images, "live": False}, random=random)
    files.write(path, page, "--out")


def explorer_page(model: str, data: dict[str, Any], r: str = "", random: bool = False, medium: Medium = IMAGES) -> str:
    """Return the HTML of the page with the images of `data`, none if it is `live`, initial settings `r`, a warning if `random`,
    and a choice of files of `medium`.
    """
    heat = (table("cividis") * 255).round().to(torch.uint8)
    return render(
        "explorer.html.j2",
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
    file = io.BytesIO()
    to_image(pixels).save(file, "PNG")
    # sums and counts of pixels in each patch, from which the page computes the exact mean colour of tokens
    cells = _cells(grid, height, width)
    count = torch.bincount(cells, minlength=grid[0] * grid[1])
    levels = (pixels * 255).round().reshape(3, -1).double()
    total = torch.zeros(3, len(count), dtype=torch.float64).index_add_(1, cells, levels)
    found: dict[str, Any] = finite(
        {
            "name": shown.name,
            "width": width,
            "height": height,
            "grid": list(grid),
            "picture": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii"),
            "sums": _packed(total.T.float()),
            "attention": "attention of the class token" if looks[0].class_token else "attention, mean of all tokens",
            "unmerged": _about(looks[0], None),
            "looks": [
                {**_about(look, None if speeds is None else speeds[i]), "blocks": blocks_of(look.trace, picture)}
                for i, look in enumerate(looks[1:])
            ],
        }
    )
    return found


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
    """Return for each block the token of each cell (named by the cell of its first patch), the merges, and the attention."""
    protected, found = trace.protected, []
    before = torch.arange(trace.tokens)
    for number, plan in enumerate(trace.plans):
        after = trace.source(number)[0].cpu()
        names = anchors(after[protected:])
        block: dict[str, Any] = {
            "names": _packed(_in_cells(_named(names, picture), picture, _GONE).to(torch.int32), "<u2"),
            "tokens": int(trace.size(number).shape[1]) - protected,
        }
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


def _named(patches: Tensor, picture: Flat) -> Tensor:
    """Return the cells of patches; `_GONE` for patches that were dropped."""
    held = (patches >= 0) & (patches != _GONE)
    return picture.cell[patches.where(held, 0)].where(held, _GONE)


def _in_cells(values: Tensor, picture: Flat, empty: int) -> Tensor:
    """Return values of patches in the order of the cells."""
    return values[picture.patch.clamp_min(0)].where(picture.patch >= 0, empty)


def _events(trace: Any, number: int, before: Tensor, picture: Flat) -> dict[str, str]:
    """Return the merges of a block: sources and targets by their first cell, and similarities in units of 1/10,000."""
    plan, protected = trace.plans[number], trace.protected
    first = _first_patch(before, protected)
    source, target = plan.source[0].cpu(), plan.target[0].cpu()
    joined = plan.kept[0].cpu()[target.clamp_min(0)]
    similarity = trace.similarities[number][0].float().cpu()
    to = first[joined].where(target >= 0, _GONE)
    return {
        "from": _packed(_named(first[source], picture).to(torch.int32), "<u2"),
        "to": _packed(_named(to, picture).to(torch.int32), "<u2"),
        "similarity": _packed((similarity.nan_to_num(0) * 10000).round().to(torch.int16), "<i2"),
    }


def _first_patch(source: Tensor, protected: int) -> Tensor:
    """Return the first patch of each token."""
    first = torch.full((int(source.max()) + 1,), _GONE, dtype=torch.int64)
    patches = source[protected:]
    alive = patches >= 0
    return first.scatter_reduce_(0, patches[alive], torch.arange(len(patches))[alive], "amin")


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
