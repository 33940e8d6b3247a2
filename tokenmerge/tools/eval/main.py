"""`tokenmerge eval`: measure top-1, top-5 and images per second for several r in one pass over the data.

Every image is decoded once and evaluated with all settings, so that all settings see the same pixels, and disturbances of
the machine affect all of them alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.tools.common import TuneOptions
from tokenmerge.tools.datasets import LabelledStream, medium_for
from tokenmerge.tools.device import place
from tokenmerge.tools.eval.data import guarded, loading, make_dataset, take_evenly
from tokenmerge.tools.eval.options import EvalOptions
from tokenmerge.tools.eval.scores import Score, add_in_turns, scores
from tokenmerge.tools.folders import batches
from tokenmerge.tools.models import load_model, warn_if_random
from tokenmerge.tools.pages import Figure, title_of
from tokenmerge.tools.pages.figures import Axis, captioned, lines
from tokenmerge.tools.processes import Processes, agree, launched
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.saved import merging_of
from tokenmerge.tools.settings import Setting, title_of_label
from tokenmerge.tools.tuning import check_tuning, is_asked, tune


def _tune(running: Sequence[Score], images: Tensor, wanted: TuneOptions, processes: Processes, report: Report) -> None:
    """Tune every setting that merges on the first batch; several processes must share one record, to do the same."""
    shared = wanted.tuning is not None and os.path.isfile(wanted.tuning)
    if is_asked(wanted) and processes.count > 1 and not shared:
        raise InputError(
            f"{processes.count} processes were started, and each would tune for itself, but they must do the same: tune in one process "
            "with --tuning FILE, then give that file to all"
        )
    for score in running:
        if score.handle is not None and is_asked(wanted):
            say = report.say if processes.is_main else (lambda text: None)
            tune(score.forward, score.handle, images, wanted, score.setting.title, say)
            score.gflops = score.handle.summary().flops_after / 1e9


def run(options: EvalOptions, report: Report | None = None) -> list[Row]:
    """Evaluate a model on labelled data, print and write one row per setting, and return the rows.

    Args:
        options: what to evaluate.
        report: receiver of the results; `None` prints them.

    Raises:
        InputError: if the data or the model cannot be read, no file can be read, or the outputs are not finite.
    """
    report = report or Report(options.json, options.html)
    processes = launched(options.device)
    try:
        settings, fields = merging_of(options, report.say if processes.is_main else len)
        check_tuning(options, settings)
        with loading():
            return _run(options, settings, fields, report, processes)
    finally:
        processes.close()


def _run(
    options: EvalOptions, settings: Sequence[Setting], fields: dict[str, Any], report: Report, processes: Processes
) -> list[Row]:
    medium = medium_for(options.data, options.dataset)
    options = dataclasses.replace(options, device=processes.device)
    model = load_model(options, head=medium.name)
    if processes.is_main:
        warn_if_random(options, report.warn)
    dataset = make_dataset(model, options, medium, options.preprocessing, options.sampling_rate)
    take_evenly(dataset, options.limit, options.place)
    running = scores(model, settings, fields)
    skipped: list[str] = []
    loader = batches(dataset, options.batch_size, options.workers, processes.rank, processes.count)
    with (
        report.progress() if processes.is_main else contextlib.nullcontext() as progress,
        torch.inference_mode(),
        agree(InputError),  # otherwise the other processes would wait for one that failed
    ):
        total = dataset.reader.size if isinstance(dataset, LabelledStream) else len(dataset)
        task = progress.add_task("evaluating", total=total) if progress else None
        done = 0  # batches of which anything could be read
        for batch in guarded(loader):
            skipped += batch.skipped
            if len(batch.labels):
                images = place(batch.images, options.device, options.dtype, options.channels_last)
                if done == 0:
                    _tune(running, images, options, processes, report)
                add_in_turns(running, images, batch.labels.to(options.device), done)
                done += 1
            if progress and task is not None:
                progress.advance(task, (len(batch.labels) + len(batch.skipped)) * processes.count)
    skipped = processes.gather(skipped)
    for score in running:
        score.join(processes)
    if not running[0].images:
        first = f"the first is {skipped[0]}" if skipped else "there are none"
        raise InputError(
            f"none of the {len(skipped)} {dataset.medium.name} in {options.place} could be read, {first}: check the files"
        )
    skipped = [*dataset.left_out, *skipped]
    common = {
        "batch_size": options.batch_size,
        "device": options.device,
        "dtype": options.dtype,
        "torch": torch.__version__,
    }
    rows = [{**score.row(options.model, len(skipped)), **common, "skipped_files": skipped} for score in running]
    if processes.is_main:
        _print(report, options, rows, skipped, dataset.medium.name)
        report.write(rows, lambda: _figures(rows))
    return rows


def _figures(rows: Sequence[Row]) -> list[Figure | None]:
    labelled = [{**row, "name": title_of_label(row["r"])} for row in rows]
    accuracy = Axis("top1", "top-1, %", 0, 100, ("top1_low", "top1_high"), span=2)
    speed = Axis("images_per_second", "images per second", 0)
    cost = Axis("gflops", "GFLOPs (multiply-adds) per image", 0)
    found = [
        captioned(
            "Top-1 and speed; bars: 95 % interval of each accuracy.", lines(labelled, speed, accuracy, names="name")
        )
    ]
    if any(row["top1_difference"] is not None for row in rows):
        compared = [{**row, "top1_difference": row["top1_difference"] or 0.0} for row in labelled]
        change = Axis(
            "top1_difference",
            "change of top-1, points",
            ends=("top1_difference_low", "top1_difference_high"),
            mark=0,
            span=1,
        )
        text = "Change of top-1 to r=0 on the same images, and cost; bars: 95 % interval of the change."
        return [*found, captioned(text, lines(compared, cost, change, names="name"))]
    return [
        *found,
        captioned(
            "Top-1 and cost; bars: 95 % interval of each accuracy.", lines(labelled, cost, accuracy, names="name")
        ),
    ]


def _print(report: Report, options: EvalOptions, rows: Sequence[Row], skipped: Sequence[str], medium: str) -> None:
    report.table(
        f"{title_of(options.model)}, {rows[0]['images']} {medium}",
        ("r", "top-1", "95 %", "top-5", "95 %", "img/s", "GFLOPs"),
        (
            (
                str(row["r"]),
                f"{row['top1']:.2f}",
                f"{row['top1_low']:.1f}-{row['top1_high']:.1f}",
                f"{row['top5']:.2f}",
                f"{row['top5_low']:.1f}-{row['top5_high']:.1f}",
                f"{row['images_per_second']:.1f}",
                f"{row['gflops']:.4g}",
            )
            for row in rows
        ),
    )
    compared = [row for row in rows if row["top1_difference"] is not None]
    if compared:
        ends = ("difference", "difference_low", "difference_high")
        report.table(
            "change to r=0 on the same images in points, 95 % intervals",
            ("r", "top-1", "from", "to", "top-5", "from", "to"),
            (
                (str(row["r"]), *(f"{row[f'{name}_{end}']:+.2f}" for name in ("top1", "top5") for end in ends))
                for row in compared
            ),
        )
    if skipped:
        report.warn(f"{len(skipped)} unreadable {medium} were skipped:")
        for problem in skipped[:20]:
            report.warn(f"  {problem}")
        if len(skipped) > 20:
            report.warn(f"  … and {len(skipped) - 20} more; --json FILE names all")
