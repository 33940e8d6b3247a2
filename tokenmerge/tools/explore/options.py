"""Flags of `tokenmerge explore`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenmerge.flags import add_matcher, add_model, add_prop_attn, add_weights, count


def add_explore_options(command: argparse.ArgumentParser) -> None:
    """Add all flags of `tokenmerge explore`."""
    add_model(command)
    command.add_argument(
        "--r", default="8 16", metavar="R", help="initial settings, as in bench, in one argument (%(default)s)"
    )
    command.add_argument("--data", type=Path, metavar="DIR", help="folder of pictures that the page offers")
    add_prop_attn(command)
    add_matcher(command)
    add_weights(command)
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s, this machine only)")
    command.add_argument(
        "--port", type=count(0), default=8765, metavar="N", help="port to listen on; 0 takes a free one (%(default)s)"
    )
