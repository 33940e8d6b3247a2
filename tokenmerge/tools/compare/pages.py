"""What a comparison leaves behind: csv, json, svg and an HTML page."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import tokenmerge
from tokenmerge.errors import InputError
from tokenmerge.tools.compare.paper import Experiment
from tokenmerge.tools.models import ModelArgs
from tokenmerge.tools.pages import write_report
from tokenmerge.tools.report import Report, Row

# Okabe and Ito's colours, which colour-blind people tell apart
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")


def figure(rows: Sequence[Row], across: str, label: str) -> str | None:
    """Top-1 against `across`, as SVG; one line per method, error bars of the paired difference. `None` without such values.

    Raises:
        InputError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "matplotlib is not installed, but figures need it: pip install 'tokenmerge[compare]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.get(across) is not None]
    methods = list(dict.fromkeys(row["method"] for row in shown))
    if len(shown) < 2:
        return None
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "tokenmerge"}):
        drawing, axes = pyplot.subplots(figsize=(8, 4.5), constrained_layout=True)
        for number, method in enumerate(methods):
            mine = sorted((row for row in shown if row["method"] == method), key=lambda row: row[across])
            error = [
                [abs(row["top1_difference"] - row[bound]) if bound in row else 0 for row in mine]
                for bound in ("top1_low", "top1_high")
            ]
            axes.errorbar(
                [row[across] for row in mine],
                [row["top1"] for row in mine],
                yerr=error,
                label=method,
                color=_COLOURS[number % len(_COLOURS)],
                marker=_MARKS[number % len(_MARKS)],
                linewidth=1,
                capsize=2,
                markersize=5,
            )
        axes.set_xlabel(label)
        axes.set_ylabel("top-1, % (bars: 95 % of the difference to the first method)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=2 if len(methods) > 8 else 1, loc="center left", bbox_to_anchor=(1, 0.5))
        text = io.StringIO()
        drawing.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(drawing)
    return text.getvalue()


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
    folder: Path, rows: Sequence[Row], args: ModelArgs, experiment: Experiment | None, report: Report
) -> None:
    """`compare.csv`, `compare.json`, `compare-speed.svg`, `compare-flops.svg` and `compare.html` in `folder`."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "compare.json").write_text(json.dumps(list(rows), indent=2) + "\n", encoding="utf-8")
    figures = []
    for name, across, label in (
        ("compare-speed.svg", "speedup", "speed-up over the unmerged model, measured in turns"),
        ("compare-flops.svg", "gflops", "GFLOPs (multiply-adds) per image"),
    ):
        drawn = figure(rows, across, label)
        if drawn is not None:
            (folder / name).write_text(drawn, encoding="utf-8")
            figures.append(drawn)
    shown = {name: head for name, head in _COLUMNS.items() if any(row.get(name) not in (None, "") for row in rows)}
    about = f" — {experiment.about}" if experiment is not None else ""
    first = rows[0]
    write_report(
        folder / "compare.html",
        f"{args.model}: methods compared{about}",
        f"{first['images']} images, batch {first['batch_size']} on {first['device']}, {first['dtype']}. Differences are to the "
        "first method of the same setting, image by image, with 95 % intervals of a paired bootstrap; a difference whose "
        "interval holds 0 may be chance. KL is the mean divergence of predictions from the unmerged model's. Overhead is "
        "time over that of the same model with as many tokens simply sliced off.",
        list(shown.values()),
        [[_cell(row.get(name)) for name in shown] for row in rows],
        figures,
        rows,
        {"tokenmerge": tokenmerge.__version__, "torch": torch.__version__, "Python": platform.python_version()},
    )
    report.say(f"wrote {folder / 'compare.html'}, and the rows as csv and json beside it")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
