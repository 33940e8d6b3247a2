"""Accuracy and speed of several settings on the same images, in turns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tokenmerge.ops.timing import synchronize
from tokenmerge.patching import Handle, model_cost, patch
from tokenmerge.tools.inputs import check_finite, logits_of
from tokenmerge.tools.processes import Processes
from tokenmerge.tools.report import Row
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.variants import share_weights


@dataclasses.dataclass
class Score:
    """Totals of one setting over the batches so far.

    Attributes:
        setting: the schedule.
        forward: the model at this setting.
        gflops: GFLOPs per image.
        handle: handle of the model; `None` without merging.
        top1: number of images whose most likely class is the label.
        top5: number of images whose five most likely classes contain the label.
        images: number of images evaluated.
        times: seconds of each forward pass.
    """

    setting: Setting
    forward: Callable[[Tensor], Tensor]
    gflops: float
    handle: Handle | None = None
    top1: int = 0
    top5: int = 0
    images: int = 0
    times: list[float] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Time of all forward passes."""
        return sum(self.times)

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Evaluate one batch and add its results to the totals.

        Raises:
            InputError: if an output of the model is not finite.
        """
        synchronize(images.device)
        start = time.perf_counter()
        logits = logits_of(self.forward(images))
        synchronize(images.device)
        self.times.append(time.perf_counter() - start)
        check_finite(logits, self.setting.title)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
        self.top1 += int(best[:, 0].sum())
        self.top5 += int(best.sum())
        self.images += len(labels)

    def join(self, processes: Processes) -> None:
        """Add the totals of the other processes; the time is the longest one, because all run at the same time."""
        totals = processes.gather([(self.top1, self.top5, self.images, self.seconds)])
        self.top1, self.top5, self.images = (sum(one[i] for one in totals) for i in range(3))
        self.times = [max(one[3] for one in totals)]

    def row(self, model: str, skipped: int) -> Row:
        """Return the result row of this setting, with percentages and speed."""
        return {
            "model": model,
            "r": self.setting.label,
            "top1": 100 * self.top1 / self.images,
            "top5": 100 * self.top5 / self.images,
            "images_per_second": self.images / self.seconds,
            "gflops": self.gflops,
            "tuned": None if self.handle is None else self.handle.summary().tuned,
            "images": self.images,
            "skipped": skipped,
            "config": None if self.handle is None else self.handle.config.to_json(),
        }


def add_in_turns(running: Sequence[Score], images: Tensor, labels: Tensor, number: int) -> None:
    """Evaluate one batch with every setting, in an order that rotates from batch to batch.

    Before the first batch, every setting runs once without being measured, as a warm-up.
    """
    if number == 0:
        for score in running:
            score.forward(images)
    for step in range(len(running)):
        running[(number + step) % len(running)].add(images, labels)


def scores(model: Any, settings: Sequence[Setting], fields: dict[str, Any]) -> list[Score]:
    """Return one empty score per setting, on copies that share the model's weights; r=0 is the unpatched model."""
    result = []
    for setting in settings:
        if setting.is_baseline:
            result.append(Score(setting, model, model_cost(model).total() / 1e9))
        else:
            copy = share_weights(model)
            handle = patch(copy, setting.config(**fields))
            result.append(Score(setting, copy, handle.summary().flops_after / 1e9, handle))
    return result
