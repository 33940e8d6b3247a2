"""The flags `--tune`, `--tune-schedule` and `--tuning`: tune a patched model before a command measures or writes it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenmerge.errors import InputError
from tokenmerge.patching import Handle
from tokenmerge.patching.tuning import Tuning
from tokenmerge.tools.settings import Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneArgs:
    """What to tune.

    Attributes:
        tune: whether to choose form of attention and backend.
        schedule: whether to choose where and whether to merge, too.
        file: file of the record: it is used if it exists, and written otherwise; `None` for neither.
    """

    tune: bool = False
    schedule: bool = False
    file: Path | None = None

    @property
    def asked(self) -> bool:
        """Whether to tune at all."""
        return self.tune or self.schedule or self.file is not None

    def check(self, settings: Sequence[Setting], compiled: bool = False) -> None:
        """Raise `InputError` if the flags do not fit the settings of `--r`, or a compiled model."""
        merging = [setting for setting in settings if not setting.is_baseline]
        if self.file is not None and len(merging) != 1:
            raise InputError(
                f"--tuning {str(self.file)!r} holds one tuning, but {len(merging)} settings of --r merge: give one of them, or no --tuning"
            )
        if self.file is not None and not _can_be_file(self.file):
            raise InputError(f"--tuning {str(self.file)!r} cannot be written: give a file in a folder that exists")
        if self.asked and compiled:
            raise InputError(
                "--tune measures models that are not compiled, but --compile was given: leave one of them out"
            )


def _can_be_file(path: Path) -> bool:
    try:
        return not path.is_dir() and path.resolve().parent.is_dir()
    except (OSError, ValueError):  # a name that is too long
        return False


NO_TUNING = TuneArgs()


def tune_args(args: argparse.Namespace) -> TuneArgs:
    """Return what the flags ask for."""
    return TuneArgs(tune=args.tune, schedule=args.tune_schedule, file=args.tuning)


def tune(
    model: Any, handle: Handle, images: Any, wanted: TuneArgs, label: str, say: Callable[[str], Any]
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
    if not wanted.asked:
        return None
    known = wanted.file is not None and wanted.file.is_file()
    # more rounds than by default: what a command prints should not change from run to run
    found = handle.tune(
        images, schedule=wanted.schedule, load=wanted.file if known else None, rounds=11, call=None if known else model
    )
    if wanted.file is not None and not known:
        found.save(wanted.file)
    where = f", from {wanted.file}" if known else f", written to {wanted.file}" if wanted.file is not None else ""
    say(f"{label}: {found.words}{where}")
    return found
