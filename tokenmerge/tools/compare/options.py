"""Flags of `tokenmerge compare`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenmerge.errors import InputError
from tokenmerge.flags import add_data, add_merging, add_model, add_running, between, count
from tokenmerge.tools.compare.paper import EXPERIMENTS, get_experiment
from tokenmerge.tools.settings import Setting, parse_setting


def add_compare_options(command: argparse.ArgumentParser) -> None:
    """Add all flags of `tokenmerge compare`."""
    add_model(command)
    for action in command._actions:
        if action.dest == "model":
            action.nargs, action.required, action.default = "?", False, None
    add_data(command)
    command.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="NAME",
        help="methods and matchers to compare (default: all except slow references); tome always runs first, as the baseline "
        "of each setting",
    )
    command.add_argument(
        "--speedups",
        nargs="+",
        type=between(1, 100),
        default=[],
        metavar="X",
        help="measured speed-ups to compare at, instead of --r; each method uses the r that reaches them on this device",
    )
    command.add_argument("--paper", metavar="NAME", help=f"run an experiment of the paper: {', '.join(EXPERIMENTS)}")
    command.add_argument(
        "--output",
        type=Path,
        default=Path("compare"),
        metavar="DIR",
        help="folder to write the results to (%(default)s)",
    )
    command.add_argument("--limit", type=count(1), metavar="N", help="use only N images, evenly spaced in the data")
    command.add_argument(
        "--rounds", type=count(0), default=7, metavar="N", help="rounds of timing; 0 skips timing (%(default)s)"
    )
    add_merging(command, None, required=False)
    add_running(command, batch_size=32)


def compare_args(args: argparse.Namespace, settings: Sequence[Setting]) -> Any:
    """Return the arguments of `run_compare` from the parsed flags.

    Raises:
        InputError: if flags contradict each other, or neither `--r` nor `--speedups` nor `--paper` is given.
    """
    from tokenmerge.tools.compare.run import CompareArgs

    experiment = None if args.paper is None else get_experiment(args.paper)
    if experiment is not None and (args.methods or args.speedups):
        raise InputError("--paper has methods of its own: leave out --methods and --speedups")
    if settings and args.speedups:
        raise InputError("--r and --speedups were both given, but one of them says how much to merge: give one")
    if experiment is not None and not settings:
        settings = [parse_setting(text) for text in experiment.settings]
    if not settings and not args.speedups:
        raise InputError("nothing says how much to merge: give --r 8 16, or --speedups 1.5 2")
    if any(setting.is_baseline for setting in settings):
        settings = [setting for setting in settings if not setting.is_baseline]  # the unmerged model is always measured
    return CompareArgs(
        data=args.data,
        methods=args.methods,
        settings=settings,
        speedups=args.speedups,
        experiment=experiment,
        output=args.output,
        batch_size=args.batch_size,
        workers=args.workers,
        limit=args.limit,
        rounds=args.rounds,
    )
