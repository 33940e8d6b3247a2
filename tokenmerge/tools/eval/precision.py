"""Mean average precision of files with several labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.tools.eval.scores import Running
from tokenmerge.tools.packages import needed
from tokenmerge.tools.processes import Processes
from tokenmerge.tools.report import Row
from tokenmerge.tools.statistics import Z

_RESAMPLES = 50
"""Resamples of a bootstrap; only the deviation is taken from them, because mAP of many classes takes a second."""


def metrics_library() -> Any:
    """Import and return the module `sklearn.metrics`.

    Raises:
        InputError: if it is not installed.
    """
    return needed("sklearn.metrics", "mAP is computed by it", "media", "scikit-learn")


def mean_average_precision(targets: Any, outputs: Any, counts: Any = None) -> float:
    """Return the mean over classes of scikit-learn's average precision; classes without a positive file are left out.

    Args:
        targets: `[files, classes]`, 1 where a file has a label and 0 elsewhere.
        outputs: `[files, classes]`, larger for likelier labels; equal outputs of a class count as one threshold.
        counts: `[files]`, how often each file counts; `None` counts each once.

    Raises:
        InputError: if scikit-learn is not installed, or no class has a positive file.
    """
    metrics = metrics_library()
    targets, outputs = np.asarray(targets), np.asarray(outputs)
    if counts is not None:
        used = np.asarray(counts) > 0
        targets, outputs, counts = targets[used], outputs[used], np.asarray(counts)[used]
    known = (targets > 0).any(axis=0)
    if not known.any():
        raise InputError("no file has a label, but mAP needs at least one: check the labels")
    found = [
        metrics.average_precision_score(targets[:, place], outputs[:, place], sample_weight=counts)
        for place in np.flatnonzero(known)
    ]
    return float(np.mean(found))


@dataclasses.dataclass
class Precision(Running):
    """mAP of one setting over the batches so far.

    Attributes:
        targets: labels of each batch, `[b, classes]`.
        outputs: logits of each batch, `[b, classes]`; sigmoids would rank the files alike, but for their rounding.
        unmerged: logits of the unmerged model on each batch; empty for the unmerged model itself, and if it does not run.
    """

    METRICS: ClassVar[Mapping[str, str]] = {"map": "mAP"}

    targets: list[Tensor] = dataclasses.field(default_factory=list)
    outputs: list[Tensor] = dataclasses.field(default_factory=list)
    unmerged: list[Tensor] = dataclasses.field(default_factory=list)

    def add(self, images: Tensor, labels: Tensor) -> Tensor:
        """Evaluate one batch, keep its logits and labels, and return the logits.

        Raises:
            InputError: if an output of the model is not finite.
        """
        logits = self.logits(images).cpu()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        self.outputs.append(logits)
        self.targets.append(labels.cpu())
        self.images += len(labels)
        return logits

    def compare(self, mine: Tensor, unmerged: Tensor) -> None:
        """Keep the logits of the unmerged model on a batch."""
        self.unmerged.append(unmerged)

    def join(self, processes: Processes) -> None:
        """Add the files of the other processes."""
        super().join(processes)
        for name in ("targets", "outputs", "unmerged"):
            setattr(self, name, processes.gather(getattr(self, name)))

    def percentages(self) -> Row:
        """Return mAP so far, in percent."""
        return {"map": 100 * mean_average_precision(torch.cat(self.targets), torch.cat(self.outputs))}

    def row(self, model: str, skipped: int) -> Row:
        """Return the result row: mAP and its difference to the unmerged model with 95 % intervals over files, and speed.

        Args:
            model: name of the model.
            skipped: number of unreadable files.
        """
        targets, outputs = torch.cat(self.targets), torch.cat(self.outputs)
        found: Row = {"model": model, "r": self.setting.label, **self.percentages()}
        before = torch.cat(self.unmerged or self.outputs)
        order = np.lexsort(before.numpy().T)  # whichever process had which file
        mine = _resampled(targets[order], outputs[order])
        reach = 100 * Z * float(np.std(mine)) if len(targets) > 1 else 100.0
        found |= {"map_low": max(0.0, found["map"] - reach), "map_high": min(100.0, found["map"] + reach)}
        change: float | None = None
        if self.unmerged:
            change = found["map"] - 100 * mean_average_precision(targets, before)
            differences = np.subtract(mine, _resampled(targets[order], before[order]))
            reach = 100 * Z * float(np.std(differences)) if len(targets) > 1 else 100.0
        found |= {
            "map_difference": change,
            "map_difference_low": None if change is None else change - reach,
            "map_difference_high": None if change is None else change + reach,
            "classes": int((targets > 0).any(dim=0).sum()),
        }
        return {**found, **self.about(), "skipped": skipped}


def _resampled(targets: Tensor, outputs: Tensor) -> list[float]:
    """Return mAP of resamples of the files, which are the same for all outputs on the same files."""
    draw, files = np.random.default_rng(0), len(targets)
    found = []
    for _ in range(_RESAMPLES):
        counts = np.bincount(draw.integers(files, size=files), minlength=files)
        while not bool((targets[counts > 0] > 0).any()):  # (of a few files, none with a label)
            counts = np.bincount(draw.integers(files, size=files), minlength=files)
        found.append(mean_average_precision(targets, outputs, counts))
    return found
