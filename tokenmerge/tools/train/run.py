"""`tokenmerge train`: build a run, start or resume it, and save its result."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import tokenmerge
from tokenmerge.errors import InputError
from tokenmerge.tools.folders import ClassFolder
from tokenmerge.tools.folders import batches as evaluation_batches
from tokenmerge.tools.inputs import classifier_input, num_classes
from tokenmerge.tools.media import IMAGES, VIDEOS, medium_of
from tokenmerge.tools.models import ModelArgs, load_model
from tokenmerge.tools.report import Report
from tokenmerge.tools.train import merging
from tokenmerge.tools.train.args import TrainArgs, TrainingError
from tokenmerge.tools.train.checkpoints import Checkpoints, progress_of
from tokenmerge.tools.train.data import (
    Augmented,
    EpochBatches,
    fingerprint,
    seed_all,
    split_folder,
)
from tokenmerge.tools.train.logbook import Logbook
from tokenmerge.tools.train.loop import Loop, Stopped
from tokenmerge.tools.train.objective import Objective, teacher_of
from tokenmerge.tools.train.optim import average_of, checkpoint_blocks, optimizer_of, schedule_of
from tokenmerge.tools.train.publish import publish
from tokenmerge.tools.train.sharding import ShardedState, check_can_shard, shard, whole_state
from tokenmerge.tools.train.transforms import check_flags, make_transform

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


def run_train(base: ModelArgs, args: TrainArgs, report: Report) -> int:
    """Train and evaluate a model, and write the folder of the run.

    Returns:
        0, also after SIGTERM, once the state is saved.

    Raises:
        InputError: if data, model or options do not fit, or the folder holds another run.
        TrainingError: if the run cannot continue.
    """
    accelerator = make_accelerator(args)
    try:
        code = _run(base, args, report, accelerator)
    except BaseException:
        accelerator.end_training()  # without waiting, because the other processes may have failed
        raise
    _end(accelerator)
    return code


def _run(base: ModelArgs, args: TrainArgs, report: Report, accelerator: Any) -> int:
    args = dataclasses.replace(args, merging=merging.fields_for_training(args.merging))
    checkpoints = Checkpoints(args.output / "checkpoints", max(1, args.checkpoint_hist), report.warn)
    if args.resume is None and checkpoints.all():
        raise InputError(
            f"{str(args.output)!r} already holds a run: give --resume auto to go on with it, or another --output"
        )
    loop, images = build(base, args, accelerator, checkpoints, report)
    about = {
        "model": dataclasses.asdict(base) | {"checkpoint": base.checkpoint and str(base.checkpoint)},
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
        return 0
    state = whole_state(loop.result)
    if accelerator.is_main_process:
        publish(loop.result, state, base, args, images, args.output / "model")
        kind = "hf" if hasattr(loop.result, "save_pretrained") else "local-dir"
        report.say(f"wrote {args.output / 'model'}: tokenmerge eval {kind}:{args.output / 'model'} --pretrained …")
        report.write([{"model": base.model, **row} for row in rows])
    return 0


def _end(accelerator: Any) -> None:
    """Free all holders of the process group, then the group, because gloo's threads may abort the interpreter at exit."""
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    gc.collect()
    accelerator.wait_for_everyone()
    accelerator.end_training()


def make_accelerator(args: TrainArgs) -> Any:
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
        cpu=args.device == "cpu",
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


def build(
    base: ModelArgs, args: TrainArgs, accelerator: Any, checkpoints: Checkpoints, report: Report
) -> tuple[Loop, ClassFolder]:
    """Return the training loop with prepared model, data and optimizer, and the training images."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    seed_all(args.seed, "model")
    train_root = split_folder(args.data, args.train_split, "--train-split")
    if base.num_classes is None:
        base = dataclasses.replace(base, num_classes=_classes(train_root))
    model, images, validation = _model_and_data(base, args, train_root)
    batches = EpochBatches(len(images), args, rank, processes)
    model.to(accelerator.device)
    teacher = teacher_of(model) if args.distill_weight else None
    handle = tokenmerge.patch(model, args.setting.config(**args.merging))
    objective = Objective(args, images.num_classes, teacher, merging.with_predictors(model, handle, args))
    if args.grad_checkpointing:
        checkpoint_blocks(model)
    if args.fsdp:
        shard(model, accelerator.device.type, processes)
    optimizer = optimizer_of(model, args, processes)
    schedule = schedule_of(optimizer, args, batches.updates)
    ema = average_of(model, args, accelerator)
    if args.compile:
        model.compile()
    if args.fsdp:
        prepared: Any = model
        accelerator.register_for_checkpointing(ShardedState(model, optimizer))
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
        objective=objective,
        images=Augmented(images, args.seed),
        batches=batches,
        validation=shares,
        checkpoints=checkpoints,
        logbook=Logbook(args.output, args.tensorboard) if accelerator.is_main_process else None,
        report=report,
    )
    return loop, images


def _classes(root: Path) -> int:
    return sum(1 for path in root.iterdir() if path.is_dir())


def _model_and_data(base: ModelArgs, args: TrainArgs, train_root: Path) -> tuple[Any, ClassFolder, ClassFolder | None]:
    medium = medium_of(train_root)
    check_flags(args, medium)
    model = load_model(dataclasses.replace(base, of_videos=medium is VIDEOS))
    shape = classifier_input(model, medium, "train")
    if medium is IMAGES:
        own = {name: getattr(args, name) for name in ("crop_pct", "interpolation", "mean", "std")}
        given = {name: value for name, value in own.items() if value is not None}
        model.pretrained_cfg = {**model.pretrained_cfg, **given}

    def folder(root: Path, training: bool) -> ClassFolder:
        transform = make_transform(model, args, medium, training, shape)
        return ClassFolder(root, transform, num_classes(model), medium=medium)

    validation = folder(split_folder(args.data, args.val_split, "--val-split"), False) if args.val_split else None
    images = folder(train_root, True)
    if validation is not None and validation.names != images.names:
        odd = sorted(set(validation.names) ^ set(images.names))[0]
        raise InputError(
            f"training and validation {medium.name} have other classes, {odd!r} is in one only: give both the same class folders"
        )
    return model, images, validation


def _resume(loop: Loop, args: TrainArgs, about: dict[str, Any]) -> None:
    """Load the checkpoint to resume, if any, and open the records of the run."""
    main = loop.accelerator.is_main_process
    if main:
        args.output.mkdir(parents=True, exist_ok=True)
        loop.checkpoints.clean()
    loop.accelerator.wait_for_everyone()
    path = loop.checkpoints.latest(args.resume) if args.resume else None
    if path is not None:
        _check_same_run(args.output, about)
        loop.accelerator.load_state(str(path))
        loop.update = progress_of(path)["update"]
        if main:
            loop.report.say(f"going on after update {loop.update}, from {path}")
    if loop.logbook is not None:
        loop.logbook.start(about, loop.update)


def _check_same_run(output: Path, about: dict[str, Any]) -> None:
    """Raise if the run in the folder had other options that affect its weights."""
    try:
        before = json.loads((output / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # nothing to compare with: the checkpoint is from another folder, or run.json is gone
    now = json.loads(json.dumps(about))
    pairs = {
        name: (before.get("args", {}).get(name), value) for name, value in now["args"].items() if name not in _FREE
    }
    pairs |= {name: (before.get(name), now[name]) for name in ("processes", "data", "model")}
    different = [name for name, (then, this) in pairs.items() if then != this]
    if different:
        name = different[0]
        then, this = pairs[name]
        raise TrainingError(
            f"the run in {str(output)!r} had {name}={then}, but {name}={this} was given: give the same to resume it, "
            "or another --output"
        )
