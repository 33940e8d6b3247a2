"""Put a training run together, start or resume it, keep its result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn

import tokenmerge
from tokenmerge.errors import InputError
from tokenmerge.tools.images import ImageFolder
from tokenmerge.tools.images import batches as evaluation_batches
from tokenmerge.tools.models import ModelArgs, input_shape, load_model
from tokenmerge.tools.report import Report
from tokenmerge.tools.train import merging
from tokenmerge.tools.train.args import TrainArgs, TrainingError
from tokenmerge.tools.train.checkpoints import Checkpoints, progress_of
from tokenmerge.tools.train.data import (
    Augmented,
    EpochBatches,
    fingerprint,
    make_transform,
    seed_all,
    split_folder,
)
from tokenmerge.tools.train.logbook import Logbook
from tokenmerge.tools.train.loop import Loop, Stopped
from tokenmerge.tools.train.objective import Objective, teacher_of
from tokenmerge.tools.train.publish import publish

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
"""Options that a resumed run may change: they do not change its weights."""


def run_train(base: ModelArgs, args: TrainArgs, report: Report) -> int:
    """Train, evaluate, write the run's folder.

    Returns:
        0, also after SIGTERM, when the state is saved.

    Raises:
        InputError: if data, model or options do not fit, or the folder holds another run.
        TrainingError: if the run cannot go on.
    """
    accelerator = make_accelerator(args)
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
    if accelerator.is_main_process:
        publish(loop.result, base, args, images, args.output / "model")
        report.say(f"wrote {args.output / 'model'}: tokenmerge eval local-dir:{args.output / 'model'} --pretrained …")
        report.write([{"model": base.model, **row} for row in rows])
    accelerator.end_training()
    return 0


def make_accelerator(args: TrainArgs) -> Any:
    """Accelerate's, for the processes that `accelerate launch` or torchrun started.

    Raises:
        InputError: if Accelerate is not installed, or its launcher asks for sharding.
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
            f"the launcher asks for {accelerator.distributed_type.value}, but merging blocks cannot be sharded yet: "
            "launch with data parallelism (DDP), such as accelerate launch --multi_gpu"
        )
    return accelerator


def build(
    base: ModelArgs, args: TrainArgs, accelerator: Any, checkpoints: Checkpoints, report: Report
) -> tuple[Loop, ImageFolder]:
    """Model, data and optimizer, prepared; and the training images."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    seed_all(args.seed, "model")
    train_root = split_folder(args.data, args.train_split, "--train-split")
    if base.num_classes is None:
        base = dataclasses.replace(base, num_classes=_classes(train_root))
    model = _trainable(load_model(base), base)
    images, validation = _data(model, args, train_root)
    batches = EpochBatches(len(images), args, rank, processes)
    model.to(accelerator.device)
    objective = Objective(args, images.num_classes, teacher_of(model) if args.distill_weight else None)
    handle = tokenmerge.patch(model, args.setting.config(**args.merging))
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    optimizer = _optimizer(model, args, processes)
    schedule = _schedule(optimizer, args, batches.updates)
    ema = _average(model, args, accelerator)
    if args.compile:
        model.compile()
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


def _average(model: nn.Module, args: TrainArgs, accelerator: Any) -> Any:
    """timm's moving average of the weights, part of every checkpoint; `None` without."""
    from timm.utils import ModelEmaV3

    if not args.model_ema:
        return None
    ema = ModelEmaV3(model, args.model_ema_decay, use_warmup=args.model_ema_warmup)
    accelerator.register_for_checkpointing(ema)
    return ema


def _schedule(optimizer: Any, args: TrainArgs, updates: int) -> Any:
    """timm's schedule of learning rates, a function of the number of updates alone; set to the first."""
    from timm.scheduler import create_scheduler_v2

    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr,
        min_lr=args.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    if schedule is not None:
        schedule.step_update(0)
    return schedule


def _optimizer(model: nn.Module, args: TrainArgs, processes: int) -> Any:
    from timm.optim import create_optimizer_v2

    try:
        return create_optimizer_v2(
            model,
            opt=args.opt,
            lr=args.learning_rate(processes),
            weight_decay=args.weight_decay,
            momentum=args.momentum,
            layer_decay=args.layer_decay,
        )
    except Exception as error:  # an unknown name, or values that this optimizer refuses
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the optimizer {args.opt!r} cannot be made ({reason}): choose one of timm.optim.list_optimizers()"
        ) from None


def _trainable(model: Any, base: ModelArgs) -> Any:
    if not hasattr(model, "pretrained_cfg"):
        raise InputError(
            f"{type(model).__name__} is not a timm model, but train takes preprocessing and parameter groups from timm: "
            "patch it and train it in your own loop"
        )
    channels, *_ = input_shape(model)
    if channels != 3 or not base.num_classes:
        raise InputError(
            f"{base.model} does not classify RGB images, but train needs a model that does: choose another"
        )
    return model


def _classes(root: Path) -> int:
    return sum(1 for path in root.iterdir() if path.is_dir())


def _data(model: Any, args: TrainArgs, train_root: Path) -> tuple[ImageFolder, ImageFolder | None]:
    _, height, width = input_shape(model)

    def folder(root: Path, training: bool) -> ImageFolder:
        transform = make_transform(model, args, training, (height, width))
        return ImageFolder(root, transform, model.num_classes)

    validation = folder(split_folder(args.data, args.val_split, "--val-split"), False) if args.val_split else None
    images = folder(train_root, True)
    if validation is not None and validation.names != images.names:
        odd = sorted(set(validation.names) ^ set(images.names))[0]
        raise InputError(
            f"training and validation images have other classes, {odd!r} is in one only: give both the same class folders"
        )
    return images, validation


def _resume(loop: Loop, args: TrainArgs, about: dict[str, Any]) -> None:
    """Load the latest state if asked to, and open the run's records."""
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
    """Raise if the folder's run was told something else that changes weights."""
    try:
        before = json.loads((output / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # a checkpoint from elsewhere, or a record that is gone: there is nothing to compare with
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
