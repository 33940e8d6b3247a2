"""Files of a comparison: rows as CSV and JSON, figures as SVG, and an HTML page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenmerge import files
from tokenmerge.tools.compare.options import CompareOptions
from tokenmerge.tools.compare.paper import Experiment
from tokenmerge.tools.pages import Figure, Table, title_of, write_report
from tokenmerge.tools.pages.figures import Axis, lines
from tokenmerge.tools.report import Report, Row

_COLUMNS = {
    "method": "method",
    "kind": "kind",
    "setting": "setting",
    "top1": "top-1",
    "top1_difference": "difference",
    "top1_low": "from",
    "top1_high": "to",
    "divergence": "KL",
    "gflops": "GFLOPs",
    "speedup": "speed-up",
    "overhead": "overhead",
    "published_top1": "published top-1",
    "note": "note",
}


def write_outputs(
    folder: Path, rows: Sequence[Row], args: CompareOptions, experiment: Experiment | None, report: Report
) -> None:
    """Write `compare.csv`, `compare.json`, `compare-speed.svg`, `compare-flops.svg` and `compare.html` into `folder`.

    Each file is written whole or not at all.

    Raises:
        InputError: if a file cannot be written.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    sheet = io.StringIO(newline="")
    writer = csv.DictWriter(sheet, names)
    writer.writeheader()
    writer.writerows(rows)
    files.write(folder / "compare.csv", sheet.getvalue(), "the table")
    files.write_json(folder / "compare.json", rows, "the rows")
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
        drawn = lines(around, across, accuracy, by="method")
        if drawn is not None:
            files.write(folder / name, drawn, "the figure")
            figures.append(Figure(f"{caption}; bars: 95 % interval of the difference to the first method.", drawn))
    shown = {name: head for name, head in _COLUMNS.items() if any(row.get(name) not in (None, "") for row in rows)}
    about = f" — {experiment.about}" if experiment is not None else ""
    first = rows[0]
    write_report(
        folder / "compare.html",
        f"{title_of(args.model)}: methods compared{about}",
        [
            f"{first['images']} images, batch {first['batch_size']} on {first['device']}, {first['dtype']}. Differences are relative "
            "to the first method of the same setting, with 95 % intervals of a bootstrap paired by image; a difference whose "
            "interval includes 0 may be due to chance. KL is the mean divergence of the predictions from the unmerged model. "
            "Overhead is the time divided by the time of the same model with as many tokens sliced off."
        ],
        [Table("Results", list(shown.values()), [[_cell(row.get(name)) for name in shown] for row in rows])],
        figures,
        rows,
    )
    report.say(f"wrote {folder / 'compare.html'}, and the rows as csv and json beside it")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
