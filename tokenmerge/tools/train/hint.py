"""The command that evaluates a trained model, to be pasted into a shell."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from tokenmerge.tools.media import VIDEOS, Medium
from tokenmerge.tools.train.data import labels_of, place_of
from tokenmerge.tools.train.options import TrainOptions


def evaluation(loading: Sequence[str], args: TrainOptions, medium: Medium) -> str:
    """Return the words of `tokenmerge eval` for the model of a run, quoted for a shell; its merging is saved with it.

    Args:
        loading: words that load the model.
        args: options of the run.
        medium: kind of the data.
    """
    words = ["tokenmerge", "eval", *loading]
    if args.dataset is None:
        words += ["--data", _path(place_of(args, args.val_split or args.train_split, "--val-split"))]
        if args.several:
            words += ["--labels", _path(labels_of(args, "--val-split" if args.val_split else "--train-split"))]
    else:
        words += ["--dataset", args.dataset, "--split", args.val_split or args.train_split]
        words += [] if args.data is None else ["--data", _path(args.data)]
    if medium.name == VIDEOS.name:  # models of videos do not keep these
        if args.sampling_rate != TrainOptions.sampling_rate:
            words += ["--sampling-rate", str(args.sampling_rate)]
        for name in ("crop_pct", "mean", "std"):
            value = getattr(args, name)
            if value is not None:
                words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def _path(path: Path) -> str:
    return f"./{path}" if str(path).startswith("-") else str(path)  # not an option
