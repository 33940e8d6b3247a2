"""Options of a training run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tokenmerge.errors import InputError, TokenMergeError
from tokenmerge.tools.settings import Setting


class TrainingError(TokenMergeError):
    """Error of a run that cannot continue: a loss that is not finite, a full disk, or no intact checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArgs:
    """Options of a training run, with the names and meanings of timm's `train.py` where it has them.

    Attributes:
        data: folder with one subfolder per split, each with one folder of files per class.
        output: folder to write the run to.
        train_split, val_split: subfolders of the splits; an empty `val_split` trains without validation.
        epochs, batch_size, grad_accum_steps, workers, seed: `batch_size` is per process and forward pass.
        opt, lr, lr_base, lr_base_size, weight_decay, layer_decay, momentum, clip_grad: the peak learning rate is `lr`, or
            `lr_base` × global batch / `lr_base_size`.
        sched, warmup_epochs, warmup_lr, min_lr: learning rate schedule.
        smoothing, mixup, cutmix, mixup_prob, mixup_switch_prob, mixup_off_epoch, bce_loss: the loss.
        aa, color_jitter, reprob, hflip, vflip, train_crop_mode, scale, ratio, train_interpolation, no_aug, aug_repeats:
            augmentation.
        sampling_rate: stride between the sampled frames of a video.
        roll, timem, freqm: augmentation of sounds, by their names in AudioMAE and AST.
        crop_pct, interpolation, mean, std: preprocessing; `None` is the model's own. It is saved with the trained
            model for images; for videos, give the same values to `eval`.
        model_ema, model_ema_decay, model_ema_warmup: moving average of the weights, which is then evaluated and saved.
        amp, amp_dtype, grad_checkpointing, compile, device, fsdp: device, precision and memory.
        setting: the schedule, from `--r`.
        merging: other fields of `MergeConfig`.
        r_warmup_epochs: epochs over which r grows from 0.
        r_milestones: epochs, each with the r from that epoch on.
        eval_r: settings to evaluate after every epoch; the setting of training if empty.
        distill_weight, distill_temp: weight and temperature of distillation from the unmerged initial model.
        checkpoint_hist, recovery_interval, resume: checkpoints to keep, updates between two, checkpoint to resume.
        log_interval, tensorboard: records of progress.
    """

    data: Path
    output: Path
    setting: Setting
    merging: dict[str, Any] = dataclasses.field(default_factory=dict)
    train_split: str = "train"
    val_split: str = "val"
    epochs: int = 300
    batch_size: int = 128
    grad_accum_steps: int = 1
    workers: int = 2
    seed: int = 42
    opt: str = "adamw"
    lr: float | None = None
    lr_base: float = 5e-4
    lr_base_size: int = 512
    weight_decay: float = 0.05
    layer_decay: float | None = None
    momentum: float = 0.9
    clip_grad: float | None = None
    sched: str = "cosine"
    warmup_epochs: int = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_off_epoch: int = 0
    bce_loss: bool = False
    aa: str | None = None
    color_jitter: float = 0.4
    reprob: float = 0.0
    hflip: float = 0.5
    vflip: float = 0.0
    train_crop_mode: str = "rrc"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    train_interpolation: str = "random"
    sampling_rate: int = 4
    roll: bool = False
    timem: int = 0
    freqm: int = 0
    crop_pct: float | None = None
    interpolation: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    no_aug: bool = False
    aug_repeats: int = 1
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False
    amp: bool = False
    amp_dtype: str = "float16"
    grad_checkpointing: bool = False
    compile: bool = False
    device: str = "auto"
    fsdp: bool = False
    r_warmup_epochs: int = 0
    r_milestones: tuple[tuple[int, Setting], ...] = ()
    eval_r: tuple[Setting, ...] = ()
    distill_weight: float = 0.0
    distill_temp: float = 1.0
    checkpoint_hist: int = 2
    recovery_interval: int = 0
    resume: str | None = None
    log_interval: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Check options that depend on each other.

        Raises:
            InputError: if two options contradict each other.
        """
        mixes = self.mixup > 0 or self.cutmix > 0
        if mixes and self.batch_size % 2:
            raise InputError(f"batch_size={self.batch_size} is odd, but mixup and cutmix mix pairs: give an even one")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise InputError(
                f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs}: give fewer, 0 for none"
            )
        late = [epoch for epoch, _ in self.r_milestones if epoch >= self.epochs]
        if late:
            raise InputError(
                f"r_milestones has epoch {late[0]}, but there are {self.epochs} epochs, from 0 on: check both"
            )

    def global_batch(self, processes: int) -> int:
        """Return the number of images per update of the weights."""
        return self.batch_size * self.grad_accum_steps * processes

    def learning_rate(self, processes: int) -> float:
        """Return the peak learning rate."""
        return self.lr if self.lr is not None else self.lr_base * self.global_batch(processes) / self.lr_base_size

    def as_json(self) -> dict[str, Any]:
        """Return the fields as values for run.json."""

        def plain(value: Any) -> Any:
            if isinstance(value, Setting):
                return value.label
            if isinstance(value, tuple | list):
                return [plain(entry) for entry in value]
            return str(value) if isinstance(value, Path) else value

        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
