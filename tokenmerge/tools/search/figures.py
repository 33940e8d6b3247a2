"""The figures of a search: all trials with the Pareto frontier, and the result on held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenmerge.tools.pages import Figure
from tokenmerge.tools.pages.figures import Axis, captioned, lines
from tokenmerge.tools.report import Row


def figures(study: Any, rows: Sequence[Row]) -> list[Figure | None]:
    """Return the figures of all trials with the Pareto frontier, and of the result on held-out images."""
    best = {trial.number for trial in study.best_trials}
    trials = [
        {
            "speedup": 1 / t.values[0],
            "divergence": t.values[1],
            "kind": "on the frontier" if t.number in best else "trial",
        }
        for t in study.trials
        if t.values is not None
    ]
    trials.sort(key=lambda trial: trial["kind"])
    speed = Axis("speedup", "speed-up, measured", 0, mark=1)
    divergence = Axis("divergence", "KL to the unmerged model", 0)
    caption = "All trials: the predictions change less towards the bottom, and the model is faster towards the right."
    accuracy = Axis("top1", "top-1, %", 0, 100, ("top1_low", "top1_high"), span=2)
    checked = "The result and a constant r of equal speed, on images that the search did not see; bars: 95 % interval of each accuracy."
    return [
        captioned(caption, lines(trials, speed, divergence, by="kind", alone=["trial"])),
        captioned(checked, lines(rows, speed, accuracy, by="setting")),
    ]
