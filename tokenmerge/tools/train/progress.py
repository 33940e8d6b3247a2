"""Progress bars of a run: epochs, and updates with loss, speed, remaining time and memory."""

from __future__ import annotations

import contextlib
from types import TracebackType

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tokenmerge.tools.report import Bars, Report


class TrainProgress:
    """Context manager that shows progress bars in the main process.

    Args:
        report: the report whose standard error shows the bars.
        shown: whether this process shows bars.
    """

    def __init__(self, report: Report, shown: bool) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=report.err,
            transient=True,
            disable=not (shown and report.err.is_terminal),
        )
        self._stack = contextlib.ExitStack()
        self._epochs = self._bars.add_task("epochs", total=None, note="")
        self._steps = self._bars.add_task("updates", total=None, note="")

    def __enter__(self) -> TrainProgress:
        self._stack.enter_context(self._bars)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def epoch(self, epoch: int, epochs: int, updates: int, start: int) -> None:
        """Start the bars of an epoch."""
        self._bars.update(self._epochs, completed=epoch, total=epochs)
        self._bars.reset(self._steps, description="updates", total=updates, completed=start, note="")

    def advance(self, loss: float, rate: float) -> None:
        """Advance the bar by one update."""
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
        self._bars.update(self._steps, advance=1, note=f"loss {loss:.3f}, {rate:.0f} images/s{memory}")

    def evaluation(self, batches: int) -> None:
        """Finish the epoch, and start the bar of its evaluation."""
        self._bars.advance(self._epochs)
        self._bars.reset(self._steps, description="evaluating", total=batches, note="")

    def tick(self) -> None:
        """Advance the bar by one evaluated batch."""
        self._bars.advance(self._steps)
