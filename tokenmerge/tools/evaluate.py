"""`tokenmerge eval`: measure top-1, top-5 and images per second for several r in one pass over the data.

Every image is decoded once and evaluated with all settings, so that all settings see the same pixels, and disturbances of
the machine affect all of them alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.ops.timing import synchronize
from tokenmerge.patching import Handle, model_cost, patch
from tokenmerge.tools.device import place
from tokenmerge.tools.folders import ClassFolder, batches
from tokenmerge.tools.inputs import class_names, classifier_input, logits_of, num_classes, preprocessing
from tokenmerge.tools.media import IMAGES, SOUNDS, VIDEOS, Medium, medium_of
from tokenmerge.tools.models import ModelArgs, load_model
from tokenmerge.tools.pages.figures import lines
from tokenmerge.tools.processes import Processes, launched
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.sounds import Spectrogram
from tokenmerge.tools.trained import as_trained
from tokenmerge.tools.tuning import NO_TUNING, TuneArgs, tune
from tokenmerge.tools.variants import share_weights
from tokenmerge.tools.videos import Clip


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalArgs:
    """Data and preprocessing of an evaluation.

    Attributes:
        data: folder with one subfolder of images, sounds or videos per class.
        batch_size: images per forward pass.
        workers: processes that decode files; 0 decodes in the main process.
        class_map: file with class names in the order of the model's outputs, in timm's format.
        preprocessing: overrides of the model's own preprocessing, by their names in timm's config
            (crop_pct, crop_mode, interpolation, mean, std).
        sampling_rate: stride between the sampled frames of a video.
        strict: whether unreadable files make the exit code 1.
        tuning: what to tune on the first batch.
    """

    data: Path
    batch_size: int = 64
    workers: int = 2
    class_map: str | None = None
    preprocessing: dict[str, Any] = dataclasses.field(default_factory=dict)
    sampling_rate: int = 4
    strict: bool = False
    tuning: TuneArgs = NO_TUNING


@dataclasses.dataclass
class Score:
    """Totals of one setting over the batches so far.

    Attributes:
        setting: the schedule.
        forward: the model at this setting.
        gflops: GFLOPs per image.
        handle: handle of the model; `None` without merging.
        top1: number of images whose most likely class is the label.
        top5: number of images whose five most likely classes contain the label.
        images: number of images evaluated.
        seconds: time of the forward passes.
    """

    setting: Setting
    forward: Callable[[Tensor], Tensor]
    gflops: float
    handle: Handle | None = None
    top1: int = 0
    top5: int = 0
    images: int = 0
    seconds: float = 0.0

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Evaluate one batch and add its results to the totals."""
        synchronize(images.device)
        start = time.perf_counter()
        logits = logits_of(self.forward(images))
        synchronize(images.device)
        self.seconds += time.perf_counter() - start
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
        self.top1 += int(best[:, 0].sum())
        self.top5 += int(best.sum())
        self.images += len(labels)

    def join(self, processes: Processes) -> None:
        """Add the totals of the other processes; the time is the longest one, because all run at the same time."""
        totals = processes.gather([(self.top1, self.top5, self.images, self.seconds)])
        self.top1, self.top5, self.images = (sum(one[i] for one in totals) for i in range(3))
        self.seconds = max(one[3] for one in totals)

    def row(self, model: str, skipped: int) -> Row:
        """Return the result row of this setting, with percentages and speed."""
        return {
            "model": model,
            "r": self.setting.label,
            "top1": 100 * self.top1 / self.images,
            "top5": 100 * self.top5 / self.images,
            "images_per_second": self.images / self.seconds,
            "gflops": self.gflops,
            "tuned": None if self.handle is None else self.handle.summary().tuned,
            "images": self.images,
            "skipped": skipped,
        }


def add_in_turns(running: Sequence[Score], images: Tensor, labels: Tensor, number: int) -> None:
    """Evaluate one batch with every setting, in an order that rotates from batch to batch.

    Before the first batch, every setting runs once without being measured, as a warm-up.
    """
    if number == 0:
        for score in running:
            score.forward(images)
    for step in range(len(running)):
        running[(number + step) % len(running)].add(images, labels)


def scores(model: Any, settings: Sequence[Setting], fields: dict[str, Any]) -> list[Score]:
    """Return one empty score per setting, on copies that share the model's weights; r=0 is the unpatched model."""
    result = []
    for setting in settings:
        if setting.is_baseline:
            result.append(Score(setting, model, model_cost(model).total() / 1e9))
        else:
            copy = share_weights(model)
            handle = patch(copy, setting.config(**fields))
            result.append(Score(setting, copy, handle.summary().flops_after / 1e9, handle))
    return result


def _tune(running: Sequence[Score], images: Tensor, wanted: TuneArgs, processes: Processes, report: Report) -> None:
    """Tune every setting that merges on the first batch; several processes must share one record, to do the same."""
    shared = wanted.file is not None and wanted.file.is_file()
    if wanted.asked and processes.count > 1 and not shared:
        raise InputError(
            f"{processes.count} processes were started, and each would tune for itself, but they must do the same: tune in one process "
            "with --tuning FILE, then give that file to all"
        )
    for score in running:
        if score.handle is not None and wanted.asked:
            say = report.say if processes.is_main else (lambda text: None)
            tune(score.forward, score.handle, images, wanted, score.setting.title, say)
            score.gflops = score.handle.summary().flops_after / 1e9


def make_dataset(model: Any, args: EvalArgs, medium: Medium) -> ClassFolder:
    """Return the data set with the preprocessing of the model.

    Raises:
        InputError: if the data or the preprocessing does not fit the model.
    """
    from timm.data.transforms_factory import create_transform

    shape = classifier_input(model, medium, "eval")
    names = class_names(model)
    if medium is not IMAGES:
        taken = () if medium is SOUNDS else ("crop_pct", "mean", "std")
        odd = next((name for name in args.preprocessing if name not in taken), None)
        if odd is not None:
            flag = odd.replace("_", "-")
            raise InputError(f"--{flag} is for images, but {str(args.data)!r} holds {medium.name}: leave it out")
        transform = Spectrogram(shape) if medium is SOUNDS else Clip(shape, args.sampling_rate, **args.preprocessing)
        return ClassFolder(args.data, transform, num_classes(model), names, args.class_map, medium)
    config = preprocessing(model, args.preprocessing)
    config["input_size"] = shape
    _, height, width = shape
    try:
        transform = create_transform(**config)
        transform(Image.new("RGB", (width, height)))
    except Exception as error:  # timm and torchvision raise many exception types for invalid values
        raise InputError(
            f"the preprocessing {args.preprocessing or config} does not work ({type(error).__name__}: {error}): "
            "check --crop-pct, --crop-mode, --interpolation, --mean and --std"
        ) from None
    return ClassFolder(args.data, transform, num_classes(model), names, args.class_map)


def run_eval(
    args: ModelArgs, evaluation: EvalArgs, settings: Sequence[Setting], fields: dict[str, Any], report: Report
) -> int:
    """Evaluate a model on a folder, and print and write one row per setting.

    Returns:
        0, or 1 if images were skipped under `strict`.

    Raises:
        InputError: if the data or the model cannot be read, or no image can be read.
    """
    evaluation.tuning.check(settings)
    processes = launched(args.device)
    try:
        return _run(args, evaluation, settings, as_trained(args, fields), report, processes)
    finally:
        processes.close()


def _run(
    args: ModelArgs,
    evaluation: EvalArgs,
    settings: Sequence[Setting],
    fields: dict[str, Any],
    report: Report,
    processes: Processes,
) -> int:
    medium = medium_of(evaluation.data)
    args = dataclasses.replace(args, device=processes.device, of_videos=medium is VIDEOS)
    model = load_model(args)
    if not args.pretrained and args.checkpoint is None and processes.is_main:
        report.warn(
            "the model has random weights, so its accuracy means nothing: give --pretrained or --checkpoint FILE"
        )
    dataset = make_dataset(model, evaluation, medium)
    running = scores(model, settings, fields)
    skipped: list[str] = []
    loader = batches(dataset, evaluation.batch_size, evaluation.workers, processes.rank, processes.count)
    with report.progress() if processes.is_main else contextlib.nullcontext() as progress, torch.inference_mode():
        task = progress.add_task("evaluating", total=len(dataset)) if progress else None
        for number, batch in enumerate(guarded(loader)):
            skipped += batch.skipped
            if len(batch.labels):
                images = place(batch.images, args.device, args.dtype, args.channels_last)
                if number == 0:
                    _tune(running, images, evaluation.tuning, processes, report)
                add_in_turns(running, images, batch.labels.to(args.device), number)
            if progress and task is not None:
                progress.advance(task, (len(batch.labels) + len(batch.skipped)) * processes.count)
    skipped = processes.gather(skipped)
    for score in running:
        score.join(processes)
    if len(skipped) == len(dataset):
        raise InputError(
            f"none of the {len(dataset)} {dataset.medium.name} in {str(evaluation.data)!r} could be read, the first is {skipped[0]}: check the files"
        )
    common = {
        "batch_size": evaluation.batch_size,
        "device": args.device,
        "dtype": args.dtype,
        "torch": torch.__version__,
    }
    rows = [{**score.row(args.model, len(skipped)), **common, "skipped_files": skipped} for score in running]
    if processes.is_main:
        _print(report, args, rows, skipped, dataset.medium.name)
        report.write(rows, lambda: _figures(rows))
    return 1 if skipped and evaluation.strict else 0


def _figures(rows: Sequence[Row]) -> list[str | None]:
    speed = lines(rows, "images_per_second", "top1", ("images per second", "top-1, %"), names="r")
    return [speed, lines(rows, "gflops", "top1", ("GFLOPs (multiply-adds) per image", "top-1, %"), names="r")]


def guarded(loader: Any) -> Any:
    """Yield the batches of a loader; the death of a worker process becomes an `InputError`."""
    iterator = iter(loader)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise InputError(
                f"a process that decodes files died ({str(error).splitlines()[0]}): try --workers 0"
            ) from None
        yield batch


def _print(report: Report, args: ModelArgs, rows: Sequence[Row], skipped: Sequence[str], medium: str) -> None:
    report.table(
        f"{args.model}, {rows[0]['images']} {medium}",
        ("r", "top-1", "top-5", "img/s", "GFLOPs"),
        (
            (
                str(row["r"]),
                f"{row['top1']:.2f}",
                f"{row['top5']:.2f}",
                f"{row['images_per_second']:.1f}",
                f"{row['gflops']:.4g}",
            )
            for row in rows
        ),
    )
    if skipped:
        report.warn(f"{len(skipped)} unreadable {medium} were skipped:")
        for problem in skipped[:20]:
            report.warn(f"  {problem}")
        if len(skipped) > 20:
            report.warn(f"  … and {len(skipped) - 20} more; --json FILE names all")
