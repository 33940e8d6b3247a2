"""Options of `tokenmerge demo`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tokenmerge.tools.common import MergeOptions, PageOptions
from tokenmerge.tools.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoOptions(MergeOptions, PageOptions):
    """Options of `tokenmerge demo`.

    Attributes:
        r: schedules to show.
        output: picture to write.
        export: folder to write the model and its images to, to try the other commands with; `None` writes none.
    """

    r: Sequence[str | int] = option(("0", "8", "16", "24"), "tokens merged per block", "merging", metavar="R")
    output: Path = option(Path("tokenmerge-demo.png"), "picture to write", "output", metavar="FILE")
    export: Path | None = option(
        None, "also write the model (DIR/model) and its images (DIR/train, DIR/val)", "output", metavar="DIR"
    )
