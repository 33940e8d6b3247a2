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
    "tokens merged per block, one or more of: 8 (in every block), 16:-1 (r:inflect, falling to 0), 8,8,0 (one per "
    "block), keep=0.9 (of the tokens, per block), flops=0.5 (of the unmerged FLOPs), speedup=2 (the same); 0 is the unpatched model"
)
_MODEL_HELP = (
    "timm model name, local-dir:PATH of a folder in timm's hub format, or hf_hub:ID (reads the hub); hf:ID, hf:FOLDER or "
    "hf:TYPE of transformers, such as hf:videomae; torchvision:NAME; open_clip:NAME or open_clip:NAME:TAG"
)


def add_command(
    commands: Any, name: str, run: Any, text: str, rows: bool = True, page: bool = True
) -> argparse.ArgumentParser:
    """A command, with what all of them have that give `rows`, and no `page` of their own."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    command.set_defaults(run=run)
    if rows:
        command.add_argument("--json", metavar="FILE", help="write the rows as a JSON list; - is standard output")
    if rows and page:
        command.add_argument("--html", metavar="FILE", help="write a page with tables, figures and the rows")
    return command


def add_model(command: argparse.ArgumentParser) -> None:
    """MODEL, and what changes its shape."""
    command.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    command.add_argument("--num-classes", type=count(0), help="classes of the head, if not the model's own")
    command.add_argument("--img-size", type=count(1), help="side of the image in pixels, if not the model's own")


def add_merging(
    command: argparse.ArgumentParser, default: list[str] | None, backend: bool = True, required: bool = True
) -> None:
    """`--r`, and how tokens are matched."""
    command.add_argument(
        "--r",
        nargs="+",
        action="extend",  # --r 8 --r 16 is --r 8 16
        required=required and default is None,
        metavar="R",
        help=_R_HELP + (f" (default: {' '.join(default)})" if default else ""),
    )
    command.set_defaults(default_r=default)
    add_prop_attn(command)
    add_matcher(command, backend)


def add_prop_attn(command: argparse.ArgumentParser) -> None:
    """`--prop-attn`."""
    command.add_argument(
        "--prop-attn",
        choices=("auto", "on", "off"),
        default="auto",
        help=f"{help_of('prop_attn')} (%(default)s)",
    )


def add_matcher(command: argparse.ArgumentParser, backend: bool = True) -> None:
    """`--matcher`, what it compares and how, and what runs it."""
    command.add_argument(
        "--preset", choices=sorted(PRESETS), help="a set of the following, which may change single ones"
    )
    command.add_argument("--matcher", help=f"matching algorithm, one of {', '.join(matcher_names())} (bipartite)")
    command.add_argument(
        "--option",
        nargs="+",
        action="extend",
        metavar="NAME=VALUE",
        help="further arguments of the matcher: iterations=5",
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
        help="Python file that registers matchers or methods of your own",
    )
    if not backend:
        return
    for name, field in FIELDS.items():
        if field.metadata["group"] == "running":
            text = f"{help_of(name)} (%(default)s)"
            command.add_argument(f"--{name}", choices=choices_of(name), default=field.default, help=text)


def add_data(command: argparse.ArgumentParser, holds: str = "images", decodes: str = "") -> None:
    """`--data` and the processes that decode it."""
    command.add_argument(
        "--data",
        "--data-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help=f"folder with one folder of {holds} per class",
    )
    command.add_argument(
        "--workers",
        "-j",
        type=count(0),
        default=min(2, os.cpu_count() or 1),
        help=f"processes that decode{decodes} (%(default)s)",
    )


def add_sampling_rate(command: argparse.ArgumentParser) -> None:
    """`--sampling-rate`."""
    command.add_argument(
        "--sampling-rate",
        type=count(1),
        default=4,
        metavar="N",
        help="of videos, steps from frame to frame (%(default)s)",
    )


def add_running(command: argparse.ArgumentParser, batch_size: int) -> None:
    """Weights, device and batch size."""
    add_weights(command)
    command.add_argument("--batch-size", "-b", type=count(1), default=batch_size, help="images per pass (%(default)s)")


def add_pretrained(command: argparse.ArgumentParser) -> None:
    """Which weights."""
    command.add_argument(
        "--pretrained",
        action="store_true",
        help="load the weights that MODEL stands for (may download); without it they are random",
    )
    command.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="load weights from a safetensors or torch file instead"
    )


def add_weights(command: argparse.ArgumentParser) -> None:
    """Which weights, and where they are."""
    add_pretrained(command)
    command.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="weights and images (%(default)s)",
    )
    command.add_argument("--channels-last", action="store_true", help="channels-last memory format")


def count(least: int) -> Any:
    """Type of whole numbers from `least` on."""

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
    """Type of numbers above `low` and up to `high`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low < value <= high:
            raise argparse.ArgumentTypeError(f"{text!r:.60} given, a number above {low:g} and up to {high:g} expected")
        return value

    return number
