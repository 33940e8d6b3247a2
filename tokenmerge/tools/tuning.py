"""The flags `--tune`, `--tune-schedule` and `--tuning`: tune a patched model before a command measures or writes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from tokenmerge.errors import InputError
from tokenmerge.files import check_writable
from tokenmerge.patching import Handle
from tokenmerge.patching.tuning import Tuning
from tokenmerge.tools.common import TuneOptions
from tokenmerge.tools.settings import Setting


def check_tuning(options: TuneOptions, settings: Sequence[Setting], compiled: bool = False) -> None:
    """Raise `InputError` if the options of tuning do not fit the settings of `--r`, or a compiled model."""
    merging = [setting for setting in settings if not setting.is_baseline]
    if options.tuning is not None and len(merging) != 1:
        raise InputError(
            f"--tuning {str(options.tuning)!r} holds one tuning, but {len(merging)} settings of --r merge: give one of them, or no --tuning"
        )
    if options.tuning is not None:
        check_writable(options.tuning, "--tuning", "tuning.json")
    if is_asked(options) and compiled:
        raise InputError("--tune measures models that are not compiled, but --compile was given: leave one of them out")


def is_asked(options: TuneOptions) -> bool:
    """Return whether to tune at all."""
    return options.tune or options.tune_schedule or options.tuning is not None


def tune(
    model: Any, handle: Handle, images: Any, wanted: TuneOptions, label: str, say: Callable[[str], Any]
) -> Tuning | None:
    """Tune a patched model on a batch as the flags ask, say what was chosen, and return the record.

    Args:
        model: the model that is timed.
        handle: handle of the patched model in it.
        images: a batch.
        wanted: what to tune.
        label: name of the setting.
        say: function that prints a line.
    """
    if not is_asked(wanted):
        return None
    known = wanted.tuning is not None and os.path.isfile(wanted.tuning)
    # more rounds than by default: what a command prints should not change from run to run
    found = handle.tune(
        images,
        schedule=wanted.tune_schedule,
        load=wanted.tuning if known else None,
        rounds=11,
        call=None if known else model,
    )
    if wanted.tuning is not None and not known:
        found.save(wanted.tuning)
    where = f", from {wanted.tuning}" if known else f", written to {wanted.tuning}" if wanted.tuning is not None else ""
    say(f"{label}: {found.words}{where}")
    return found
