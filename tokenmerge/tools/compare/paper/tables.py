"""Tables of an experiment on the terminal, and its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenmerge.tools.compare.measuring import difference_of
from tokenmerge.tools.compare.pages import Layout, write_outputs
from tokenmerge.tools.compare.paper.experiments import Experiment
from tokenmerge.tools.compare.paper.published import UNCHECKED
from tokenmerge.tools.compare.paper.random_schedules import RANDOM
from tokenmerge.tools.pages import Table
from tokenmerge.tools.report import Report, Row

_PAGE = {
    "paper_model": "model",
    "method": "line",
    "setting": "setting",
    "top1": "top-1",
    "difference": "difference [95 %]",
    "divergence": "KL",
    "gflops": "GFLOPs",
    "images_per_second": "images/s",
    "speedup": "speed-up",
    "overhead": "overhead",
    "training_speedup": "training speed-up",
    "rank_top1": "rank by top-1",
    "rank_divergence": "rank by KL",
    "published_top1": "published top-1",
    "published_gflops": "published GFLOPs",
    "published_ims": "published images/s (V100)",
    "published_note": "published otherwise",
    "published_source": "source",
    "note": "note",
}
_NO_FIGURE = "–"


def _several(rows: Sequence[Row]) -> bool:
    """Return whether the rows belong to several models."""
    return len({(row["model"], row["paper_model"]) for row in rows}) > 1


def _label(row: Row, several: bool) -> str:
    """Return the name of a row; of several models with the model, and the schedule in place of plain token merging's name."""
    if not several:
        return str(row["method"])
    line = {"unmerged": "", "tome": f", {row['setting']}"}.get(row["method"], f": {row['method']}")
    return f"{row['paper_model']}{line}"


def _number(value: Any, form: str = ".2f") -> str:
    return _NO_FIGURE if value is None else f"{value:{form}}"


def listed(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that tables list: of random schedules only the best by top-1."""
    drawn = [row for row in rows if row["method"] == RANDOM]
    best = max(drawn, key=lambda row: row["top1"], default=None)
    return [
        {**row, "method": f"{RANDOM}, the best"} if row is best else row
        for row in rows
        if row["method"] != RANDOM or row is best
    ]


def show_rows(report: Report, experiment: Experiment, rows: Sequence[Row], model: str) -> None:
    """Print the measured rows, their costs, and published figures beside them."""
    rows, several = listed(rows), _several(rows)
    measured = [row for row in rows if row["measured"]]
    names = {row["paper_model"] for row in rows} - {""}
    title = model or (names.pop() if len(names) == 1 else f"{len(names)} models")
    report.table(
        f"{experiment.name}: {title}, {measured[0]['images']:,} images",
        ("line", "r", "top-1", "to first [95 %]", "KL"),
        (
            (
                _label(row, several),
                _schedule(row["setting"]),
                f"{row['top1']:.2f}",
                difference_of(row),
                f"{row['divergence']:.3f}",
            )
            for row in measured
        ),
    )
    timed = any(row.get("images_per_second") for row in measured)
    learned = any(row.get("training_speedup") for row in measured)
    report.table(
        "cost" + (f", batch {measured[0]['batch_size']} on {measured[0]['device']}" if timed else ""),
        ("line", "GFLOPs", *(("img/s", "speed", "overhead") if timed else ()), *(("training",) if learned else ())),
        (
            (
                _label(row, several),
                f"{row['gflops']:.4g}",
                *(
                    (
                        _number(row.get("images_per_second"), ".4g"),
                        f"{row['speedup']:.2f}x" if row.get("speedup") else _NO_FIGURE,
                        _number(row.get("overhead")) if row.get("overhead") else "",
                    )
                    if timed
                    else ()
                ),
                *((f"{row['training_speedup']:.2f}x" if row.get("training_speedup") else "",) if learned else ()),
            )
            for row in measured
        ),
    )
    show_published(report, [row for row in rows if row.get("published_source")], several)
    _say_missing(report, rows, several)


def _schedule(setting: str) -> str:
    text = setting.removeprefix("r=")
    return text if len(text) <= 12 else "a list"


def _say_missing(report: Report, rows: Sequence[Row], several: bool) -> None:
    """Say why rows were not measured, each reason once."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if not row["measured"]:
            reasons.setdefault(row["note"], []).append(_label(row, several))
    for note, labels in reasons.items():
        report.say(f"{', '.join(labels)}: {note}")


def show_published(report: Report, rows: Sequence[Row], several: bool) -> None:
    """Print published figures beside the measured ones, and their sources."""
    if not rows:
        return
    sources = [one for one in dict.fromkeys(row["published_source"] for row in rows) if one != UNCHECKED]
    number = {source: f"[{place}]" for place, source in enumerate(sources, 1)}

    def cells(row: Row) -> tuple[str, ...]:
        published = [
            _number(row[f"published_{name}"], form)
            for name, form in (("top1", ".2f"), ("gflops", ".4g"), ("ims", ".4g"))
        ]
        here = [
            _number(row.get(name), form)
            for name, form in (("top1", ".2f"), ("gflops", ".4g"), ("images_per_second", ".4g"))
        ]
        beside = [one for pair in zip(published, here, strict=True) for one in pair]
        source = number.get(row["published_source"], _NO_FIGURE)
        return _label(row, several), *(beside if measured else [*published, "not measured"]), source

    measured = any(row["measured"] for row in rows)
    units = ("top-1", "GFLOPs", "im/s on\nV100")
    beside = [name for unit in units for name in (unit, "here")]
    report.table(
        "published, and measured here" if measured else "published",
        ("line", *(beside if measured else [*units, "here"]), "source"),
        (cells(row) for row in rows),
    )
    for source in sources:
        report.say(f"{number[source]} {source}")


def write_rows(
    folder: Path,
    experiment: Experiment,
    rows: Sequence[Row],
    lead: Sequence[str],
    report: Report,
    more: Sequence[Table] = (),
) -> None:
    """Write the page, CSV, JSON and figures of an experiment into a folder.

    Args:
        folder: folder of the files.
        experiment: the experiment.
        rows: its rows.
        lead: lines that were said about them.
        report: receiver of the name of the page.
        more: further tables of the page.
    """
    several = _several(rows)
    first = next((row for row in rows if row.get("images")), None)
    about = [f"the paper: {experiment.finding}" if experiment.finding else "", *lead]
    if first is not None:
        about = [
            f"{first['images']:,} images, batch {first['batch_size']} on {first['device']}, {first['dtype']}. Differences are relative to "
            "the first line of the same group, with 95 % intervals paired by image; a difference whose interval includes 0 may be due "
            "to chance. KL is the mean divergence of the predictions from the unmerged model",
            *about,
        ]
    timed = any(row.get("images_per_second") for row in rows)
    hidden = {*(() if several else ("paper_model",)), *(() if timed else ("speedup",))}
    layout = Layout(
        f"{experiment.name}: {experiment.about}",
        [f"{line[:1].upper()}{line[1:]}." for line in about if line],
        {name: head for name, head in _PAGE.items() if name not in hidden},
        "paper_model" if several else "method",
        [{**row, "difference": difference_of(row)} for row in listed(rows)],
        more,
    )
    write_outputs(folder, rows, layout, report)
