"""Flags of `tokenmerge search`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenmerge.flags import add_data, add_model, add_running, between, count


def add_search_options(command: argparse.ArgumentParser) -> None:
    """Add all flags of `tokenmerge search`."""
    add_model(command)
    add_data(command)
    command.add_argument(
        "--speedup", type=between(1, 100), default=2.0, help="target speed-up, measured on this device (%(default)s)"
    )
    command.add_argument(
        "--trials", type=count(1), default=60, metavar="N", help="number of settings to try (%(default)s)"
    )
    command.add_argument(
        "--storage",
        metavar="URL",
        help="database of the trials, such as sqlite:///search.db, to resume a search or share it between processes",
    )
    command.add_argument(
        "--study", default="tokenmerge", metavar="NAME", help="name of the study in the storage (%(default)s)"
    )
    command.add_argument(
        "--output",
        type=Path,
        default=Path("tokenmerge.json"),
        metavar="FILE",
        help="file to write the best config to (%(default)s)",
    )
    command.add_argument(
        "--calibration",
        type=count(1),
        default=256,
        metavar="N",
        help="number of images that trials are scored on (%(default)s)",
    )
    command.add_argument(
        "--holdout",
        type=count(1),
        default=512,
        metavar="N",
        help="number of held-out images that the result is checked on (%(default)s)",
    )
    command.add_argument(
        "--rounds", type=count(1), default=3, metavar="N", help="rounds of timing for each trial (%(default)s)"
    )
    command.add_argument(
        "--random",
        type=count(0),
        default=0,
        metavar="N",
        help="number of random schedules to try as well, with the other settings of the paper, as its baseline (%(default)s)",
    )
    command.add_argument("--seed", type=count(0), default=0, help="random seed of the search (%(default)s)")
    add_running(command, batch_size=32)
