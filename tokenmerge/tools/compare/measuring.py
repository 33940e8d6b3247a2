"""Measurement of the variants of one model: scores of every image, kept in files, and result rows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenmerge.patching import model_cost
from tokenmerge.patching.seen import TokensSeen
from tokenmerge.tools.compare.data import Images, describe
from tokenmerge.tools.compare.scoring import Scores, score
from tokenmerge.tools.compare.variants import Timing, Variant, fingerprint
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.statistics import bootstrap


def context_of(options: Any, images: Images) -> str:
    """Return a text of all inputs that stored scores depend on, except the config: model, weights and data."""
    about = {"model": describe(options), "data": images.fingerprint(), "batch_size": options.batch_size}
    return fingerprint({**about, "weights": stamps(options)})


def stamps(options: Any) -> list[Any]:
    """Return size and time of the files of weights on this machine, because other weights may come to lie under their names."""
    kind, _, place = options.model.partition(":")
    files = [] if options.checkpoint is None else [Path(options.checkpoint)]
    if not files and kind in ("local-dir", "hf") and place and os.path.isdir(place):
        files = sorted(path for path in Path(place).iterdir() if path.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    return [(file.name, found.st_size, found.st_mtime_ns) for file in files if (found := file.stat())]


def score_all(
    model: Any, variants: Sequence[Variant], images: Images, folder: Path, context: str, report: Report
) -> tuple[list[Scores], Tensor]:
    """Return the scores of the unmerged model and of every variant, and the log-probabilities `[n, classes]` of the former.

    Scores found in `folder` are reused.
    """
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
            whole = old is not None and len(old.top1) == len(baseline.top1)
            if old is not None and whole and (old.gflops is not None or not variant.adaptive):
                found.append(old)
                continue
            with TokensSeen(variant.model) if variant.adaptive else contextlib.nullcontext() as seen:
                new, _ = score(variant.model, watched(), reference, variant.adaptive)
            new.gflops = None if seen is None else seen.mean_flops / 1e9
            new.save(folder / f"{variant.key(context)}.json")
            found.append(new)
    return found, reference


def common_of(options: Any, scored: int) -> Row:
    """Return what all rows of one model share."""
    return {
        "model": options.model,
        "images": scored,
        "batch_size": options.batch_size,
        "device": options.device,
        "dtype": options.dtype,
        "torch": torch.__version__,
    }


def make_rows(
    model: Any, variants: Sequence[Variant], scores: Sequence[Scores], timing: Timing | None, options: Any
) -> list[Row]:
    """Return one row per variant, the unmerged model first; variants of one group are compared with its first."""
    common = common_of(options, len(scores[0].top1))
    base = {
        "method": "unmerged",
        "kind": "",
        "setting": "r=0",
        "group": "",
        "gflops": model_cost(model).total() / 1e9,
        "speedup": 1.0,
    }
    rows: list[Row] = [{**base, **accuracy(scores[0]), **common}]
    lead: dict[str, Scores] = {}
    for variant, mine in zip(variants, scores[1:], strict=True):
        first = lead.setdefault(variant.group, mine)
        row = {
            "method": variant.label,
            "kind": variant.kind,
            "setting": variant.setting,
            "group": variant.group,
            "gflops": variant.gflops if mine.gflops is None else mine.gflops,
            **accuracy(mine),
            "config": variant.config.to_json(),
            "note": variant.note,
            **common,
        }
        rows.append({**row, **differences(mine, first)})
    if timing is not None:
        for row, rate in zip(rows, timing.images_per_second, strict=True):
            row["images_per_second"] = rate
        for row, speed, overhead in zip(rows[1:], timing.speedups, timing.overheads, strict=True):
            row |= {
                "speedup": speed.p50,
                "speedup_p20": speed.p20,
                "speedup_p80": speed.p80,
                "overhead": overhead,
            }
    return rows


def accuracy(scores: Scores) -> Row:
    """Return the means of scores, in percent, and of the divergence in nats."""
    return {
        "top1": 100 * float(scores.top1.mean()),
        "top5": 100 * float(scores.top5.mean()),
        "divergence": float(scores.divergence.mean()),
    }


def differences(mine: Scores, first: Scores) -> Row:
    """Return the differences of top-1 in points and of the divergence to the first line, with 95 % intervals paired by image."""
    row: Row = {}
    for name, values in (
        ("top1", 100 * (mine.top1 - first.top1)),
        ("divergence", mine.divergence - first.divergence),
    ):
        interval = bootstrap(values)
        row |= {f"{name}_difference": interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return row


def difference_of(row: Row) -> str:
    """Return the difference of a row to the first of its group with its interval, for tables; empty for the first itself."""
    if row.get("top1_difference") is None or row["top1_low"] == row["top1_high"] == 0:
        return ""
    low, high = (f"{row[f'top1_{end}']:+.1f}" for end in ("low", "high"))
    return f"{row['top1_difference']:+.1f} [{low}, {high}]"


__all__ = ["accuracy", "common_of", "context_of", "difference_of", "differences", "make_rows", "score_all", "stamps"]
