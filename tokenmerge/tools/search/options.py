"""Flags of `tokenmerge search`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenmerge.flags import add_data, add_model, add_running, between, count


def add_search_options(command: argparse.ArgumentParser) -> None:
    """All of them."""
    add_model(command)
    add_data(command)
    command.add_argument(
        "--speedup", type=between(1, 100), default=2.0, help="wanted, measured on this device (%(default)s)"
    )
    command.add_argument("--trials", type=count(1), default=60, metavar="N", help="settings to try (%(default)s)")
    command.add_argument(
        "--storage",
        metavar="URL",
        help="where trials are kept, such as sqlite:///search.db: resume, or let several work on it",
    )
    command.add_argument(
        "--study", default="tokenmerge", metavar="NAME", help="of the trials in the storage (%(default)s)"
    )
    command.add_argument(
        "--output",
        type=Path,
        default=Path("tokenmerge.json"),
        metavar="FILE",
        help="for the config found (%(default)s)",
    )
    command.add_argument(
        "--calibration", type=count(1), default=256, metavar="N", help="images to judge by (%(default)s)"
    )
    command.add_argument(
        "--holdout", type=count(1), default=512, metavar="N", help="other images to check on (%(default)s)"
    )
    command.add_argument(
        "--rounds", type=count(1), default=3, metavar="N", help="of timing for each trial (%(default)s)"
    )
    command.add_argument(
        "--random",
        type=count(0),
        default=0,
        metavar="N",
        help="also try so many random schedules, everything else as the paper has it: its baseline (%(default)s)",
    )
    command.add_argument("--seed", type=count(0), default=0, help="of the search (%(default)s)")
    add_running(command, batch_size=32)
