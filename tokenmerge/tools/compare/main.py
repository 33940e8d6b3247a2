"""`tokenmerge compare`: choose settings, measure speed in turns, score on the same images, test the differences."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from tokenmerge.errors import ConfigError, InputError
from tokenmerge.files import make_folder
from tokenmerge.matching import get_entry
from tokenmerge.methods import get_method, method_names
from tokenmerge.ops.timing import keep_memory
from tokenmerge.patching.calibrate import calibrate
from tokenmerge.tools.compare.data import Images, load_scored
from tokenmerge.tools.compare.measuring import context_of, difference_of, make_rows, score_all
from tokenmerge.tools.compare.options import CompareOptions
from tokenmerge.tools.compare.pages import COLUMNS, Layout, write_outputs
from tokenmerge.tools.compare.paper.main import run_paper
from tokenmerge.tools.compare.variants import Variant, make_variant, r_for_speedup, time_variants
from tokenmerge.tools.pages import title_of
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.saved import apart_from_matching, saved_with, schedules_of
from tokenmerge.tools.settings import Setting, parse_setting

_CALIBRATION = 8
"""Number of batches that thresholds of adaptive methods are calibrated on."""


def run(options: CompareOptions, report: Report | None = None) -> list[Row]:
    """Compare methods, print the rows, write CSV, JSON, SVG and HTML files into `output`, and return the rows.

    Args:
        options: what to options.
        report: receiver of the results; `None` prints them.

    Raises:
        InputError: if model, data or output cannot be used.
        ConfigError: if a method cannot run on this model.
    """
    report = report or Report(options.json, writes=True)
    if options.experiment is not None:
        return run_paper(options, options.experiment, report)
    saved = saved_with(options)
    settings = options.schedules()
    if not (options.r or options.speedups):
        settings = [setting for setting in schedules_of(settings, saved) if not setting.is_baseline]
    folder = make_folder(options.output / "scores", "--output")
    keep_memory()
    model = load_scored(options, report)
    images = Images(model, options, options.limit)
    context = context_of(options, images)
    fields = apart_from_matching(saved, options.merging(), report.say)
    variants = _variants(model, images, options, settings, fields, report)
    timing = None
    if options.rounds:
        report.say(f"timing {len(variants)} variants in turns, batch {options.batch_size} …")
        timing = time_variants(model, variants, images.first(options.batch_size), options.rounds)
    scores, _ = score_all(model, variants, images, folder, context, report)
    rows = make_rows(model, variants, scores, timing, options)
    if images.skipped:
        report.warn(f"{len(images.skipped)} unreadable files were skipped, the first is {images.skipped[0]}")
    _print(report, rows, options.model, len(scores[0].top1))
    rows = report.finite(rows)
    write_outputs(options.output, rows, _layout(rows[0]), report)
    report.write(rows)
    return rows


def _layout(first: Row) -> Layout:
    """Return what the page shows."""
    about = (
        f"{first['images']} images, batch {first['batch_size']} on {first['device']}, {first['dtype']}. Differences are relative "
        "to the first method of the same setting, with 95 % intervals of a bootstrap paired by image; a difference whose "
        "interval includes 0 may be due to chance. KL is the mean divergence of the predictions from the unmerged model. "
        "Overhead is the time divided by the time of the same model with as many tokens sliced off."
    )
    return Layout(f"{title_of(first['model'])}: methods compared", [about], COLUMNS)


def _variants(
    model: Any,
    images: Images,
    options: CompareOptions,
    settings: Sequence[Setting],
    fields: dict[str, Any],
    report: Report,
) -> list[Variant]:
    """Return all variants; the first variant of every group is the baseline of the others."""
    names = list(options.methods) or [name for name in method_names() if not get_method(name).slow]
    names = ["tome", *(name for name in names if name != "tome")]
    found = []
    for setting in settings:
        for name in names:
            found.append(_variant(model, images, name, setting, fields))
    for target in options.speedups:
        batch = images.first(options.batch_size)
        for name in names:
            method = get_method(name)
            try:
                r, reached = r_for_speedup(model, batch, {**fields, **method.fields}, target, max(3, options.rounds))
            except ConfigError as error:
                report.warn(f"{name}: {error}")
                continue
            report.say(f"{name}: r={r} for {target:g}x (measured {reached:.2f}x)")
            variant = _variant(model, images, name, parse_setting(str(r)), fields)
            found.append(dataclasses.replace(variant, group=f"{target:g}x"))
    if not found:
        raise InputError("nothing is left to compare: give --r, or smaller --speedups")
    return found


def _variant(model: Any, images: Images, name: str, setting: Setting, fields: dict[str, Any]) -> Variant:
    """Return a method at a setting; methods with thresholds are calibrated on images, without their labels."""
    method = get_method(name)
    fields = {**fields, **method.fields}
    if "thresholds" in get_entry(str(fields.get("matcher", "bipartite"))).options:
        few = itertools.islice((batch for batch, _ in images), _CALIBRATION)
        config = calibrate(model, few, setting.config(**fields))
        fields = {**fields, "options": config.options}
    return make_variant(model, name, setting, fields, method)


def _print(report: Report, rows: Sequence[Row], model: str, images: int) -> None:
    def cells(row: Row) -> tuple[str, ...]:
        speed = f"{row['speedup']:.2f}x" if "speedup" in row else ""
        over = f"{row['overhead']:.2f}" if row.get("overhead") else ""
        return (
            row["method"],
            row["setting"].removeprefix("r="),
            f"{row['top1']:.2f}",
            difference_of(row),
            f"{row['divergence']:.3f}",
            speed,
            over,
        )

    report.table(
        f"{title_of(model)}, {images} images",
        ("method", "r", "top-1", "to tome [95 %]", "KL", "speed", "overhead"),
        (cells(row) for row in rows),
    )
