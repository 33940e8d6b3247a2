"""Flags of `tokenmerge train`, from the command line and from YAML files, with the names of timm's train.py."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from importlib import resources
from pathlib import Path
from typing import Any

from tokenmerge.errors import InputError
from tokenmerge.tools.settings import Setting, parse_setting


def recipes() -> list[str]:
    """Return the names of the recipes that ship with the package, sorted."""
    folder = resources.files("tokenmerge.tools.train").joinpath("recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def add_train_options(command: argparse.ArgumentParser) -> None:
    """Add the flags of training: all except MODEL and the flags of merging and weights."""
    command.add_argument(
        "--config",
        "-c",
        metavar="FILE",
        help=f"YAML file with values of these flags, or a recipe: {', '.join(recipes())}; flags on the command line override it",
    )
    command.add_argument(
        "--data",
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with images, sounds or videos as train/CLASS/FILE and val/CLASS/FILE",
    )
    command.add_argument("--output", type=Path, metavar="DIR", help="folder to write the run to")
    for title, flags in _GROUPS.items():
        group = command.add_argument_group(title)
        for name, options in flags.items():
            more = {key: value for key, value in options.items() if key != "short"}
            group.add_argument(f"--{name}", *options.get("short", ()), **more)


def _number(low: float, high: float = float("inf"), whole: bool = False) -> Any:
    def convert(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} given, {kind} from {low:g} to {high:g} expected")
        return value

    return convert


def _milestone(text: str) -> tuple[int, Setting]:
    epoch, equals, setting = text.partition("=")
    if not equals or not epoch.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} given, EPOCH=R such as 20=13 expected")
    return int(epoch), parse_setting(setting)


_COUNT, _FRACTION, _POSITIVE = _number(0, whole=True), _number(0, 1), _number(0)
_ONE = _number(1, whole=True)
_GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "merging": {
        "r-warmup-epochs": {"type": _COUNT, "metavar": "N", "help": "epochs over which r grows linearly from 0"},
        "r-milestones": {
            "type": _milestone,
            "nargs": "+",
            "metavar": "EPOCH=R",
            "help": "change r to R from epoch EPOCH on",
        },
        "eval-r": {
            "nargs": "+",
            "metavar": "R",
            "help": "values of r to evaluate after every epoch (default: the r of training)",
        },
        "distill-weight": {
            "type": _FRACTION,
            "help": "weight of distillation from the unmerged initial model in the loss",
        },
        "distill-temp": {"type": _number(1e-3), "help": "temperature of distillation"},
    },
    "data": {
        "train-split": {"help": "subfolder of DIR with the training images"},
        "val-split": {"help": "subfolder of DIR with the validation images; '' trains without validation"},
        "batch-size": {"short": ("-b",), "type": _ONE, "help": "images per process and forward pass"},
        "workers": {"short": ("-j",), "type": _COUNT, "help": "data loader processes per training process"},
        "aa": {"metavar": "POLICY", "help": "policy of automatic augmentation, such as rand-m9-mstd0.5-inc1"},
        "color-jitter": {"type": _POSITIVE, "help": "strength of colour jitter"},
        "reprob": {"type": _FRACTION, "help": "probability of random erasing"},
        "hflip": {"type": _FRACTION, "help": "probability of a horizontal flip"},
        "vflip": {"type": _FRACTION, "help": "probability of a vertical flip"},
        "train-crop-mode": {
            "choices": ("rrc", "rkrc", "rkrr"),
            "help": "random resized crop (rrc), or resize at the original aspect ratio with a centred or random crop (rkrc, rkrr)",
        },
        "scale": {
            "type": _number(0),
            "nargs": 2,
            "help": "smallest and largest area of random crops, as fractions of the image",
        },
        "ratio": {"type": _number(0), "nargs": 2, "help": "smallest and largest aspect ratio of random crops"},
        "train-interpolation": {"help": "interpolation of training images: random, bilinear or bicubic"},
        "sampling-rate": {"type": _ONE, "metavar": "N", "help": "stride between the sampled frames of a video"},
        "roll": {
            "action": argparse.BooleanOptionalAction,
            "help": "shift sounds cyclically in time, and scale their volume down, at random (AudioMAE)",
        },
        "timem": {
            "type": _COUNT,
            "metavar": "FRAMES",
            "help": "largest width of the time mask, in frames (SpecAugment)",
        },
        "freqm": {
            "type": _COUNT,
            "metavar": "BANDS",
            "help": "largest width of the frequency mask, in bands (SpecAugment)",
        },
        "crop-pct": {
            "type": _FRACTION,
            "help": "centre crop of validation, saved with the model (default: the model's own)",
        },
        "interpolation": {"help": "interpolation of validation, saved with the model (default: the model's own)"},
        "mean": {
            "type": float,
            "nargs": 3,
            "metavar": "M",
            "help": "mean of each channel for normalization (default: the model's own)",
        },
        "std": {
            "type": _number(1e-6),
            "nargs": 3,
            "metavar": "S",
            "help": "standard deviation of each channel (default: the model's own)",
        },
        "no-aug": {"action": argparse.BooleanOptionalAction, "help": "turn all augmentation off"},
        "aug-repeats": {"type": _ONE, "help": "augmented copies of each image (repeated augmentation)"},
        "mixup": {"type": _POSITIVE, "help": "alpha of mixup; 0 turns it off"},
        "cutmix": {"type": _POSITIVE, "help": "alpha of cutmix; 0 turns it off"},
        "mixup-prob": {"type": _FRACTION, "help": "probability of applying mixup or cutmix to a batch"},
        "mixup-switch-prob": {"type": _FRACTION, "help": "probability of cutmix instead of mixup if both are on"},
        "mixup-off-epoch": {
            "type": _COUNT,
            "metavar": "N",
            "help": "epoch from which mixup and cutmix are off; 0 keeps them on",
        },
    },
    "optimisation": {
        "epochs": {"type": _ONE, "metavar": "N", "help": "number of epochs"},
        "opt": {"help": "optimizer, by its name in timm"},
        "lr": {"type": _POSITIVE, "help": "peak learning rate (default: --lr-base × global batch / --lr-base-size)"},
        "lr-base": {"type": _POSITIVE, "help": "learning rate at a global batch size of --lr-base-size"},
        "lr-base-size": {"type": _ONE, "help": "global batch size that --lr-base refers to"},
        "weight-decay": {"type": _POSITIVE, "help": "weight decay"},
        "layer-decay": {
            "type": _FRACTION,
            "help": "layer-wise learning rate decay: factor from each block to the previous one",
        },
        "momentum": {"type": _FRACTION, "help": "momentum, for optimizers that use it"},
        "clip-grad": {"type": _POSITIVE, "help": "norm that gradients are clipped to"},
        "sched": {
            "choices": ("cosine", "tanh", "step", "poly", "constant", "none"),
            "help": "learning rate schedule, by its name in timm",
        },
        "warmup-epochs": {"type": _COUNT, "metavar": "N", "help": "epochs of learning rate warm-up"},
        "warmup-lr": {"type": _POSITIVE, "help": "learning rate at the start of the warm-up"},
        "min-lr": {"type": _POSITIVE, "help": "learning rate at the end of the schedule"},
        "smoothing": {"type": _FRACTION, "help": "label smoothing"},
        "bce-loss": {
            "action": argparse.BooleanOptionalAction,
            "help": "use binary cross-entropy instead of softmax cross-entropy",
        },
        "drop": {"type": _FRACTION, "help": "dropout rate"},
        "drop-path": {"type": _FRACTION, "help": "stochastic depth rate"},
        "model-ema": {
            "action": argparse.BooleanOptionalAction,
            "help": "keep an exponential moving average of the weights, and evaluate it",
        },
        "model-ema-decay": {"type": _FRACTION, "help": "decay of the moving average"},
        "model-ema-warmup": {
            "action": argparse.BooleanOptionalAction,
            "help": "increase the decay of the moving average from a low value at the start",
        },
        "grad-accum-steps": {
            "type": _ONE,
            "metavar": "N",
            "help": "forward and backward passes per update of the weights",
        },
        "seed": {"type": _COUNT, "help": "random seed; runs with equal seeds and flags draw the same random numbers"},
    },
    "computing": {
        "device": {"choices": ("auto", "cpu"), "help": "auto uses one GPU per process if there are GPUs"},
        "fsdp": {
            "action": argparse.BooleanOptionalAction,
            "help": "shard weights and optimizer state over the processes (FSDP2), for models too large for one GPU",
        },
        "amp": {"action": argparse.BooleanOptionalAction, "help": "train in mixed precision"},
        "amp-dtype": {"choices": ("float16", "bfloat16"), "help": "dtype of mixed precision"},
        "grad-checkpointing": {
            "action": argparse.BooleanOptionalAction,
            "help": "recompute activations in the backward pass: less memory, more time",
        },
        "compile": {"action": argparse.BooleanOptionalAction, "help": "run torch.compile on the model"},
        "model-kwargs": {"nargs": "+", "metavar": "NAME=VALUE", "help": "additional arguments of the timm model"},
    },
    "keeping": {
        "resume": {
            "metavar": "auto|DIR",
            "help": "resume from the newest complete checkpoint of the run (auto), or from checkpoint DIR",
        },
        "recovery-interval": {
            "type": _COUNT,
            "metavar": "N",
            "help": "updates between checkpoints within an epoch; 0 writes none",
        },
        "checkpoint-hist": {"type": _ONE, "metavar": "N", "help": "number of checkpoints to keep"},
        "log-interval": {"type": _ONE, "metavar": "N", "help": "updates between rows of metrics.jsonl"},
        "tensorboard": {"action": argparse.BooleanOptionalAction, "help": "write TensorBoard event files as well"},
    },
}


def with_config(command: argparse.ArgumentParser, config: str, typed: list[str]) -> argparse.Namespace:
    """Parse the flags of a config file and of the command line; the command line overrides the file.

    Args:
        command: parser of `tokenmerge train`.
        config: path of a YAML file, or name of a recipe.
        typed: the arguments after `train` on the command line.

    Raises:
        InputError: if the file cannot be read, or a name in it is not a flag.
    """
    known = {action.dest: action for action in command._actions if action.option_strings and action.dest != "help"}
    words: list[str] = []
    for name, value in _read(config).items():
        action = known.get(str(name).replace("-", "_"))
        if action is None:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see tokenmerge train --help"
            raise InputError(f"{config!r} sets {str(name)!r}, which is no flag of train: {hint}")
        words += _words(action, value)
    # --config between the two ends a list that the last flag of the file may take
    return command.parse_args([*words, f"--config={config}", *typed])


def _words(action: argparse.Action, value: Any) -> list[str]:
    """Return a value of the file as command-line arguments."""
    flag = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction | argparse._StoreTrueAction):
        return [flag] if value else ([f"--no-{flag[2:]}"] if isinstance(action, argparse.BooleanOptionalAction) else [])
    if value is None:
        return []
    if action.nargs == "+" and isinstance(value, dict):
        return [flag, *(f"{name}={one}" for name, one in value.items())]
    return [flag, *(str(entry) for entry in value)] if isinstance(value, list) else [f"{flag}={value}"]


def _read(config: str) -> dict[str, Any]:
    import yaml

    try:
        if config in recipes():
            text = (
                resources.files("tokenmerge.tools.train").joinpath(f"recipes/{config}.yaml").read_text(encoding="utf-8")
            )
        else:
            text = Path(config).read_text(encoding="utf-8")
        found = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the config {config!r} cannot be read ({reason}): give a YAML file or one of {', '.join(recipes())}"
        ) from None
    if not isinstance(found, dict):
        raise InputError(f"the config {config!r} holds no names and values: write lines such as 'epochs: 100'")
    return found


def train_args(args: argparse.Namespace, setting: Setting, merging: dict[str, Any]) -> Any:
    """Return `TrainArgs` from the parsed flags; flags that were not given keep their defaults.

    Raises:
        InputError: if `--data` or `--output` is missing.
    """
    from tokenmerge.tools.train.args import TrainArgs

    for name in ("data", "output"):
        if getattr(args, name) is None:
            raise InputError(f"no {name} folder was given, but train needs one: give --{name} DIR")
    names = {field.name for field in dataclasses.fields(TrainArgs)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    for name in ("scale", "ratio", "r_milestones", "mean", "std"):
        if name in given:
            given[name] = tuple(given[name])
    given["eval_r"] = tuple(parse_setting(text) for text in given.get("eval_r", ()))
    return TrainArgs(**{**given, "setting": setting, "merging": merging})


def model_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Return `--model-kwargs`, `--drop` and `--drop-path` as keyword arguments of a timm model.

    Raises:
        InputError: if an entry is not NAME=VALUE.
    """
    import yaml

    found: dict[str, Any] = {}
    for text in args.model_kwargs or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(
                f"--model-kwargs {text!r} is not understood, NAME=VALUE was expected: such as embed_dim=96"
            )
        found[name] = yaml.safe_load(value)
    rates = {"drop_rate": args.drop, "drop_path_rate": args.drop_path}
    return {**found, **{name: value for name, value in rates.items() if value is not None}}
