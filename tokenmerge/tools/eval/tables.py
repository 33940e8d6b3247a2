"""Tables and figures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenmerge.tools.eval.options import EvalOptions
from tokenmerge.tools.pages import Figure, title_of
from tokenmerge.tools.pages.figures import Axis, captioned, lines
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.settings import title_of_label

_MOST_NAMED = 20
"""Most unreadable files that are named on the terminal."""


def show(report: Report, options: EvalOptions, rows: Sequence[Row], metrics: Mapping[str, str], medium: str) -> None:
    """Print the rows, and their differences to the unmerged model.

    Args:
        report: receiver of the tables.
        options: what was evaluated.
        rows: the rows.
        metrics: keys of the measures in rows, in percent, each with its name.
        medium: kind of the files.
    """
    views = options.averaged
    averaged = f", {views} views each averaged, GFLOPs of one view" if views.count > 1 else ""
    first = rows[0]
    classes = f", mAP over {first['classes']} classes" if "classes" in first else ""
    per_second = {"images": "img/s", "videos": "videos/s", "sounds": "sounds/s"}[medium]
    report.table(
        f"{title_of(options.model)}, {first['images']} {medium}{averaged}{classes}",
        ("r", *(column for name in metrics.values() for column in (name, "95 %")), per_second, "GFLOPs"),
        (
            (
                str(row["r"]),
                *(
                    column
                    for key in metrics
                    for column in (f"{row[key]:.2f}", f"{row[f'{key}_low']:.1f}-{row[f'{key}_high']:.1f}")
                ),
                f"{row['images_per_second']:.1f}",
                f"{row['gflops']:.4g}",
            )
            for row in rows
        ),
    )
    compared = [row for row in rows if any(row[f"{key}_difference"] is not None for key in metrics)]
    if compared:
        ends = ("difference", "difference_low", "difference_high")
        report.table(
            f"change to r=0 on the same {medium} in points, 95 % intervals",
            ("r", *(column for name in metrics.values() for column in (name, "from", "to"))),
            ((str(row["r"]), *(f"{row[f'{key}_{end}']:+.2f}" for key in metrics for end in ends)) for row in compared),
        )


def say_skipped(report: Report, skipped: Sequence[str], medium: str) -> None:
    """Warn of files that were not evaluated."""
    if skipped:
        report.warn(f"{len(skipped)} {medium} could not be evaluated and were skipped:")
        for problem in skipped[:_MOST_NAMED]:
            report.warn(f"  {problem}")
        if len(skipped) > _MOST_NAMED:
            report.warn(f"  … and {len(skipped) - _MOST_NAMED} more; --json FILE names all")


def figures(rows: Sequence[Row], metrics: Mapping[str, str]) -> list[Figure | None]:
    """Return the figures of the first measure over speed, and of its change, or itself, over cost."""
    key, name = next(iter(metrics.items()))
    title = name[0].upper() + name[1:] if name.islower() else name
    labelled = [{**row, "name": title_of_label(row["r"])} for row in rows]
    accuracy = Axis(key, f"{name}, %", 0, 100, (f"{key}_low", f"{key}_high"), span=2)
    speed = Axis("images_per_second", "images per second", 0)
    cost = Axis("gflops", "GFLOPs (multiply-adds) per image", 0)
    bars = "95 % interval of each accuracy" if key == "top1" else f"95 % interval of each {name}"
    found = [captioned(f"{title} and speed; bars: {bars}.", lines(labelled, speed, accuracy, names="name"))]
    if any(row[f"{key}_difference"] is not None for row in rows):
        compared = [{**row, f"{key}_difference": row[f"{key}_difference"] or 0.0} for row in labelled]
        ends = (f"{key}_difference_low", f"{key}_difference_high")
        change = Axis(f"{key}_difference", f"change of {name}, points", ends=ends, mark=0, span=1)
        text = f"Change of {name} to r=0 on the same files, and cost; bars: 95 % interval of the change."
        return [*found, captioned(text, lines(compared, cost, change, names="name"))]
    return [*found, captioned(f"{title} and cost; bars: {bars}.", lines(labelled, cost, accuracy, names="name"))]
