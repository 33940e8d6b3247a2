"""Atomic checkpoints: each is written to a temporary folder, hashed and renamed; the newest intact one is resumed.

`state.RunState` writes and reads what they hold, as safetensors and JSON: nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenmerge.errors import InputError, shown
from tokenmerge.files import plain_file, read_json, sync, words_of, write_json
from tokenmerge.tools.processes import agree
from tokenmerge.tools.train.options import TrainingError
from tokenmerge.tools.train.state import FILES, RunState

_MANIFEST, _PROGRESS = "manifest.json", "progress.json"
_UNFINISHED = ".writing-"
_NEEDED = {_PROGRESS, *FILES}
_OPTIONAL = {"average.safetensors"}
_PICKLED = re.compile(r".*\.(bin|pkl|pt|pth)")
"""Files of the earlier format, which held pickles."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: folder of the checkpoints.
        keep: number of checkpoints to keep.
        warn: function that is called with a sentence for each damaged checkpoint.
    """

    def __init__(self, folder: Path, keep: int, warn: Callable[[str], None]) -> None:
        self.folder, self.kept, self.warn = folder, keep, warn

    def all(self) -> list[Path]:
        """Return the finished checkpoints, newest first."""
        found = {path: re.fullmatch(r"update-(\d{9,18})", path.name) for path in self.folder.glob("update-*")}
        numbers = {path: int(match[1]) for path, match in found.items() if match is not None}
        return sorted(numbers, key=numbers.__getitem__, reverse=True)

    def save(self, state: RunState, progress: dict[str, Any], is_main: bool = True) -> Path:
        """Write the state of all processes, named after the number of updates; all processes must call it.

        Args:
            state: the state.
            progress: numbers to keep with it, such as `update`.
            is_main: whether this process writes.

        Raises:
            TrainingError: if it cannot be written; earlier checkpoints are then kept.
        """
        target = self.folder / f"update-{progress['update']:09d}"
        write = state.collect()
        with agree(TrainingError):
            if is_main:
                self._write(target, write, progress)
        return target

    def _write(self, target: Path, write: Callable[[Path], None], progress: dict[str, Any]) -> None:
        beside = self.folder / f"{_UNFINISHED}{target.name}"
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            write(beside)
            write_json(beside / _PROGRESS, progress, "the progress")
            _seal(beside)
            if target.exists():  # a resumed run may save the same update again
                before = self.folder / f"{_UNFINISHED}before-{target.name}"
                shutil.rmtree(before, ignore_errors=True)
                os.replace(target, before)
            os.replace(beside, target)
            sync(self.folder)
            self.clean()
            for old in self.all()[self.kept :]:
                shutil.rmtree(old, ignore_errors=True)
        except Exception as error:  # torch and safetensors raise their own types for a full disk
            last = f"{self.all()[0].name} is still whole" if self.all() else "there is none before it"
            raise TrainingError(
                f"the checkpoint of update {progress['update']} cannot be written to {shown(str(self.folder))} "
                f"({words_of(error)}); {last}: make room and go on with --resume auto"
            ) from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def latest(self, resume: str) -> Path | None:
        """Return the newest intact checkpoint for "auto" (`None` if the run has none), or the checkpoint at a path.

        Raises:
            TrainingError: if there are checkpoints, but none is intact.
        """
        candidates = self.all() if resume == "auto" else [Path(resume)]
        for path in candidates:
            problem = damage(path)
            if problem is None:
                return path
            self.warn(f"the checkpoint {shown(str(path))} is damaged ({problem})")
        if not candidates:
            return None
        raise TrainingError(
            f"none of the {len(candidates)} checkpoints is whole, the newest is {shown(str(candidates[0]))}: give another "
            "--resume, or start again in another --output"
        )

    def clean(self) -> None:
        """Remove unfinished checkpoints of a killed run."""
        for path in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)


def damage(path: Path) -> str | None:
    """Return how a checkpoint is damaged; `None` if it holds the expected files, and each has its recorded hash.

    Files that the manifest does not name are ignored.
    """
    try:
        files = read_json(path / _MANIFEST, "the manifest")
        if not isinstance(files, dict):
            return "its manifest holds no names"
        odd = [name for name in files if name not in _NEEDED]
        if any(_PICKLED.fullmatch(name) for name in odd):
            return "it was written by an older version, as pickles, which are not loaded because they can run code"
        if odd:
            return f"its manifest names {shown(odd[0])}, which is no part of a checkpoint"
        missing = sorted(_NEEDED - _OPTIONAL - set(files))
        if missing:
            return f"its manifest does not name {missing[0]}"
        wrong = next((name for name, digest in files.items() if _hash(path / name) != digest), None)
    except (InputError, OSError) as error:
        return words_of(error)
    return None if wrong is None else f"{wrong} has changed"


def progress_of(path: Path) -> dict[str, Any]:
    """Return the progress that was given to `save`.

    Raises:
        TrainingError: if it holds no number of updates and processes.
    """
    try:
        found = read_json(path / _PROGRESS, "the progress")
    except InputError as error:
        raise TrainingError(str(error)) from None
    numbers = [found.get(name) if isinstance(found, dict) else None for name in ("update", "processes")]
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise TrainingError(
            f"the progress {shown(str(path / _PROGRESS))} is {shown(found)}, but numbers of updates and processes were "
            "expected: give another --resume"
        )
    return dict(found)


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    write_json(folder / _MANIFEST, {path.name: _hash(path) for path in files}, "the manifest")


def _hash(path: Path) -> str:
    with plain_file(path, "the file").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
