"""Flags of `tokenmerge visualize`, and of what else looks at models."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenmerge.flags import add_merging, add_model, add_sampling_rate, add_weights
from tokenmerge.tracing import VIEWS


def add_visualize_options(command: argparse.ArgumentParser) -> None:
    """All of them."""
    add_model(command)
    command.add_argument(
        "inputs", metavar="FILE", nargs="+", type=Path, help="pictures; videos or sounds, for models that take those"
    )
    add_merging(command, ["8"])
    add_weights(command)
    command.add_argument(
        "--layer",
        default="all",
        metavar="all|last|N",
        help="all: the input and four blocks up to the last; last; or after N blocks (%(default)s)",
    )
    command.add_argument(
        "--view",
        choices=VIEWS,
        default="picture",
        help="every token in its mean colour, the picture with outlines of the tokens, a heat map of their sizes, or a colour "
        "for each token that stays the same from block to block (%(default)s)",
    )
    command.add_argument(
        "--out",
        "--output",
        "-o",
        type=Path,
        default=Path("tokenmerge.png"),
        metavar="FILE",
        help="a picture; .html is a page to explore; .mp4 or .gif is a film, of videos (%(default)s)",
    )
    add_sampling_rate(command)
