"""Runs of an experiment of the paper: its models one after the other, with published figures only where they belong."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tokenmerge.errors import InputError, TokenMergeError
from tokenmerge.files import make_folder
from tokenmerge.ops.timing import keep_memory
from tokenmerge.patching import model_cost
from tokenmerge.patching.target import find_target
from tokenmerge.tools.compare.data import Images, load_scored
from tokenmerge.tools.compare.measuring import context_of, make_rows, score_all
from tokenmerge.tools.compare.paper import identity
from tokenmerge.tools.compare.paper.adapt import settings_of
from tokenmerge.tools.compare.paper.choice import Chosen, check_folder, chosen, has_data
from tokenmerge.tools.compare.paper.experiments import Experiment, Line
from tokenmerge.tools.compare.paper.overview import show_overview
from tokenmerge.tools.compare.paper.pictures import draw_pictures
from tokenmerge.tools.compare.paper.random_schedules import random_rows
from tokenmerge.tools.compare.paper.rows import (
    named,
    not_here,
    published_of,
    setting_of,
    unmeasured,
    with_published,
)
from tokenmerge.tools.compare.paper.tables import show_rows, write_rows
from tokenmerge.tools.compare.trained import trained_rows
from tokenmerge.tools.compare.variants import Variant, make_variant, time_variants
from tokenmerge.tools.pages import title_of
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.saved import apart_from_matching, saved_with


def run_paper(options: Any, experiment: Experiment, report: Report) -> list[Row]:
    """Run an experiment, print and write its rows, and return them; without data, print published figures.

    Args:
        options: options of `compare`.
        experiment: the experiment.
        report: receiver of the results.

    Raises:
        InputError: if not one model could be measured, or an output cannot be written.
        ConfigError: if no line of a model that MODEL names can run on it.
    """
    models = chosen(experiment, options)
    if not has_data(options):
        return show_overview(experiment, models, options, report)
    if options.dataset is None:
        check_folder(options)
    if experiment.draws_pictures:
        return draw_pictures(experiment, models[0], options, report)
    folder = make_folder(options.output / "scores", "--output")
    keep_memory()
    found = [_measured(experiment, one, options, folder, report) for one in models]
    if not any(one.rows for one in found):
        more = f", and {len(found) - 1} other models failed, too" if len(found) > 1 else ""
        raise InputError(f"nothing of --paper {experiment.name} could be measured: {found[0].reason}{more}")
    lead = _with_figures(experiment, found)
    rows = report.finite([row for one in found for row in one.rows])
    show_rows(report, experiment, rows, "" if models[0].own else title_of(options.model))
    for line in lead:
        report.say(line)
    write_rows(options.output, experiment, rows, lead, report)
    report.write(rows)
    return rows


@dataclasses.dataclass
class Found:
    """Result of one model.

    Attributes:
        chosen: the model.
        rows: its rows; empty if it was not measured.
        reason: why it was not measured.
        other: words for what distinguishes the run from the paper's; empty if nothing does.
        checked: whether the measured top-1 agrees with a published one.
        withheld: whether the measured top-1 differs too much from the published one.
        whole: whether the images are all images of the paper's data.
        said: lines about this model, for terminal and page.
    """

    chosen: Chosen
    rows: list[Row] = dataclasses.field(default_factory=list)
    reason: str = ""
    other: str = ""
    checked: bool = False
    withheld: bool = False
    whole: bool = False
    said: list[str] = dataclasses.field(default_factory=list)


def _measured(experiment: Experiment, one: Chosen, options: Any, folder: Path, report: Report) -> Found:
    """Load a model, measure its lines, and free it; the reason if it cannot be measured."""
    found = Found(one, reason=one.entry.model.missing(options.weights) if one.own else "")
    if not found.reason:
        try:
            _measure(experiment, found, options, folder, report)
        except TokenMergeError as error:
            if not one.own:
                raise
            found.reason = str(error)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _measure(experiment: Experiment, found: Found, options: Any, folder: Path, report: Report) -> None:
    """Fill in the rows of one model, and whether the run is the paper's."""
    one, entry, mine = found.chosen, found.chosen.entry, found.chosen.options
    if len(experiment.entries) > 1 and one.own:
        report.say(f"{entry.model.title} …")
    saved = saved_with(mine)
    model = load_scored(mine, report)
    images = Images(model, mine, options.limit)
    fields = {
        **(entry.model.fields if one.own else {}),
        **apart_from_matching(saved, options.merging(), report.say),
    }
    cost, layers = model_cost(model), len(find_target(model).blocks)
    lines, adapted = settings_of(entry, options.schedules(), cost, layers)
    if adapted:
        found.said.append(adapted)
    variants, failed = _variants(model, lines, fields, report)
    timing = None
    if options.rounds:
        report.say(f"timing {len(variants) + 1} variants in turns, batch {options.batch_size} …")
        timing = time_variants(model, variants, images.first(options.batch_size), options.rounds)
    context = context_of(mine, images)
    scores, reference = score_all(model, variants, images, folder, context, report)
    rows = make_rows(model, variants, scores, timing, mine)
    if options.random:
        more, said = random_rows(
            model, variants[0], rows[1], scores[1], options.random, images, reference, folder, context, mine, report
        )
        rows += more
        found.said.append(said)
    if images.skipped:
        report.warn(f"{len(images.skipped)} unreadable files were skipped, the first is {images.skipped[0]}")
    found.other, found.whole = _other(one, images, options, len(scores[0].top1))
    odd = "" if found.other else identity.disagreement(entry, rows)
    found.checked = odd == "" and not found.other
    if odd:
        report.warn(f"{odd}, so that these are other weights or images: published figures are withheld")
        found.said.append(f"{odd}, so that published figures are withheld")
        found.withheld = True
    found.rows = [named({**row, "measured": True}, entry, one.own, mine) for row in rows]
    found.rows += [named(row, entry, one.own, mine) for row in failed]
    trained = [line for line in entry.lines if line.trained]
    for row in trained_rows(trained, mine, images, report) if trained else []:
        words = not_here(row.pop("reason")) if not row["measured"] else {}
        found.rows.append(named({**row, **words}, entry, one.own, mine))


def _variants(
    model: Any, lines: Sequence[tuple[Line, Any, str]], fields: dict[str, Any], report: Report
) -> tuple[list[Variant], list[Row]]:
    """Return the variants, and rows for the lines that cannot run on this model; the first line must."""
    variants: list[Variant] = []
    failed: list[Row] = []
    for line, setting, group in lines:
        try:
            variant = make_variant(model, line.label, setting, {**fields, **line.fields})
        except TokenMergeError as error:
            if not variants:
                raise
            report.warn(str(error))
            failed.append(
                {
                    "method": line.label,
                    "kind": "matching",
                    "setting": setting.title,
                    "group": group,
                    **not_here(str(error)),
                }
            )
            continue
        variants.append(dataclasses.replace(variant, group=group))
    return variants, failed


def _other(one: Chosen, images: Images, options: Any, scored: int) -> tuple[str, bool]:
    """Return what makes a run another than the paper's in words, and whether its images are the paper's."""
    data = identity.other_data(images, options, scored)
    parts = [] if one.own else [title_of(options.model)]
    if one.own and one.entry.model.stands_in:
        parts.append(one.entry.model.title)
    if one.own and (odd := identity.other_training(one.entry.model, options.weights)):
        parts.append(odd)
    if identity.changed(options):
        parts.append(f"a run with {identity.changed(options)}")
    words = " and ".join(parts)
    place = data or f"{scored:,} images of {options.place}"
    return (f"{words} on {place}" if words else data), not data


def _with_figures(experiment: Experiment, found: Sequence[Found]) -> list[str]:
    """Add published figures to the rows that they belong to, and return the lines that name the figures that are not shown and why."""
    # one model whose top-1 agrees shows that the images are the paper's; one that disagrees leaves that open
    proven = any(one.whole and one.checked for one in found) and not any(one.withheld for one in found)
    others: dict[str, list[Found]] = {}
    for one in found:
        entry = one.chosen.entry
        if one.reason:
            one.rows = [named(row, entry, True, one.chosen.options) for row in unmeasured(entry, one.reason)]
            if proven and not entry.model.stands_in:
                one.rows = [with_published(row, published_of(entry, row)) for row in one.rows]
        elif one.other or one.withheld or not (one.checked or proven):
            if not (one.other or one.withheld):
                one.said.append(
                    f"no top-1 of {entry.model.title} is published to check these images with, so that its other published figures are "
                    "withheld"
                )
            one.rows = [row for row in one.rows if row["measured"] or row["kind"] != "trained"]
            if one.other:
                others.setdefault(one.other, []).append(one)
        else:
            one.rows = _beside(one)
    said = [line for one in found for line in one.said]
    for words, ones in others.items():
        models = [
            entry.model for one in ones for entry in ([one.chosen.entry] if one.chosen.own else experiment.entries)
        ]
        said.append(
            f"published figures belong to {identity.belonging(models)}, and these are {words}, so they are not shown"
            + (", nor are lines of rivals that are published alone" if experiment.trains else "")
        )
    return said


def _beside(one: Found) -> list[Row]:
    """Return the rows of a run that is the paper's, with published figures, and with the paper's lines that were not measured."""
    entry = one.chosen.entry
    paper = {line.label: setting_of(line) for line in entry.lines}
    rows = [
        with_published(row, published_of(entry, row))
        if row["method"] == "unmerged" or paper.get(row["method"]) in (row.get("setting"), "")
        else row
        for row in one.rows
    ]
    for line in entry.lines:
        here = any(row["method"] == line.label and "published_source" in row for row in rows)
        if here or line.trained or (line.published is None and line.runs):
            continue
        row = {"method": line.label, "kind": "" if line.runs else "other", "setting": setting_of(line), "group": ""}
        row |= not_here(line.elsewhere or "--r gives another schedule")
        rows.append(with_published(named(row, entry, True, one.chosen.options), line.published))
    return rows
