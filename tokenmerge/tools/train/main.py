"""`tokenmerge train`: build a run, start or resume it, and save its result."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Iterator
from typing import Any

import torch

import tokenmerge
from tokenmerge.errors import InputError, shown
from tokenmerge.files import read_json, refuse_link
from tokenmerge.tools.eval.precision import metrics_library
from tokenmerge.tools.folders import batches as evaluation_batches
from tokenmerge.tools.inputs import class_names, classifier_input, note_several_labels, num_classes
from tokenmerge.tools.media import IMAGES, VIDEOS
from tokenmerge.tools.models import load_model
from tokenmerge.tools.processes import agree
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.signals import handled
from tokenmerge.tools.train import merging
from tokenmerge.tools.train.checkpoints import Checkpoints
from tokenmerge.tools.train.data import (
    AnyImages,
    Augmented,
    EpochBatches,
    count_classes,
    fingerprint,
    medium_to_train,
    open_split,
    seed_all,
    weights_of,
)
from tokenmerge.tools.train.hint import evaluation
from tokenmerge.tools.train.lock import locked
from tokenmerge.tools.train.logbook import Logbook
from tokenmerge.tools.train.loop import Loop, Stopped
from tokenmerge.tools.train.objective import Objective, teacher_of
from tokenmerge.tools.train.optim import average_of, checkpoint_blocks, optimizer_of, schedule_of
from tokenmerge.tools.train.options import TrainingError, TrainOptions
from tokenmerge.tools.train.publish import how_to_load, publish
from tokenmerge.tools.train.sharding import check_can_shard, shard, whole_state
from tokenmerge.tools.train.state import RunState
from tokenmerge.tools.train.transforms import check_flags, make_transform, processor_for
from tokenmerge.tools.transforms import read_for

_FREE = {
    "data",
    "workers",
    "log_interval",
    "tensorboard",
    "resume",
    "output",
    "checkpoint_hist",
    "recovery_interval",
    "eval_r",
    "device",
}
"""Options that a resumed run may change, because they do not affect its weights."""


def run(options: TrainOptions, report: Report | None = None) -> list[Row]:
    """Train and evaluate a model, and write the folder of the run.

    Args:
        options: what to train.
        report: receiver of the results; `None` prints them.

    Returns:
        The rows of the last evaluation; none after SIGTERM, once the state is saved.

    Raises:
        InputError: if data, model or options do not fit, or the folder holds another run.
        TrainingError: if the run cannot continue.
    """
    report = report or Report(options.json, writes=True)
    with handled():
        accelerator = make_accelerator(options)
        try:
            with _alone(options, accelerator, report):
                rows = _run(options, report, accelerator)
        except BaseException:
            accelerator.end_training()  # without waiting, because the other processes may have failed
            _forget()
            raise
        _end(accelerator)
        return rows


def _run(args: TrainOptions, report: Report, accelerator: Any) -> list[Row]:
    checkpoints = Checkpoints(args.output / "checkpoints", max(1, args.checkpoint_hist), report.warn)
    if args.resume is None and checkpoints.all():
        raise InputError(
            f"{str(args.output)!r} already holds a run: give --resume auto to go on with it, or another --output"
        )
    args = merging.as_saved(args, report.say if accelerator.is_main_process else len)
    loop, images = build(args, accelerator, checkpoints, report)
    about = {
        "args": args.as_json(),
        "processes": accelerator.num_processes,
        "data": {"fingerprint": fingerprint(images), "images": len(images), "classes": images.num_classes},
    }
    _resume(loop, args, about)
    try:
        rows = loop.run()
    except Stopped:
        if accelerator.is_main_process:
            report.say(f"stopped and saved after update {loop.update}: go on with --resume auto")
        return []
    state = whole_state(loop.result)
    with agree(InputError):
        if accelerator.is_main_process:
            publish(loop.result, state, args, images, args.output / "model")
            report.say(f"wrote {args.output / 'model'}, which this command evaluates:")
            loading = how_to_load(loop.result, args, args.output / "model")
            report.say(evaluation(loading, args, images.medium), whole=True)
            report.write([{"model": args.model, **row} for row in rows])
    return [{"model": args.model, **row} for row in rows]


@contextlib.contextmanager
def _alone(args: TrainOptions, accelerator: Any, report: Report) -> Iterator[None]:
    """Hold the lock of the run folder in the main process; all processes end if another run holds it."""
    with contextlib.ExitStack() as stack:
        with agree(InputError):
            if accelerator.is_main_process:
                for entry in sorted(args.output.iterdir()) if args.output.is_dir() else ():
                    refuse_link(entry, "the run's")
                stack.enter_context(locked(args.output, report.warn))
        yield


def _end(accelerator: Any) -> None:
    """Free all holders of the process group, then the group, because gloo's threads may abort the interpreter at exit."""
    accelerator.free_memory()
    gc.collect()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    _forget()


def _forget() -> None:
    """Forget Accelerate's state of the process, so that a later run in it may choose another precision."""
    from accelerate.state import AcceleratorState, PartialState

    if PartialState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)


def make_accelerator(args: TrainOptions) -> Any:
    """Return the `Accelerator` for the processes that `accelerate launch` or torchrun started.

    Raises:
        InputError: if Accelerate is not installed, its launcher asks for sharding, or `--fsdp` does not support an option.
    """
    try:
        from accelerate import Accelerator
    except ImportError:
        raise InputError(
            "accelerate is not installed, but training needs it: pip install 'tokenmerge[train]'"
        ) from None
    from accelerate.utils import DistributedType

    precision = {"float16": "fp16", "bfloat16": "bf16"}[args.amp_dtype] if args.amp else "no"
    accelerator = Accelerator(
        cpu=args.device == "cpu" or not torch.accelerator.is_available(),  # (Accelerate would see one process)
        mixed_precision=precision,
        gradient_accumulation_steps=args.grad_accum_steps,
        step_scheduler_with_optimizer=False,
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise InputError(
            f"the launcher asks for {accelerator.distributed_type.value}, but train shards by itself: launch with "
            "data parallelism, such as accelerate launch --multi_gpu, and give --fsdp"
        )
    if args.fsdp:
        check_can_shard(args, accelerator.num_processes)
    return accelerator


def build(args: TrainOptions, accelerator: Any, checkpoints: Checkpoints, report: Report) -> tuple[Loop, AnyImages]:
    """Return the training loop with prepared model, data and optimizer, and the training images."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    seed_all(args.seed, "model")
    model, images, validation = _model_and_data(args)
    odd = [*images.left_out, *(validation.left_out if validation is not None else ())]
    if odd and rank == 0:
        report.warn(f"{len(odd)} files or folders were left out, the first is {odd[0]}")
    weights = weights_of(images) if args.weighted_sampling else None
    batches = EpochBatches(len(images), args, rank, processes, weights)
    model.to(accelerator.device)
    teacher = teacher_of(model) if args.distill_weight else None
    handle = tokenmerge.patch(model, args.setting.config(**args.merging()))
    objective = Objective(args, images.num_classes, teacher, merging.with_predictors(model, handle, args))
    if args.grad_checkpointing:
        checkpoint_blocks(model)
    if args.fsdp:
        shard(model, accelerator.device.type, processes)
    optimizer = optimizer_of(model, args, processes)
    schedule = schedule_of(optimizer, args, batches.updates)
    ema = average_of(model, args)
    if args.compile:
        model.compile()
    if args.fsdp:
        prepared: Any = model
    else:
        prepared, optimizer = accelerator.prepare(model, optimizer)
    shares = None
    if validation is not None:
        shares = evaluation_batches(validation, args.batch_size, args.workers, rank, processes)
    loop = Loop(
        accelerator=accelerator,
        args=args,
        model=prepared,
        bare=model,
        handle=handle,
        optimizer=optimizer,
        schedule=schedule,
        ema=ema,
        state=RunState(model, optimizer, ema, accelerator.scaler, args.fsdp),
        objective=objective,
        images=Augmented(images, args.seed),
        batches=batches,
        validation=shares,
        checkpoints=checkpoints,
        logbook=Logbook(args.output, args.tensorboard) if accelerator.is_main_process else None,
        report=report,
    )
    return loop, images


def _model_and_data(args: TrainOptions) -> tuple[Any, AnyImages, AnyImages | None]:
    medium = medium_to_train(args)
    check_flags(args, medium)
    if args.model.startswith("open_clip:"):
        raise InputError(
            f"train needs a classifier with a head, but {args.model} classifies by comparing pictures with texts: train the same tower of "
            "timm, such as vit_base_patch16_clip_224"
        )
    classes = count_classes(args) if args.num_classes is None else args.num_classes
    model = load_model(args.model_options(classes), head=medium.name, new_head=True)
    shape = classifier_input(model, medium, "train")
    if medium in (IMAGES, VIDEOS) and hasattr(model, "pretrained_cfg"):
        own = {name: getattr(args, name) for name in ("crop_pct", "interpolation", "mean", "std")}
        given = {name: value for name, value in own.items() if value is not None}
        model.pretrained_cfg = {**model.pretrained_cfg, **given}
    note_several_labels(model, args.several)
    if args.several:
        metrics_library()  # raises now, and not after the first epoch
    known = class_names(model)
    processor = processor_for(model, args)
    read = medium if processor is None else read_for(processor, medium)

    def opened(split: str, option: str, training: bool) -> AnyImages:
        transform = make_transform(model, args, medium, training, shape, processor)
        return open_split(args, split, option, transform, num_classes(model), read, known)

    validation = opened(args.val_split, "--val-split", False) if args.val_split else None
    images = opened(args.train_split, "--train-split", True)
    if validation is not None and validation.names != images.names:
        odd = sorted(set(validation.names) ^ set(images.names))[0]
        raise InputError(
            f"training and validation {medium.name} have other classes, {odd!r} is in one only: give both the same class folders"
        )
    return model, images, validation


def _resume(loop: Loop, args: TrainOptions, about: dict[str, Any]) -> None:
    """Load the checkpoint to resume, if any, and open the records of the run."""
    main = loop.accelerator.is_main_process
    path = loop.checkpoints.latest(args.resume) if args.resume else None
    if path is not None:
        _check_same_run(args, about)
        loop.go_on(path)
        if main:
            loop.report.say(f"going on after update {loop.update}, from {path}")
    with agree(InputError):
        if loop.logbook is not None:
            loop.checkpoints.clean()
            loop.logbook.start(about, loop.update)
            loop.logbook.start_log(loop.report.history, again=path is not None)
            loop.report.also = loop.logbook.note


def _check_same_run(args: TrainOptions, about: dict[str, Any]) -> None:
    """Raise if the run in the folder had other options that affect its weights."""
    output, record = args.output, args.output / "run.json"
    if args.resume != "auto" and not os.path.lexists(record):
        return  # nothing to compare with: the checkpoint is from another folder
    try:
        before = read_json(record, "the record")
        if not isinstance(before, dict) or not isinstance(before.get("args"), dict):
            raise InputError(f"the record {shown(str(record))} holds no options of a run")
    except InputError as error:
        raise TrainingError(f"{error}; to go on without it, give --resume CHECKPOINT and another --output") from None
    now = json.loads(json.dumps(about))
    pairs = {
        name: (before.get("args", {}).get(name), value) for name, value in now["args"].items() if name not in _FREE
    }
    pairs |= {name: (before.get(name), now[name]) for name in ("processes", "data")}
    different = [name for name, (then, this) in pairs.items() if then != this]
    if different:
        name = different[0]
        then, this = pairs[name]
        raise TrainingError(
            f"the run in {str(output)!r} had {name}={then}, but {name}={this} was given: give the same to resume it, "
            "or another --output"
        )
