"""The flags of `tokenmerge train`, from the command line and from YAML files; named as timm's train.py names them."""

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
    """Names of the recipes that ship with the package."""
    folder = resources.files("tokenmerge.tools.train").joinpath("recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def add_train_options(command: argparse.ArgumentParser) -> None:
    """Everything but MODEL, merging and weights."""
    command.add_argument(
        "--config",
        "-c",
        metavar="FILE",
        help=f"YAML file with values for these flags, or a recipe: {', '.join(recipes())}; flags given here win",
    )
    command.add_argument(
        "--data",
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with train/CLASS/FILE and val/CLASS/FILE: images, sounds or videos",
    )
    command.add_argument("--output", type=Path, metavar="DIR", help="the run's folder")
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
        "r-warmup-epochs": {"type": _COUNT, "metavar": "N", "help": "epochs over which r grows from 0"},
        "r-milestones": {
            "type": _milestone,
            "nargs": "+",
            "metavar": "EPOCH=R",
            "help": "another R from these epochs on",
        },
        "eval-r": {"nargs": "+", "metavar": "R", "help": "evaluate at these R after every epoch (the training R)"},
        "distill-weight": {"type": _FRACTION, "help": "share in the loss of the starting model, unmerged, as teacher"},
        "distill-temp": {"type": _number(1e-3), "help": "temperature of its logits"},
    },
    "data": {
        "train-split": {"help": "folder of the training images in DIR"},
        "val-split": {"help": "folder of the validation images in DIR; '' trains without"},
        "batch-size": {"short": ("-b",), "type": _ONE, "help": "images per process and step"},
        "workers": {"short": ("-j",), "type": _COUNT, "help": "processes that decode images, per process"},
        "aa": {"metavar": "POLICY", "help": "automatic augmentation, such as rand-m9-mstd0.5-inc1"},
        "color-jitter": {"type": _POSITIVE, "help": "strength of colour jitter"},
        "reprob": {"type": _FRACTION, "help": "probability of random erasing"},
        "hflip": {"type": _FRACTION, "help": "probability of flipping left and right"},
        "vflip": {"type": _FRACTION, "help": "probability of flipping up and down"},
        "train-crop-mode": {
            "choices": ("rrc", "rkrc", "rkrr"),
            "help": "random resized crops, or the whole image resized (and padded) at its aspect ratio, centred or not",
        },
        "scale": {"type": _number(0), "nargs": 2, "help": "area of random crops"},
        "ratio": {"type": _number(0), "nargs": 2, "help": "aspect ratio of random crops"},
        "train-interpolation": {"help": "random, bilinear or bicubic"},
        "sampling-rate": {"type": _ONE, "metavar": "N", "help": "of videos, steps from frame to frame"},
        "roll": {
            "action": argparse.BooleanOptionalAction,
            "help": "turn sounds around in time, and make them softer (AudioMAE)",
        },
        "timem": {"type": _COUNT, "metavar": "FRAMES", "help": "widest mask over the frames of a sound (SpecAugment)"},
        "freqm": {"type": _COUNT, "metavar": "BANDS", "help": "widest mask over its bands (SpecAugment)"},
        "crop-pct": {"type": _FRACTION, "help": "centre crop of validation, kept with the model (the model's own)"},
        "interpolation": {"help": "of validation, likewise"},
        "mean": {"type": float, "nargs": 3, "metavar": "M", "help": "of the pixels' normalisation, likewise"},
        "std": {"type": _number(1e-6), "nargs": 3, "metavar": "S", "help": "of the pixels' normalisation, likewise"},
        "no-aug": {"action": argparse.BooleanOptionalAction, "help": "no augmentation at all"},
        "aug-repeats": {"type": _ONE, "help": "augmented copies of an image in a batch"},
        "mixup": {"type": _POSITIVE, "help": "alpha of mixup"},
        "cutmix": {"type": _POSITIVE, "help": "alpha of cutmix"},
        "mixup-prob": {"type": _FRACTION, "help": "probability of mixing a batch"},
        "mixup-switch-prob": {"type": _FRACTION, "help": "probability of cutmix where both are on"},
        "mixup-off-epoch": {"type": _COUNT, "metavar": "N", "help": "stop mixing at this epoch; 0 never"},
    },
    "optimisation": {
        "epochs": {"type": _ONE, "metavar": "N", "help": "epochs"},
        "opt": {"help": "timm's name of the optimizer"},
        "lr": {"type": _POSITIVE, "help": "peak learning rate; by default --lr-base × global batch / --lr-base-size"},
        "lr-base": {"type": _POSITIVE, "help": "learning rate at a global batch of --lr-base-size"},
        "lr-base-size": {"type": _ONE, "help": "see --lr-base"},
        "weight-decay": {"type": _POSITIVE, "help": "weight decay"},
        "layer-decay": {"type": _FRACTION, "help": "factor of the learning rate from each block to the one before"},
        "momentum": {"type": _FRACTION, "help": "momentum, for optimizers that have it"},
        "clip-grad": {"type": _POSITIVE, "help": "largest norm of the gradient"},
        "sched": {
            "choices": ("cosine", "tanh", "step", "poly", "constant", "none"),
            "help": "timm's schedule of learning rates",
        },
        "warmup-epochs": {"type": _COUNT, "metavar": "N", "help": "epochs over which the learning rate grows"},
        "warmup-lr": {"type": _POSITIVE, "help": "where it starts"},
        "min-lr": {"type": _POSITIVE, "help": "where it ends"},
        "smoothing": {"type": _FRACTION, "help": "label smoothing"},
        "bce-loss": {"action": argparse.BooleanOptionalAction, "help": "binary cross-entropy instead of softmax"},
        "drop": {"type": _FRACTION, "help": "dropout"},
        "drop-path": {"type": _FRACTION, "help": "stochastic depth"},
        "model-ema": {"action": argparse.BooleanOptionalAction, "help": "keep and evaluate a moving average"},
        "model-ema-decay": {"type": _FRACTION, "help": "its decay"},
        "model-ema-warmup": {"action": argparse.BooleanOptionalAction, "help": "let the decay grow"},
        "grad-accum-steps": {"type": _ONE, "metavar": "N", "help": "steps per update of the weights"},
        "seed": {"type": _COUNT, "help": "everything random is a function of it"},
    },
    "computing": {
        "device": {"choices": ("auto", "cpu"), "help": "auto is a GPU per process if there is one"},
        "fsdp": {
            "action": argparse.BooleanOptionalAction,
            "help": "share weights and optimizer state among the processes (FSDP2), for models that one cannot hold",
        },
        "amp": {"action": argparse.BooleanOptionalAction, "help": "mixed precision"},
        "amp-dtype": {"choices": ("float16", "bfloat16"), "help": "its dtype"},
        "grad-checkpointing": {"action": argparse.BooleanOptionalAction, "help": "less memory, more time"},
        "compile": {"action": argparse.BooleanOptionalAction, "help": "torch.compile the model"},
        "model-kwargs": {"nargs": "+", "metavar": "NAME=VALUE", "help": "further arguments of timm's model"},
    },
    "keeping": {
        "resume": {"metavar": "auto|DIR", "help": "go on from the run's newest whole checkpoint, or from this one"},
        "recovery-interval": {
            "type": _COUNT,
            "metavar": "N",
            "help": "updates between checkpoints inside an epoch; 0: none",
        },
        "checkpoint-hist": {"type": _ONE, "metavar": "N", "help": "how many checkpoints are kept"},
        "log-interval": {"type": _ONE, "metavar": "N", "help": "updates between rows of metrics.jsonl"},
        "tensorboard": {"action": argparse.BooleanOptionalAction, "help": "write TensorBoard's events as well"},
    },
}


def with_config(command: argparse.ArgumentParser, config: str, typed: list[str]) -> argparse.Namespace:
    """The flags of a config file, then those that were typed, which win.

    Args:
        command: parser of `tokenmerge train`.
        config: file or recipe.
        typed: what followed `train` on the command line.

    Raises:
        InputError: if the file cannot be read, or holds what is no flag.
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
    # the flag between them ends a list that the file may end with
    return command.parse_args([*words, f"--config={config}", *typed])


def _words(action: argparse.Action, value: Any) -> list[str]:
    """A value of the file as it would be typed."""
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
    """What was given, as `TrainArgs`; everything else keeps its default.

    Raises:
        InputError: if data or output are missing.
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
    """`--model-kwargs`, `--drop` and `--drop-path` as timm's models take them.

    Raises:
        InputError: if one is not NAME=VALUE.
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
