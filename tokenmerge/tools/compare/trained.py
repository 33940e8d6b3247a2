"""Lines of the paper that need weights of their own, trained by their method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenmerge.tools.compare.paper.experiments import Entry, Line
from tokenmerge.tools.report import Report, Row

_REASON = "it is trained by its own method, and no such weights are measured by this command"


def trained_rows(entry: Entry, lines: Sequence[Line], options: Any, images: Any, report: Report) -> list[Row]:
    """Return one row for each line with weights of its own.

    Rows that were not measured have `measured` False and a `reason`; the caller adds published figures, and leaves them out if
    the run is not the paper's. Measured rows are shown in any run.

    Args:
        entry: the model and all of its lines.
        lines: the lines to return rows of.
        options: options of the run: weights, data and device.
        images: the images of the run; `None` if no model could be loaded.
        report: receiver of messages.
    """
    return [
        {"method": line.label, "kind": "trained", "setting": "", "group": "", "measured": False, "reason": _REASON}
        for line in lines
    ]
