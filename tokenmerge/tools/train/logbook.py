"""Records of a run: run.json, metrics.jsonl, curves.png, report.html and TensorBoard events."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import tokenmerge
from tokenmerge.errors import InputError
from tokenmerge.tools.pages import Table, write_report
from tokenmerge.tools.pages.figures import svg
from tokenmerge.tools.report import Row
from tokenmerge.tools.train.checkpoints import write_atomically
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
        self._events: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError(
                    "tensorboard is not installed, but --tensorboard needs it: pip install 'tokenmerge[train]'"
                ) from None
            self._events = SummaryWriter(str(folder / "tensorboard"))

    def start(self, about: dict[str, Any], update: int) -> None:
        """Write run.json, and remove the rows after `update`, which the resumed run writes again."""
        write_atomically(self.folder / "run.json", json.dumps({**about, **versions()}, indent=2) + "\n")
        rows = [row for row in self.rows() if row["update"] <= update] if update else []
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def rows(self) -> list[Row]:
        """Return all complete rows written so far."""
        if not self.path.is_file():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # the last line of a run that was killed
                break
        return rows

    def add(self, row: Row) -> None:
        """Append a row, which has a `kind` ("train" or "eval"), `update` and `epoch`."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._events is not None:
            prefix = row["kind"] + (f"/r={row['r']}" if "r" in row else "")
            for name, value in row.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{prefix}/{name}", value, row["update"])
            self._events.flush()

    def draw(self) -> None:
        """Write the curves of loss and accuracy to curves.png, and all results to report.html."""
        rows = self.rows()
        figure = curves(rows)
        figure.savefig(self.folder / "curves.png", dpi=120)
        about = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        scores = [row for row in rows if row["kind"] == "eval"]
        columns = [name for name in _COLUMNS if any(name in row for row in scores)]
        table = Table("evaluations", columns, [[_cell(row.get(name)) for name in columns] for row in scores])
        asked = Table("asked for", ["name", "value"], [[name, str(value)] for name, value in about["args"].items()])
        lead = [f"{about['data']['images']} images of {about['data']['classes']} classes, commit {about['commit']}."]
        title = f"training {about['model']['model']}"
        write_report(self.folder / "report.html", title, lead, [table, asked], [svg(figure)], rows)


_COLUMNS = ("epoch", "update", "r", "top1", "top5", "gflops", "images")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def curves(rows: Sequence[Row]) -> Any:
    """Return a figure of loss and accuracy over epochs."""
    import matplotlib as mpl

    figure = new_figure(8, 3)
    left, right = figure.subplots(1, 2)
    train = [row for row in rows if row["kind"] == "train"]
    left.plot([row["epoch"] for row in train], [row["loss"] for row in train], color="#0072b2")
    left.set(xlabel="epoch", ylabel="training loss")
    scores = [row for row in rows if row["kind"] == "eval"]
    settings = list(dict.fromkeys(row["r"] for row in scores))
    for number, r in enumerate(settings):
        points = [row for row in scores if row["r"] == r]
        shade = mpl.colormaps["viridis"](number / max(1, len(settings) - 1) * 0.85)
        epochs, top1 = [row["epoch"] for row in points], [row["top1"] for row in points]
        right.plot(epochs, top1, "o-", ms=3, color=shade, label=f"r={r}")
    right.set(xlabel="epoch", ylabel="top-1 in %")
    if settings:
        right.legend(frameon=False)
    for axes in (left, right):
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
