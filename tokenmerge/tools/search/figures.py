"""The figure of a search: all trials and the Pareto frontier."""

from __future__ import annotations

from typing import Any

from tokenmerge.tools.pages.figures import lines


def figures(study: Any) -> list[str | None]:
    """Return the figure of all trials and the Pareto frontier."""
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
    return [
        lines(
            trials,
            "speedup",
            "divergence",
            ("speed-up, measured", "KL to the unmerged model"),
            by="kind",
            alone=["trial"],
        )
    ]
