"""Options of `tokenmerge visualize`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tokenmerge.tools.common import DeviceOptions, MergeOptions, RowOptions, sampling_rate
from tokenmerge.tools.options import option
from tokenmerge.tracing import VIEWS, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualizeOptions(DeviceOptions, MergeOptions, RowOptions):
    """Options of `tokenmerge visualize`.

    Attributes:
        inputs: files to show.
        out: file to write; its suffix selects a picture, a film or a page.
        layer: "all", "last", or a number of blocks.
        view: one of `tokenmerge.tracing.VIEWS`.
        sampling_rate: stride between the sampled frames of a video.
    """

    inputs: Sequence[Path] = option(
        dataclasses.MISSING,
        "pictures to show, or videos or sounds for models that take them",
        "data",
        metavar="FILE …",
        positional=True,
    )
    layer: str = option(
        "all", "all (the input and four blocks up to the last), last, or after N blocks", "output", metavar="all|last|N"
    )
    view: View = option("picture", "how tokens are drawn", "output", choices=VIEWS)
    out: Path = option(
        Path("tokenmerge.png"),
        "picture, page (.html) or film (.mp4, .gif) to write",
        "output",
        "--out",
        "--output",
        "-o",
        metavar="FILE",
    )
    sampling_rate: int = sampling_rate()
