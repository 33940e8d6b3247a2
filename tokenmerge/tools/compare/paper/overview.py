"""An experiment without data: published figures, what it needs, and the command that runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tokenmerge.files import make_folder
from tokenmerge.tools.compare.paper.choice import Chosen
from tokenmerge.tools.compare.paper.experiments import Experiment
from tokenmerge.tools.compare.paper.identity import belonging
from tokenmerge.tools.compare.paper.models import Model
from tokenmerge.tools.compare.paper.rows import not_here, published_in, setting_of, with_published
from tokenmerge.tools.compare.paper.tables import show_published, write_rows
from tokenmerge.tools.pages import Table
from tokenmerge.tools.report import Report, Row

_DATA = {"images": "imagenet/val", "videos": "kinetics/val", "sounds": "sounds/val"}


def show_overview(experiment: Experiment, models: Sequence[Chosen], options: Any, report: Report) -> list[Row]:
    """Print and write published figures for an experiment, its models and files, and the command; return the rows.

    Args:
        experiment: the experiment.
        models: the models of the run.
        options: options of `compare`.
        report: receiver of the results.
    """
    make_folder(options.output, "--output")
    report.say(f"{experiment.name}: {experiment.about}", style="bold")
    own = [one.entry.model for one in models if one.own]
    rows = [row for one in models for row in _published(one)] if own else []
    lead: list[str] = []
    figures = [one for row in rows if (one := published_in(row))]
    if any(row["published_top1"] is not None for row in rows):
        show_published(report, rows, len(models) > 1)
    if figures:
        lead += [f"published: {words} ({source})" for words, source in figures if words]
        lead.append(
            f"published figures belong to {belonging(own)}; – stands for no figure checked, or not measured here"
        )
    elif own:
        lead.append("no figure of it was published")
    else:
        lead.append("published figures belong to the paper's models, and MODEL is another one, so they are not shown")
    command = _command(experiment, models, options)
    if experiment.finding:
        report.say(f"the paper: {experiment.finding}")
    for line in lead:
        report.say(line)
    for line in (line for model in own for line in _needs(model, options)):
        report.say(line, whole=True)
    for line in ("no data were given, so nothing was measured; to measure:", f"  {command}"):
        report.say(line, whole=True)
    needed = Table("Models", ("MODEL", "model", "weights", "origin"), [_needed(model, options) for model in own])
    said = [*lead, f"nothing was measured: {command} measures it"]
    write_rows(options.output, experiment, rows, said, report, [needed] if own else [])
    report.write(rows)
    return rows


def _published(one: Chosen) -> list[Row]:
    """Return the rows of all lines of a model, as not measured."""
    entry, reason = one.entry, not_here("no data were given")
    about = {"paper_model": entry.model.title, "model": one.options.model}
    first = {"method": "unmerged", "kind": "", "setting": "r=0", "group": ""}
    rows = (
        [] if entry.unmerged is None and entry.lines else [with_published({**about, **first, **reason}, entry.unmerged)]
    )
    for line in entry.lines:
        kind = "trained" if line.trained else "matching" if line.runs else "other"
        row = {**about, "method": line.label, "kind": kind, "setting": setting_of(line), "group": setting_of(line)}
        rows.append(with_published({**row, **reason}, line.published))
    return rows


def _needs(model: Model, options: Any) -> list[str]:
    """Return which weights a model needs, and where they go."""
    if model.stands_in:
        return [*_needs(dataclasses.replace(model, stands_in=""), options), f"  it stands in for {model.stands_in}"]
    if not model.file:
        return [f"{model.name}: {model.title}, downloaded as {model.model}"]
    place = options.weights / model.file
    there = "there" if not model.missing(options.weights) else "missing"
    made = "made by" if model.trained_here else "from"
    return [f"{model.name}: {model.title}, {place} ({there}), {made}", f"  {model.origin_in(options.weights)}"]


def _needed(model: Model, options: Any) -> tuple[str, ...]:
    """Return the cells of a model in the page's table."""
    title = model.title + (f" (stands in for {model.stands_in})" if model.stands_in else "")
    if not model.file:
        return model.name, title, model.model, "downloaded"
    there = "there" if not model.missing(options.weights) else "missing"
    return model.name, title, f"{options.weights / model.file} ({there})", model.origin_in(options.weights)


def _command(experiment: Experiment, models: Sequence[Chosen], options: Any) -> str:
    """Return the command that measures."""
    data = _DATA[models[0].entry.model.medium]
    words = ["tokenmerge compare", *([options.model] if options.model else []), f"--paper {experiment.name}"]
    if options.model and not models[0].own:
        words.append("--pretrained")
    return " ".join([*words, f"--data {data}"])
