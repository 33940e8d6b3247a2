"""Options of `tokenmerge train`, with the names and meanings of timm's train.py where it has them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tokenmerge.config import MergeConfig
from tokenmerge.errors import InputError, TokenMergeError
from tokenmerge.tools.common import DeviceOptions, MergeOptions, RowOptions, WeightOptions
from tokenmerge.tools.options import OptionError, only_one, option
from tokenmerge.tools.settings import Setting, parse_setting


class TrainingError(TokenMergeError):
    """Error of a run that cannot continue: a loss that is not finite, a full disk, or no intact checkpoint."""


def recipes() -> dict[str, Path]:
    """Return the files of the recipes that ship with the package, by name."""
    folder = Path(str(resources.files("tokenmerge.tools.train").joinpath("recipes")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentationOptions(RowOptions):
    """Augmentation and preprocessing.

    Attributes:
        aa, color_jitter, reprob, hflip, vflip, train_crop_mode, scale, ratio, train_interpolation, no_aug, aug_repeats:
            augmentation of images; aa, scale, ratio, hflip, reprob and aug_repeats also of videos.
        mixup, cutmix, mixup_prob, mixup_switch_prob, mixup_off_epoch: mixing of pairs of images.
        roll, timem, freqm: augmentation of sounds, by their names in AudioMAE and AST.
        sampling_rate: stride between the sampled frames of a video.
        crop_pct, interpolation, mean, std: preprocessing; `None` is the model's own. It is saved with the trained
            model for images; for videos, give the same values to `eval`.
    """

    aa: str | None = option(
        None, "policy of automatic augmentation: rand-m9-mstd0.5-inc1", "augmentation", metavar="POLICY", empty=True
    )
    mixup: float = option(0.0, "alpha of mixup; 0 turns it off", "augmentation", least=0)
    cutmix: float = option(0.0, "alpha of cutmix; 0 turns it off", "augmentation", least=0)
    reprob: float = option(0.0, "probability of random erasing", "augmentation", least=0, most=1)
    color_jitter: float = option(0.4, "strength of colour jitter", "augmentation", least=0, rare=True)
    hflip: float = option(0.5, "probability of a horizontal flip", "augmentation", least=0, most=1, rare=True)
    vflip: float = option(0.0, "probability of a vertical flip", "augmentation", least=0, most=1, rare=True)
    train_crop_mode: str = option(
        "rrc",
        "random resized crop, or resize at the original aspect ratio with a centred or random crop",
        "augmentation",
        choices=("rrc", "rkrc", "rkrr"),
        rare=True,
    )
    scale: tuple[float, float] = option(
        (0.08, 1.0),
        "smallest and largest area of random crops, as fractions of the image",
        "augmentation",
        least=0,
        rare=True,
    )
    ratio: tuple[float, float] = option(
        (3 / 4, 4 / 3), "smallest and largest aspect ratio of random crops", "augmentation", least=0, rare=True
    )
    train_interpolation: str = option(
        "random", "interpolation of training images: random, bilinear or bicubic", "augmentation", rare=True
    )
    no_aug: bool = option(False, "turn all augmentation off", "augmentation", negatable=True)
    aug_repeats: int = option(1, "augmented copies of each image", "augmentation", least=1, metavar="N", rare=True)
    mixup_prob: float = option(
        1.0, "probability of applying mixup or cutmix to a batch", "augmentation", least=0, most=1, rare=True
    )
    mixup_switch_prob: float = option(
        0.5, "probability of cutmix instead of mixup if both are on", "augmentation", least=0, most=1, rare=True
    )
    mixup_off_epoch: int = option(
        0, "epoch from which mixup and cutmix are off; 0 keeps them on", "augmentation", least=0, metavar="N", rare=True
    )
    roll: bool = option(
        False, "shift sounds in time and change their loudness at random", "augmentation", negatable=True, rare=True
    )
    timem: int = option(
        0, "largest width of the time mask of sounds", "augmentation", least=0, metavar="FRAMES", rare=True
    )
    freqm: int = option(
        0, "largest width of the frequency mask of sounds", "augmentation", least=0, metavar="BANDS", rare=True
    )
    sampling_rate: int = option(
        4, "stride between the sampled frames of a video", "augmentation", least=1, most=10_000, metavar="N", rare=True
    )
    crop_pct: float | None = option(
        None, "centre crop of validation (default: the model's own)", "augmentation", least=0.1, most=1, rare=True
    )
    interpolation: str | None = option(
        None, "interpolation of validation (default: the model's own)", "augmentation", rare=True
    )
    mean: tuple[float, float, float] | None = option(
        None, "mean of each channel (default: the model's own)", "augmentation", rare=True
    )
    std: tuple[float, float, float] | None = option(
        None, "standard deviation of each channel (default: the model's own)", "augmentation", least=1e-6, rare=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizationOptions(AugmentationOptions):
    """Optimizer, learning rate, regularization and distillation.

    Attributes:
        epochs, batch_size, grad_accum_steps, seed: `batch_size` is per process and forward pass.
        opt, lr, lr_base, lr_base_size, weight_decay, layer_decay, momentum, opt_betas, clip_grad: the peak learning rate is
            `lr`, or `lr_base` × global batch / `lr_base_size`.
        sched, warmup_epochs, warmup_lr, warmup_prefix, min_lr: learning rate schedule.
        smoothing, bce_loss, drop, drop_path: the loss and regularization.
        model_ema, model_ema_decay, model_ema_warmup: moving average of the weights, which is then evaluated and saved.
        distill_weight, distill_temp: weight and temperature of distillation from the unmerged initial model.
        predictor_lr_scale: factor of the learning rate for predictors, which start from nothing; DynamicViT trains the rest of
            the model at 0.01 of the predictors' rate.
    """

    epochs: int = option(300, "number of epochs", "optimisation", least=1, metavar="N")
    batch_size: int = option(128, "images per process and forward pass", "optimisation", "-b", least=1, metavar="N")
    opt: str = option("adamw", "optimizer, by its name in timm", "optimisation")
    lr: float | None = option(
        None, "peak learning rate (default: --lr-base × global batch / --lr-base-size)", "optimisation", least=0
    )
    lr_base: float = option(
        5e-4, "learning rate at a global batch of --lr-base-size", "optimisation", least=0, rare=True
    )
    lr_base_size: int = option(512, "global batch that --lr-base refers to", "optimisation", least=1, rare=True)
    weight_decay: float = option(0.05, "weight decay", "optimisation", least=0)
    layer_decay: float | None = option(
        None,
        "factor of the learning rate from each block to the previous one",
        "optimisation",
        least=0,
        most=1,
        rare=True,
    )
    momentum: float = option(0.9, "momentum, for optimizers that use it", "optimisation", least=0, most=1, rare=True)
    opt_betas: tuple[float, float] | None = option(
        None, "betas of Adam and its kin (default: the optimizer's own)", "optimisation", least=0, most=1, rare=True
    )
    clip_grad: float | None = option(None, "norm that gradients are clipped to", "optimisation", least=0)
    sched: str = option(
        "cosine",
        "learning rate schedule",
        "optimisation",
        choices=("cosine", "tanh", "step", "poly", "constant", "none"),
        rare=True,
    )
    warmup_epochs: int = option(5, "epochs of learning rate warm-up", "optimisation", least=0, metavar="N")
    warmup_lr: float = option(1e-6, "learning rate at the start of the warm-up", "optimisation", least=0, rare=True)
    warmup_prefix: bool = option(
        False, "let the schedule begin after the warm-up, within --epochs", "optimisation", negatable=True, rare=True
    )
    min_lr: float = option(1e-6, "learning rate at the end of the schedule", "optimisation", least=0, rare=True)
    smoothing: float = option(0.1, "label smoothing", "optimisation", least=0, most=1)
    bce_loss: bool = option(
        False, "binary cross-entropy instead of softmax cross-entropy", "optimisation", negatable=True, rare=True
    )
    drop: float | None = option(None, "dropout rate", "optimisation", least=0, most=1, rare=True)
    drop_path: float | None = option(None, "stochastic depth rate", "optimisation", least=0, most=1)
    model_ema: bool = option(False, "keep and evaluate a moving average of the weights", "optimisation", negatable=True)
    model_ema_decay: float = option(0.9998, "decay of the moving average", "optimisation", least=0, most=1, rare=True)
    model_ema_warmup: bool = option(
        False, "increase the decay from a low value at the start", "optimisation", negatable=True, rare=True
    )
    distill_weight: float = option(
        0.0, "weight of distillation from the unmerged initial model", "optimisation", least=0, most=1, rare=True
    )
    distill_temp: float = option(1.0, "temperature of distillation", "optimisation", least=1e-3, rare=True)
    predictor_lr_scale: float = option(
        100.0, "factor of the learning rate for predictors of learned matchers", "optimisation", least=0, rare=True
    )
    grad_accum_steps: int = option(
        1, "forward and backward passes per update", "optimisation", least=1, metavar="N", rare=True
    )
    seed: int = option(42, "random seed", "optimisation", least=0, most=2**32 - 1, metavar="N")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(WeightOptions, MergeOptions, OptimizationOptions):
    """Options of `tokenmerge train`.

    Attributes:
        data: folder with one subfolder per split, each with one folder of files per class; the root of `dataset`.
        dataset: data set that timm reads instead, such as "hfds/NAME".
        train_split, val_split: subfolders or splits; an empty `val_split` trains without validation.
        train_labels, val_labels: files with several labels for each file of a split, in the form of AudioSet's segments, instead
            of class folders; the loss is then binary cross-entropy, and the measure mAP.
        class_map: file of class names in the order of the model's outputs.
        weighted_sampling: whether files are drawn with replacement, each with the sum over its labels of 1 ÷ their number of files.
        epoch_size: files per epoch; 0 takes as many as there are.
        workers: data loader processes per training process.
        r: the schedule; `None` is as saved with the model, otherwise 0.
        r_warmup_epochs: epochs over which r grows from 0.
        r_milestones: schedules by the epoch from which they hold.
        eval_r: schedules to evaluate after every epoch; the one of training if empty.
        device, amp, amp_dtype, grad_checkpointing, compile, fsdp: device, precision and memory.
        output: folder to write the run to.
        resume: "auto", or a checkpoint's folder.
        recovery_interval, checkpoint_hist: updates between two checkpoints within an epoch, and checkpoints to keep.
        log_interval, tensorboard: records of progress.

    Raises:
        InputError: if two options contradict each other.
    """

    r: str | int | None = option(  # type: ignore[assignment]
        None, "tokens merged per block while training (default: as saved with the model, or 0)", "merging", metavar="R"
    )
    eval_r: Sequence[str | int] = option(
        (), "values of r to evaluate after every epoch (default: the r of training)", "merging", metavar="R"
    )
    r_warmup_epochs: int = option(
        0, "epochs over which r grows linearly from 0", "merging", least=0, metavar="N", rare=True
    )
    r_milestones: Mapping[str, Any] = option(
        {}, "change r to R from epoch EPOCH on", "merging", metavar="EPOCH=R", pairs=True, rare=True
    )
    data: Path | None = option(
        None,
        "folder of images, sounds or videos: train/CLASS/FILE and val/CLASS/FILE",
        "data",
        "--data",
        "--data-dir",
        metavar="DIR",
    )
    dataset: str | None = option(
        None, "data set that timm reads instead: hfds/NAME, tfds/NAME; --data is its root", "data", metavar="NAME"
    )
    train_split: str = option("train", "subfolder or split with the training images", "data", metavar="NAME", rare=True)
    val_split: str = option(
        "val",
        "subfolder or split with the validation images; '' trains without",
        "data",
        metavar="NAME",
        rare=True,
        empty=True,
    )
    train_labels: Path | None = option(
        None,
        "CSV with several labels per training file, as AudioSet's, instead of class folders",
        "data",
        metavar="FILE",
    )
    val_labels: Path | None = option(None, "such a CSV for the validation files", "data", metavar="FILE")
    class_map: Path | None = option(
        None, "text file of class names in the order of the model's outputs", "data", metavar="FILE", rare=True
    )
    weighted_sampling: bool = option(
        False, "draw files of rare labels more often, with replacement", "data", negatable=True, rare=True
    )
    epoch_size: int = option(
        0, "files per epoch; 0 takes as many as there are", "data", least=0, metavar="N", rare=True
    )
    workers: int = option(2, "data loader processes per training process", "data", "-j", least=0, most=512, metavar="N")
    device: str = option(
        "auto", "auto uses one GPU per process if there are GPUs", "computing", choices=("auto", "cpu")
    )
    amp: bool = option(False, "train in mixed precision", "computing", negatable=True)
    amp_dtype: str = option(
        "float16", "dtype of mixed precision", "computing", choices=("float16", "bfloat16"), rare=True
    )
    grad_checkpointing: bool = option(
        False, "recompute activations in the backward pass", "computing", negatable=True, rare=True
    )
    compile: bool = option(False, "run torch.compile on the model", "computing", negatable=True, rare=True)
    fsdp: bool = option(False, "shard weights and optimizer state (FSDP2)", "computing", negatable=True, rare=True)
    output: Path = option(dataclasses.MISSING, "folder to write the run to", "output", metavar="DIR")
    resume: str | None = option(
        None, "resume from the newest checkpoint of the run (auto), or from DIR", "output", metavar="auto|DIR"
    )
    recovery_interval: int = option(
        0, "updates between checkpoints within an epoch; 0 writes none", "output", least=0, metavar="N", rare=True
    )
    checkpoint_hist: int = option(2, "number of checkpoints to keep", "output", least=1, metavar="N", rare=True)
    log_interval: int = option(10, "updates between rows of metrics.jsonl", "output", least=1, metavar="N", rare=True)
    tensorboard: bool = option(False, "write TensorBoard event files as well", "output", negatable=True, rare=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None and self.dataset is None:
            raise InputError("no data were given: give --data DIR, or --dataset NAME")
        mixes = self.mixup > 0 or self.cutmix > 0
        if mixes and self.batch_size % 2:
            raise InputError(f"batch_size={self.batch_size} is odd, but mixup and cutmix mix pairs: give an even one")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise InputError(
                f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs}: give fewer, 0 for none"
            )
        self._check_labels()
        late = [epoch for epoch, _ in self.milestones if epoch >= self.epochs]
        if late:
            raise InputError(
                f"r_milestones has epoch {late[0]}, but there are {self.epochs} epochs, from 0 on: check both"
            )

    def _check_labels(self) -> None:
        if self.val_labels is not None and self.train_labels is None:
            raise InputError(
                "--val-labels was given without --train-labels, but both splits have labels of one kind: give both"
            )
        if self.train_labels is None:
            return
        only_one("train-labels", "dataset", self.dataset is not None)
        if not self.val_split and self.val_labels is not None:
            raise InputError(
                "--val-labels was given with --val-split '', which trains without validation: leave one of them out"
            )
        if self.val_split and self.val_labels is None:
            raise InputError(
                "--train-labels was given without --val-labels: give both, or --val-split '' to train without"
            )
        if self.distill_weight:
            raise InputError(
                "--distill-weight compares distributions over classes, but --train-labels gives several labels per file: leave it out"
            )

    @property
    def several(self) -> bool:
        """Whether files have several labels."""
        return self.train_labels is not None

    @property
    def folder(self) -> Path:
        """The folder with one subfolder per split."""
        assert self.data is not None  # checked when the options were made
        return self.data

    @functools.cached_property
    def setting(self) -> Setting:
        """The schedule of training."""
        return parse_setting("0" if self.r is None else str(self.r))

    @functools.cached_property
    def evaluated(self) -> tuple[Setting, ...]:
        """The schedules to evaluate; empty for the one of training."""
        return tuple(parse_setting(str(text)) for text in self.eval_r)

    @functools.cached_property
    def milestones(self) -> tuple[tuple[int, Setting], ...]:
        """Epochs in order, each with the schedule from that epoch on."""
        found = []
        for epoch, text in self.r_milestones.items():
            if not epoch.isdecimal() or len(epoch) > 9:
                raise OptionError("r_milestones", f"{epoch!r:.40} was given, but EPOCH=R such as 20=13 was expected")
            found.append((int(epoch), parse_setting(str(text))))
        return tuple(sorted(found, key=lambda milestone: milestone[0]))

    def global_batch(self, processes: int) -> int:
        """Return the number of images per update of the weights."""
        return self.batch_size * self.grad_accum_steps * processes

    def learning_rate(self, processes: int) -> float:
        """Return the peak learning rate."""
        return self.lr if self.lr is not None else self.lr_base * self.global_batch(processes) / self.lr_base_size

    def merging(self, saved: MergeConfig | None = None) -> dict[str, Any]:
        """Return the fields of `MergeConfig` other than the schedule, with proportional attention on unless it is said to be off.

        The paper trains with it, also the MAE models that "auto" would leave it off for.
        """
        fields = super().merging(saved)
        said = fields.get("prop_attn", self.setting.fields.get("prop_attn", "auto"))  # (a config file may say it)
        return {**fields, "prop_attn": True} if said == "auto" else fields

    def model_options(self, classes: int) -> DeviceOptions:
        """Return the options of the model to train, on the CPU, with the rates of dropout and stochastic depth.

        Args:
            classes: number of classes of the head.
        """
        rates = {"drop_rate": self.drop, "drop_path_rate": self.drop_path}
        given = {name: value for name, value in rates.items() if value is not None}
        return DeviceOptions(
            model=self.model,
            num_classes=classes,
            img_size=self.img_size,
            model_kwargs={**(self.model_kwargs), **given},
            pretrained=self.pretrained,
            checkpoint=self.checkpoint,
        )
