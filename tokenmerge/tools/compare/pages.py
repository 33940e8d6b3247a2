"""Files of a comparison: rows as CSV and JSON, figures as SVG, and an HTML page."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenmerge import files
from tokenmerge.tools.pages import Figure, Table, write_report
from tokenmerge.tools.pages.figures import Axis, lines
from tokenmerge.tools.report import Report, Row

COLUMNS = {
    "method": "method",
    "kind": "kind",
    "setting": "setting",
    "top1": "top-1",
    "top1_difference": "difference",
    "top1_low": "from",
    "top1_high": "to",
    "divergence": "KL",
    "gflops": "GFLOPs",
    "images_per_second": "images/s",
    "speedup": "speed-up",
    "overhead": "overhead",
    "note": "note",
}
"""Columns of the page of methods, with their headings."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a page shows of the rows.

    Attributes:
        title: title of the page.
        lead: paragraphs below it.
        columns: columns of the table with their headings; empty ones are left out.
        by: column that groups rows into lines of the figures.
        listed: rows of the table and the figures; `None` lists all.
        more: tables below it.
    """

    title: str
    lead: Sequence[str]
    columns: Mapping[str, str]
    by: str = "method"
    listed: Sequence[Row] | None = None
    more: Sequence[Table] = ()


def write_outputs(folder: Path, rows: Sequence[Row], layout: Layout, report: Report) -> None:
    """Write `compare.csv`, `compare.json`, `compare-speed.svg`, `compare-flops.svg` and `compare.html` into `folder`.

    Each file is written whole or not at all.

    Raises:
        InputError: if a file cannot be written.
    """
    write_sheets(folder, rows)
    listed = list(rows if layout.listed is None else layout.listed)
    shown = {
        name: head for name, head in layout.columns.items() if any(row.get(name) not in (None, "") for row in listed)
    }
    table = Table("Results", list(shown.values()), [[_cell(row.get(name)) for name in shown] for row in listed])
    write_report(
        folder / "compare.html",
        layout.title,
        layout.lead,
        [*([table] if listed else []), *layout.more],
        _figures(folder, listed, layout.by),
        rows,
    )
    report.say(f"wrote {folder / 'compare.html'}, and the rows as csv and json beside it")


def write_sheets(folder: Path, rows: Sequence[Row]) -> None:
    """Write rows into `compare.csv` and `compare.json`."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    sheet = io.StringIO(newline="")
    writer = csv.DictWriter(sheet, names)
    writer.writeheader()
    writer.writerows(rows)
    files.write(folder / "compare.csv", sheet.getvalue(), "the table")
    files.write_json(folder / "compare.json", rows, "the rows")


def _figures(folder: Path, rows: Sequence[Row], by: str) -> list[Figure | None]:
    """Write the figures into files of their own, and return them for the page."""
    # intervals are of differences, so they are drawn around each method's own top-1
    around = [
        {
            **row,
            **{
                f"top1_end_{end}": row["top1"] - row["top1_difference"] + row[f"top1_{end}"]
                for end in ("low", "high")
                if row.get(f"top1_{end}") is not None
            },
        }
        for row in rows
    ]
    accuracy = Axis("top1", "top-1, %", 0, 100, ("top1_end_low", "top1_end_high"), span=2)
    figures: list[Figure | None] = []
    for name, across, caption in (
        (
            "compare-speed.svg",
            Axis("speedup", "speed-up over the unmerged model", 0, mark=1),
            "Top-1 and speed, measured in turns",
        ),
        ("compare-flops.svg", Axis("gflops", "GFLOPs (multiply-adds) per image", 0), "Top-1 and cost"),
    ):
        drawn = lines(around, across, accuracy, by=by)
        if drawn is None:
            (folder / name).unlink(missing_ok=True)  # of an earlier run, whose rows it shows
        else:
            files.write(folder / name, drawn, "the figure")
            figures.append(Figure(f"{caption}; bars: 95 % interval of the difference to the first method.", drawn))
    return figures


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
