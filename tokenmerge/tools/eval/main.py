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
from tokenmerge.tools.eval.precision import Precision, metrics_library
from tokenmerge.tools.eval.scores import Running, Score, add_in_turns, scores
from tokenmerge.tools.eval.tables import figures, say_skipped, show
from tokenmerge.tools.eval.views import ViewMean
from tokenmerge.tools.folders import batches
from tokenmerge.tools.inputs import has_several_labels
from tokenmerge.tools.labels import LabelledFiles
from tokenmerge.tools.models import load_model, warn_if_random
from tokenmerge.tools.processes import Processes, agree, launched
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.saved import merging_of
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.tuning import check_tuning, is_asked, tune


def _tune(
    running: Sequence[Running], images: Tensor, wanted: TuneOptions, processes: Processes, report: Report
) -> None:
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
    views = options.averaged
    dataset = make_dataset(model, options, medium, options.preprocessing, options.sampling_rate, views, options.labels)
    take_evenly(dataset, options.limit, options.place)
    several = isinstance(dataset, LabelledFiles)
    if several:
        metrics_library()  # raises now, and not after all files
    elif has_several_labels(model) and processes.is_main:
        report.warn(
            "the model was trained on several labels per file, but --labels was not given: top-1 counts one of them"
        )
    running: Sequence[Score | Precision] = scores(model, settings, fields, Precision if several else Score)
    skipped: list[str] = []
    per_batch = max(1, options.batch_size // views.count)
    loader = batches(dataset, per_batch, options.workers, processes.rank, processes.count)
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
                    some = images if views.count == 1 else images.flatten(0, 1)[: options.batch_size]
                    _tune(running, some, options, processes, report)
                    for score in running if views.count > 1 else ():
                        score.forward = ViewMean(score.forward, options.batch_size, several)
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
        **({"views": str(views)} if views.count > 1 else {}),
        "device": options.device,
        "dtype": options.dtype,
        "torch": torch.__version__,
    }
    rows = [{**score.row(options.model, len(skipped)), **common, "skipped_files": skipped} for score in running]
    if processes.is_main:
        show(report, options, rows, running[0].METRICS, dataset.medium.name)
        say_skipped(report, skipped, dataset.medium.name)
        report.write(rows, lambda: figures(rows, running[0].METRICS))
    return rows
