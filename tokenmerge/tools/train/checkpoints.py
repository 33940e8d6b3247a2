"""Atomic checkpoints: each is written to a temporary folder, hashed and renamed; the newest intact one is resumed.

Accelerate writes model, optimizer, gradient scaler, averaged weights and random generators; this module makes it safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenmerge.tools.train.args import TrainingError

_MANIFEST = "manifest.json"
_UNFINISHED = ".writing-"


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
        return sorted(self.folder.glob("update-*"), reverse=True)

    def save(self, accelerator: Any, progress: dict[str, Any]) -> Path:
        """Write the state of all processes, named after the number of updates; all processes must call it.

        Raises:
            TrainingError: if it cannot be written; earlier checkpoints are then kept.
        """
        target = self.folder / f"update-{progress['update']:09d}"
        beside = self.folder / f"{_UNFINISHED}{target.name}"
        try:
            if accelerator.is_main_process:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(beside))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (beside / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
                _seal(beside)
                if target.exists():  # a resumed run may save the same update again
                    shutil.rmtree(target)
                os.replace(beside, target)
                _sync(self.folder)
                for old in self.all()[self.kept :]:
                    shutil.rmtree(old, ignore_errors=True)
        except Exception as error:  # torch and safetensors raise their own types for a full disk
            shutil.rmtree(beside, ignore_errors=True)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            last = f"{self.all()[0].name} is still whole" if self.all() else "there is none before it"
            raise TrainingError(
                f"the checkpoint of update {progress['update']} cannot be written to {str(self.folder)!r} ({reason}); {last}: "
                "make room and go on with --resume auto"
            ) from None
        accelerator.wait_for_everyone()
        return target

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
            self.warn(f"the checkpoint {str(path)!r} is damaged ({problem}), the one before it is tried")
        if not candidates:
            return None
        raise TrainingError(
            f"none of the {len(candidates)} checkpoints is whole, the newest is {str(candidates[0])!r}: give another "
            "--resume, or start again in another --output"
        )

    def clean(self) -> None:
        """Remove unfinished checkpoints of a killed run."""
        for path in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)


def damage(path: Path) -> str | None:
    """Return how a checkpoint is damaged; `None` if every file has its recorded hash."""
    try:
        files = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        wrong = next((name for name, digest in files.items() if _hash(path / name) != digest), None)
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None if wrong is None else f"{wrong} has changed"


def progress_of(path: Path) -> dict[str, Any]:
    """Return the progress that was given to `save`."""
    found: dict[str, Any] = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    return found


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    manifest = {str(path.relative_to(folder)): _hash(path) for path in files}
    write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=1))
    _sync(folder)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system supports it
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
