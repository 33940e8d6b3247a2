"""Rows of an experiment beside the measured ones: published figures, and lines that were not measured here."""

from __future__ import annotations

from typing import Any

from tokenmerge.tools.compare.paper.experiments import Entry, Line
from tokenmerge.tools.compare.paper.published import DEVICE, UNCHECKED, Published
from tokenmerge.tools.report import Row

NOT_HERE = "not measured here"


def setting_of(line: Line) -> str:
    """Return the title of a line's schedule as in the paper; empty for a line of another method's own schedule."""
    if line.r is not None:
        return f"r={line.r}" + ("" if line.inflect is None else f":{line.inflect:g}")
    return "" if line.speedup is None else f"speedup={line.speedup:g}"


def with_published(row: Row, published: Published | None) -> Row:
    """Return a row with the columns of published figures, empty ones if nothing was checked."""
    found = published or Published(UNCHECKED)
    return {
        **row,
        "published_top1": found.top1,
        "published_gflops": found.gflops,
        "published_ims": found.ims,
        "published_device": None if found.ims is None else DEVICE,
        "published_note": found.note,
        "published_source": found.source,
    }


def unmeasured(entry: Entry, reason: str) -> list[Row]:
    """Return the rows of the unmerged model and of every line that runs on it, as not measured.

    Args:
        entry: model and lines.
        reason: why they were not measured.
    """
    rows = [{"method": "unmerged", "kind": "", "setting": "r=0", "group": ""}]
    rows += [
        {"method": line.label, "kind": "matching", "setting": setting_of(line), "group": setting_of(line)}
        for line in entry.lines
        if line.runs
    ]
    return [{**row, **not_here(reason)} for row in rows]


def not_here(reason: str) -> Row:
    """Return the columns that say why a row was not measured."""
    return {"measured": False, "note": f"{NOT_HERE}: {reason}"}


def named(row: Row, entry: Entry, own: bool, options: Any) -> Row:
    """Return a row that begins with the model that it belongs to."""
    return {"paper_model": entry.model.title if own else "", **row, "model": row.get("model", options.model)}


def published_of(entry: Entry, row: Row) -> Published | None:
    """Return the published figures for a row of an entry, by its line."""
    if row["method"] == "unmerged":
        return entry.unmerged
    return next((line.published for line in entry.lines if line.label == row["method"]), None)


def published_in(row: Row) -> tuple[str, str] | None:
    """Return what a row states as published in other units, and its source; `None` if nothing was checked for it."""
    known = any(row[f"published_{name}"] for name in ("top1", "gflops", "ims", "note"))
    return (row["published_note"], row["published_source"]) if known else None
