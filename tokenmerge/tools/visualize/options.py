"""Flags of `tokenmerge visualize`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenmerge.flags import add_merging, add_model, add_sampling_rate, add_weights
from tokenmerge.tracing import VIEWS


def add_visualize_options(command: argparse.ArgumentParser) -> None:
    """Add all flags of `tokenmerge visualize`."""
    add_model(command)
    command.add_argument(
        "inputs",
        metavar="FILE",
        nargs="+",
        type=Path,
        help="pictures to show, or videos or sounds for models that take them",
    )
    add_merging(command, ["8"])
    add_weights(command)
    command.add_argument(
        "--layer",
        default="all",
        metavar="all|last|N",
        help="blocks to show: all (the input and four blocks up to the last), last, or after N blocks (%(default)s)",
    )
    command.add_argument(
        "--view",
        choices=VIEWS,
        default="picture",
        help="how tokens are drawn: in their mean colour, as outlines on the picture, as a heat map of their sizes, or in one "
        "colour per token that stays the same in all blocks (%(default)s)",
    )
    command.add_argument(
        "--out",
        "--output",
        "-o",
        type=Path,
        default=Path("tokenmerge.png"),
        metavar="FILE",
        help="file to write: a picture, an interactive page (.html), or a film of videos (.mp4, .gif) (%(default)s)",
    )
    add_sampling_rate(command)
