"""Records of a run: run.json, metrics.jsonl, curves.png, report.html and TensorBoard events."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import platform
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import tokenmerge
from tokenmerge import files
from tokenmerge.errors import InputError, shown
from tokenmerge.tools.pages import Figure, Table, title_of, write_report
from tokenmerge.tools.pages.figures import Axis, captioned, lines
from tokenmerge.tools.pages.theme import COLOURS
from tokenmerge.tools.report import Row
from tokenmerge.tools.settings import title_of_label
from tokenmerge.tracing.figure import new_figure


class Logbook:
    """Writer of the records of a run, in the main process.

    Args:
        folder: folder of the run.
        tensorboard: whether to write TensorBoard event files as well.

    Raises:
        InputError: if TensorBoard is wanted but not installed.
    """

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self.folder, self.path = folder, folder / "metrics.jsonl"
        self._wanted = tensorboard
        self._events: Any = None
        self._about: dict[str, Any] = {}
        if tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise InputError(
                "tensorboard is not installed, but --tensorboard needs it: pip install 'tokenmerge[train]'"
            )

    def start(self, about: dict[str, Any], update: int) -> None:
        """Write run.json, and remove the rows after `update`, which the resumed run writes again.

        This is the first time that anything in the folder changes.

        Raises:
            InputError: if a file cannot be written, or metrics.jsonl is none.
        """
        rows = [row for row in self.rows() if row["update"] <= update] if update else []
        self._about = {**about, **versions()}
        files.write_json(self.folder / "run.json", self._about, "the record")
        files.write(self.path, "".join(json.dumps(row) + "\n" for row in rows), "the rows")
        if self._wanted:
            from torch.utils.tensorboard import SummaryWriter

            with _writing("the events", self.folder / "tensorboard"):
                self._events = SummaryWriter(
                    str(self.folder / "tensorboard"), purge_step=update + 1 if update else None
                )

    def start_log(self, said: Sequence[str], again: bool) -> None:
        """Begin train.log, or go on with it, with the lines that were said already.

        Raises:
            InputError: if it cannot be written.
        """
        text = "".join(f"{line}\n" for line in said)
        if again:
            files.append(self.log, text, "the log")
        else:
            files.write(self.log, text, "the log")

    def note(self, line: str) -> None:
        """Append a line to train.log.

        Raises:
            InputError: if it cannot be written.
        """
        files.append(self.log, f"{line}\n", "the log")

    @property
    def log(self) -> Path:
        """The file of all lines that the run said."""
        return self.folder / "train.log"

    def rows(self) -> list[Row]:
        """Return all complete rows written so far.

        Raises:
            InputError: if the file cannot be read, or holds something else.
        """
        if not self.path.exists():
            return []
        rows = []
        lines = files.read_text(self.path, "the rows", _MOST_ROWS).split("\n")
        for number, line in enumerate(lines[:-1]):  # a killed run may leave a part of a line at the end
            row = files.parse_json(line, f"line {number + 1} of the rows {shown(str(self.path))}")
            if not (
                isinstance(row, dict)
                and isinstance(row.get("update"), int)
                and any(name in row for name in _KINDS.get(str(row.get("kind")), ()))
            ):
                raise InputError(
                    f"line {number + 1} of the rows {shown(str(self.path))} is no row of a run: remove the line, or the file"
                )
            rows.append(row)
        return rows

    def add(self, row: Row) -> None:
        """Append a row, which has a `kind` ("train" or "eval"), `update` and `epoch`.

        Raises:
            InputError: if it cannot be written.
        """
        files.append(self.path, json.dumps(row, allow_nan=False) + "\n", "the rows")
        if self._events is None:
            return
        with _writing("the events", self.folder / "tensorboard"):
            prefix = row["kind"] + (f"/r={row['r']}" if "r" in row else "")
            for name, value in row.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{prefix}/{name}", value, row["update"])
            self._events.flush()

    def draw(self) -> None:
        """Write the curves of loss and accuracy to curves.png, and all results to report.html.

        Raises:
            InputError: if they cannot be written.
        """
        rows, about = self.rows(), self._about
        figure = curves(rows)
        with files.replacing(self.folder / "curves.png", "the curves") as beside:
            figure.savefig(beside, dpi=120)
        scores = [row for row in rows if row["kind"] == "eval"]
        columns = [name for name in _COLUMNS if any(name in row for row in scores)]
        table = Table(
            "Evaluations",
            [_COLUMNS[name] for name in columns],
            [[_cell(row.get(name)) for name in columns] for row in scores],
        )
        asked = Table("Options", ["name", "value"], [[n, str(v)] for n, v in about["args"].items()], folded=True)
        lead = [f"{about['data']['images']} images of {about['data']['classes']} classes, commit {about['commit']}."]
        title = f"training {title_of(about['args']['model'])}"
        write_report(self.folder / "report.html", title, lead, [table, asked], _figures(rows), rows)


_MOST_ROWS = 2**31
_MEASURES = {"top1": Axis("top1", "top-1, %", 0, 100, span=2), "map": Axis("map", "mAP, %", 0, 100, span=2)}
"""Axes of what an evaluation measures; of files with several labels mAP."""
_KINDS = {"train": ("loss",), "eval": tuple(_MEASURES)}
"""Kinds of rows, each with the entries of which it must have one."""
_COLUMNS = {
    "epoch": "epoch",
    "update": "update",
    "r": "r",
    "top1": "top-1",
    "top5": "top-5",
    "map": "mAP",
    "gflops": "GFLOPs",
    "images": "images",
}


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def _writing(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{what} {shown(str(path))} cannot be written ({files.words_of(error)}): make room, or leave out --tensorboard"
        ) from None


_EPOCH = Axis("epoch", "epoch", 0, whole=True)
_LOSS = Axis("loss", "training loss", 0)


def _measure(rows: Sequence[Row]) -> Axis:
    """Return the axis of what the evaluations measured."""
    return next((axis for key, axis in _MEASURES.items() if any(key in row for row in rows)), _MEASURES["top1"])


def _figures(rows: Sequence[Row]) -> list[Figure | None]:
    """Return the figures of the report."""
    scores = [{**row, "name": title_of_label(row["r"])} for row in rows if row["kind"] == "eval"]
    measure = _measure(scores)
    return [
        captioned(
            "Loss of the training updates.", lines([row for row in rows if row["kind"] == "train"], _EPOCH, _LOSS)
        ),
        captioned(
            f"{'mAP' if measure.column == 'map' else 'Top-1'} on the validation files after each epoch.",
            lines(scores, _EPOCH, measure, by="name"),
        ),
    ]


def curves(rows: Sequence[Row]) -> Any:
    """Return a figure of loss and accuracy over epochs."""
    figure = new_figure(8, 3)
    left, right = figure.subplots(1, 2)
    train = [row for row in rows if row["kind"] == "train"]
    left.plot([row["epoch"] for row in train], [row["loss"] for row in train], color=COLOURS[0])
    scores = [row for row in rows if row["kind"] == "eval"]
    measure = _measure(scores)
    for number, r in enumerate(dict.fromkeys(row["r"] for row in scores)):
        points = [row for row in scores if row["r"] == r]
        epochs, found = [row["epoch"] for row in points], [row[measure.column] for row in points]
        shade = COLOURS[number % len(COLOURS)]
        right.plot(epochs, found, "o-", ms=3, color=shade, label=title_of_label(r), clip_on=False)
    if scores:
        right.legend(frameon=False, fontsize=8)
    for axes, axis, points in ((left, _LOSS, train), (right, measure, scores)):
        axes.set(xlabel=_EPOCH.label, ylabel=axis.label)
        if points:
            axes.set_xlim(*_EPOCH.limits(points))
            axes.set_ylim(*axis.limits(points))
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def versions() -> dict[str, Any]:
    """Return the versions of the libraries, the processor, and the commit of the code in a git clone."""
    import accelerate
    import timm

    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(tokenmerge.__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        commit = done.stdout.strip() or None
    except OSError:
        commit = None
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "tokenmerge": tokenmerge.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
        "processor": gpu or platform.processor() or platform.machine(),
        "commit": commit,
    }
