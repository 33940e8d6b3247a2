"""`tokenmerge compare`: choose settings, measure speed in turns, score on the same images, test the differences."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tokenmerge.errors import ConfigError, InputError
from tokenmerge.files import make_folder
from tokenmerge.methods import get_method, method_names
from tokenmerge.ops.timing import keep_memory
from tokenmerge.patching import model_cost
from tokenmerge.patching.calibrate import calibrate
from tokenmerge.tools.compare.data import Images, describe, load_scored
from tokenmerge.tools.compare.options import CompareOptions
from tokenmerge.tools.compare.pages import write_outputs
from tokenmerge.tools.compare.paper import Experiment
from tokenmerge.tools.compare.scoring import Scores, score
from tokenmerge.tools.compare.variants import Variant, fingerprint, make_variant, r_for_speedup, time_variants
from tokenmerge.tools.pages import title_of
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.saved import apart_from_matching, saved_with, schedules_of
from tokenmerge.tools.settings import Setting, parse_setting
from tokenmerge.tools.statistics import bootstrap

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
    if not options.model and options.experiment is not None:
        options = dataclasses.replace(options, model=options.experiment.model, pretrained=True)
    saved = saved_with(options)
    settings = options.schedules()
    if not (options.r or options.speedups or options.experiment):
        settings = [setting for setting in schedules_of(settings, saved) if not setting.is_baseline]
    folder = make_folder(options.output / "scores", "--output")
    keep_memory()
    model = load_scored(options, report)
    images = Images(model, options, options.limit)
    context = fingerprint({"model": describe(options), "data": images.fingerprint(), "batch_size": options.batch_size})
    fields = apart_from_matching(saved, options.merging(), report.say)
    variants = _variants(model, images, options, settings, fields, report)
    timing = None
    if options.rounds:
        report.say(f"timing {len(variants)} variants in turns, batch {options.batch_size} …")
        timing = time_variants(model, variants, images.first(options.batch_size), options.rounds)
    scores = _score_all(model, variants, images, folder, context, report)
    rows = _rows(model, variants, scores, timing, options)
    if images.skipped:
        report.warn(f"{len(images.skipped)} unreadable files were skipped, the first is {images.skipped[0]}")
    _print(report, rows, options.model, len(scores[0].top1), options.experiment)
    rows = report.finite(rows)
    write_outputs(options.output, rows, options, options.experiment, report)
    report.write(rows)
    return rows


def _variants(
    model: Any,
    images: Images,
    options: CompareOptions,
    settings: Sequence[Setting],
    fields: dict[str, Any],
    report: Report,
) -> list[Variant]:
    """Return all variants; the first variant of every group is the baseline of the others."""
    if options.experiment is not None:
        return [
            make_variant(model, line.label, setting, {**fields, **line.fields})
            for setting in settings
            for line in options.experiment.lines
        ]
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
    """Return a method at a setting; adaptive methods are calibrated on images, without their labels."""
    method = get_method(name)
    fields = {**fields, **method.fields}
    if not method.static:
        few = itertools.islice((batch for batch, _ in images), _CALIBRATION)
        config = calibrate(model, few, setting.config(**fields))
        fields = {**fields, "options": config.options}
    return make_variant(model, name, setting, fields, method)


def _score_all(
    model: Any, variants: Sequence[Variant], images: Images, folder: Path, context: str, report: Report
) -> list[Scores]:
    """Return the scores of the unmerged model and of every variant; scores found in `folder` are reused."""
    known = [Scores.load(folder / f"{variant.key(context)}.json") for variant in variants]
    missing = sum(figure is None for figure in known)
    if missing < len(variants):
        report.say(f"{len(variants) - missing} of {len(variants)} variants were scored before, in {folder!s}")
    with report.progress() as progress:
        task = progress.add_task("scoring", total=(missing + 1) * len(images) or None)

        def watched() -> Any:
            for batch, labels in images:
                yield batch, labels
                progress.advance(task, len(labels))

        baseline, reference = score(model, watched(), None)
        found = [baseline]
        for variant, old in zip(variants, known, strict=True):
            if old is not None and len(old.top1) == len(baseline.top1):
                found.append(old)
                continue
            new, _ = score(variant.model, watched(), reference, variant.adaptive)
            new.save(folder / f"{variant.key(context)}.json")
            found.append(new)
    return found


def _rows(
    model: Any,
    variants: Sequence[Variant],
    scores: Sequence[Scores],
    timing: Any,
    options: CompareOptions,
) -> list[Row]:
    """Return one row per variant, the unmerged model first."""
    cost = model_cost(model)
    common = {
        "model": options.model,
        "images": len(scores[0].top1),
        "batch_size": options.batch_size,
        "device": options.device,
    }
    common |= {"dtype": options.dtype, "torch": torch.__version__}
    base = {
        "method": "unmerged",
        "kind": "",
        "setting": "r=0",
        "group": "",
        "gflops": cost.total() / 1e9,
        "speedup": 1.0,
    }
    rows: list[Row] = [{**base, **_accuracy(scores[0]), **common}]
    lead: dict[str, Scores] = {}
    for number, (variant, mine) in enumerate(zip(variants, scores[1:], strict=True)):
        first = lead.setdefault(variant.group, mine)
        row = {
            "method": variant.label,
            "kind": variant.kind,
            "setting": variant.setting,
            "group": variant.group,
            "gflops": variant.handle.summary().flops_after / 1e9,
            **_accuracy(mine),
            "config": variant.config.to_json(),
            "note": variant.note,
            **common,
        }
        for name, values in (
            ("top1", 100 * (mine.top1 - first.top1)),
            ("divergence", mine.divergence - first.divergence),
        ):
            interval = bootstrap(values)
            row |= {f"{name}_difference": interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        if timing is not None:
            speed, overhead = timing[0][number], timing[1][number]
            row |= {"speedup": speed.p50, "speedup_p20": speed.p20, "speedup_p80": speed.p80, "overhead": overhead}
        if options.experiment is not None:
            line = next(line for line in options.experiment.lines if line.label == variant.label)
            row["published_top1"] = line.published
        rows.append(row)
    return rows


def _accuracy(scores: Scores) -> Row:
    return {
        "top1": 100 * float(scores.top1.mean()),
        "top5": 100 * float(scores.top5.mean()),
        "divergence": float(scores.divergence.mean()),
    }


def _print(report: Report, rows: Sequence[Row], model: str, images: int, experiment: Experiment | None) -> None:
    def cells(row: Row) -> tuple[str, ...]:
        lead = row["method"] == "unmerged" or (row["top1_low"] == row["top1_high"] == 0)
        low, high = (f"{row[f'top1_{end}']:+.1f}" for end in ("low", "high")) if not lead else ("", "")
        difference = "" if lead else f"{row['top1_difference']:+.1f} [{low}, {high}]"
        speed = f"{row['speedup']:.2f}x" if "speedup" in row else ""
        over = f"{row['overhead']:.2f}" if row.get("overhead") else ""
        return (
            row["method"],
            row["setting"].removeprefix("r="),
            f"{row['top1']:.2f}",
            difference,
            f"{row['divergence']:.3f}",
            speed,
            over,
        )

    report.table(
        f"{title_of(model)}, {images} images",
        (
            "method",
            "r",
            "top-1",
            "to tome [95 %]" if experiment is None else "to first [95 %]",
            "KL",
            "speed",
            "overhead",
        ),
        (cells(row) for row in rows),
    )
