"""Flags that several commands share."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

from tokenmerge.config import FIELDS, PRESETS, choices_of, help_of
from tokenmerge.matching import matcher_names

_R_HELP = (
    "tokens merged per block, as one or more of: 8 (constant r), 16:-1 (r:inflect, decreasing linearly to 0), 8,8,0 (one value per "
    "block), keep=0.9 (fraction of tokens kept per block), flops=0.5 (fraction of the unmerged FLOPs), speedup=2 (same as flops=0.5), "
    "or a config file ending in .json; 0 runs the unpatched model"
)
_MODEL_HELP = (
    "timm model name, local-dir:PATH (folder in timm's hub format) or hf_hub:ID (downloads from the hub); for transformers hf:ID, "
    "hf:FOLDER or hf:TYPE, such as hf:videomae; torchvision:NAME; open_clip:NAME or open_clip:NAME:TAG"
)


def add_command(
    commands: Any, name: str, run: Any, text: str, rows: bool = True, page: bool = True
) -> argparse.ArgumentParser:
    """Add a subparser for one command.

    Args:
        commands: the object that `add_subparsers` returned.
        name: name of the command.
        run: function that runs the command on the parsed arguments and returns the exit code.
        text: help text, a fragment without a full stop.
        rows: whether the command writes rows, and therefore has `--json`.
        page: whether the rows can be written as an HTML page with `--html`.
    """
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    command.set_defaults(run=run)
    if rows:
        command.add_argument(
            "--json", metavar="FILE", help="write the result rows as a JSON list; - writes to standard output"
        )
    if rows and page:
        command.add_argument(
            "--html", metavar="FILE", help="write an HTML page with tables, figures and the result rows"
        )
    return command


def add_model(command: argparse.ArgumentParser) -> None:
    """Add MODEL, `--num-classes` and `--img-size`."""
    command.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    command.add_argument(
        "--num-classes", type=count(0), help="number of classes of the head (default: the model's own)"
    )
    command.add_argument("--img-size", type=count(1), help="side of the image in pixels (default: the model's own)")


def add_merging(
    command: argparse.ArgumentParser, default: list[str] | None, backend: bool = True, required: bool = True
) -> None:
    """Add `--r`, `--prop-attn` and the flags of matching."""
    command.add_argument(
        "--r",
        nargs="+",
        action="extend",  # "--r 8 --r 16" means "--r 8 16"
        required=required and default is None,
        metavar="R",
        help=_R_HELP + (f" (default: {' '.join(default)})" if default else ""),
    )
    command.set_defaults(default_r=default)
    add_prop_attn(command)
    add_matcher(command, backend)


def add_prop_attn(command: argparse.ArgumentParser) -> None:
    """Add `--prop-attn`."""
    command.add_argument(
        "--prop-attn",
        choices=("auto", "on", "off"),
        default="auto",
        help=f"{help_of('prop_attn')} (%(default)s)",
    )


def add_matcher(command: argparse.ArgumentParser, backend: bool = True) -> None:
    """Add `--preset`, the flags of matching, `--plugin` and, with `backend`, the flags that select implementations."""
    command.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="named set of values for the flags below; flags that are given override it",
    )
    command.add_argument("--matcher", help=f"matching algorithm: {', '.join(matcher_names())} (bipartite)")
    command.add_argument(
        "--option",
        nargs="+",
        action="extend",
        metavar="NAME=VALUE",
        help="additional arguments of the matcher, such as iterations=5",
    )
    for name, field in FIELDS.items():
        if field.metadata["group"] == "matching" and choices_of(name):
            command.add_argument(f"--{name}", choices=choices_of(name), help=f"{help_of(name)} ({field.default})")
    command.add_argument(
        "--plugin",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="Python file to import first, which registers custom matchers or methods",
    )
    if not backend:
        return
    for name, field in FIELDS.items():
        if field.metadata["group"] == "running":
            text = f"{help_of(name)} (%(default)s)"
            command.add_argument(f"--{name}", choices=choices_of(name), default=field.default, help=text)


def add_tuning(command: argparse.ArgumentParser, measures: str) -> None:
    """Add `--tune`, `--tune-schedule` and `--tuning`.

    Args:
        command: the command.
        measures: the measured passes, for the help text.
    """
    command.add_argument(
        "--tune",
        action="store_true",
        help=f"first choose the implementation of attention and the backend that are fastest here, by measuring {measures}",
    )
    command.add_argument(
        "--tune-schedule",
        action="store_true",
        help="also choose where to merge as many tokens (every block, or every 2nd, 3rd or 4th), and not to merge if that is not "
        "at least 2 %% faster than the unmerged model",
    )
    command.add_argument(
        "--tuning",
        type=Path,
        metavar="FILE",
        help="record of the tuning: used instead of measuring if the file exists, and written otherwise",
    )


def add_data(command: argparse.ArgumentParser, holds: str = "images", decodes: str = " files") -> None:
    """Add `--data` and `--workers`."""
    command.add_argument(
        "--data",
        "--data-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help=f"folder with one subfolder of {holds} per class",
    )
    command.add_argument(
        "--workers",
        "-j",
        type=count(0),
        default=min(2, os.cpu_count() or 1),
        help=f"processes that decode{decodes} (%(default)s)",
    )


def add_sampling_rate(command: argparse.ArgumentParser) -> None:
    """Add `--sampling-rate`."""
    command.add_argument(
        "--sampling-rate",
        type=count(1),
        default=4,
        metavar="N",
        help="stride between the sampled frames of a video (%(default)s)",
    )


def add_running(command: argparse.ArgumentParser, batch_size: int) -> None:
    """Add the flags of weights and device, and `--batch-size`."""
    add_weights(command)
    command.add_argument(
        "--batch-size", "-b", type=count(1), default=batch_size, help="images per forward pass (%(default)s)"
    )


def add_pretrained(command: argparse.ArgumentParser) -> None:
    """Add `--pretrained` and `--checkpoint`."""
    command.add_argument(
        "--pretrained",
        action="store_true",
        help="load the pretrained weights of MODEL, which may download them (default: random weights)",
    )
    command.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="load weights from a safetensors or torch file instead of pretrained ones",
    )


def add_weights(command: argparse.ArgumentParser) -> None:
    """Add the flags of weights, device, dtype and memory format."""
    add_pretrained(command)
    command.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of weights and inputs (%(default)s)",
    )
    command.add_argument("--channels-last", action="store_true", help="use the channels-last memory format")


def count(least: int) -> Any:
    """Return an argparse type for whole numbers of at least `least`."""

    def count(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r:.60} given, a whole number of at least {least} expected")
        return value

    return count


def between(low: float, high: float) -> Any:
    """Return an argparse type for numbers above `low` and up to `high`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low < value <= high:
            raise argparse.ArgumentTypeError(f"{text!r:.60} given, a number above {low:g} and up to {high:g} expected")
        return value

    return number
