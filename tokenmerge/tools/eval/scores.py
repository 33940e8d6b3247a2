"""Accuracy and speed of several settings on the same images, in turns."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from tokenmerge.ops.timing import synchronize
from tokenmerge.patching import Handle, model_cost, patch
from tokenmerge.patching.seen import TokensSeen
from tokenmerge.tools.inputs import check_finite, logits_of
from tokenmerge.tools.processes import Processes
from tokenmerge.tools.report import Row
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.statistics import paired_difference, wilson
from tokenmerge.tools.variants import share_weights


@dataclasses.dataclass
class Running(abc.ABC):
    """One setting that runs on the batches of an evaluation; subclasses count.

    Attributes:
        METRICS: keys of the measures in rows, in percent, each with its name in tables.
        setting: the schedule.
        forward: the model at this setting.
        gflops: GFLOPs per image that the schedule leads to.
        seen: counts of the tokens that really ran, for matchers that go by the images; `None` for all others.
        handle: handle of the model; `None` without merging.
        images: number of images evaluated.
        times: seconds of each forward pass.
    """

    METRICS: ClassVar[Mapping[str, str]] = {}

    setting: Setting
    forward: Callable[[Tensor], Tensor]
    gflops: float
    handle: Handle | None = None
    seen: TokensSeen | None = None
    images: int = 0
    times: list[float] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Time of all forward passes."""
        return sum(self.times)

    @abc.abstractmethod
    def add(self, images: Tensor, labels: Tensor) -> Tensor:
        """Evaluate one batch, add its results to the totals, and return what `compare` takes.

        Raises:
            InputError: if an output of the model is not finite.
        """

    @abc.abstractmethod
    def compare(self, mine: Tensor, unmerged: Tensor) -> None:
        """Note the results of one batch beside those of the unmerged model on it; both are what `add` returned."""

    @abc.abstractmethod
    def percentages(self) -> Row:
        """Return the measures so far, in percent, by the keys of `METRICS`."""

    def logits(self, images: Tensor) -> Tensor:
        """Run one batch, note its time, and return the logits `[b, classes]`.

        Raises:
            InputError: if an output of the model is not finite.
        """
        synchronize(images.device)
        start = time.perf_counter()
        with self.seen or contextlib.nullcontext():
            logits = logits_of(self.forward(images))
        synchronize(images.device)
        self.times.append(time.perf_counter() - start)
        check_finite(logits, self.setting.title)
        return logits

    def join(self, processes: Processes) -> None:
        """Add the totals of the other processes; the time is the longest one, because all run at the same time."""
        self.times = [max(processes.gather([self.seconds]))]
        self.images = sum(processes.gather([self.images]))
        if self.seen is not None:
            found = processes.gather([(self.seen.images, self.seen.flops)])
            self.gflops = sum(one[1] for one in found) / max(1, sum(one[0] for one in found)) / 1e9

    def about(self) -> Row:
        """Return the entries of the result row that all kinds of scores have."""
        return {
            "images_per_second": self.images / self.seconds,
            "gflops": self.gflops,
            "tuned": None if self.handle is None else self.handle.summary().tuned,
            "images": self.images,
            "config": None if self.handle is None else self.handle.config.to_json(),
        }


@dataclasses.dataclass
class Score(Running):
    """Top-1 and top-5 of one setting over the batches so far.

    Attributes:
        top1: number of images whose most likely class is the label.
        top5: number of images whose five most likely classes contain the label.
        changes: numbers of images on which this setting is right and the unmerged model wrong, and the other way round, for top-1
            and then for top-5; `None` for the unmerged model, and if it does not run.
    """

    METRICS: ClassVar[Mapping[str, str]] = {"top1": "top-1", "top5": "top-5"}

    top1: int = 0
    top5: int = 0
    changes: tuple[int, int, int, int] | None = None

    def add(self, images: Tensor, labels: Tensor) -> Tensor:
        """Evaluate one batch and add its results to the totals.

        Returns:
            `[2, b]` bool: whether the label is the most likely class, and whether it is among the five most likely ones.

        Raises:
            InputError: if an output of the model is not finite.
        """
        logits = self.logits(images)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
        right = torch.stack((best[:, 0], best.any(dim=1))).cpu()
        self.top1 += int(right[0].sum())
        self.top5 += int(right[1].sum())
        self.images += len(labels)
        return right

    def compare(self, mine: Tensor, unmerged: Tensor) -> None:
        """Count the images of one batch on which this setting and the unmerged model differ; both are what `add` returned."""
        first, second = ((mine & ~unmerged).sum(dim=1).tolist(), (unmerged & ~mine).sum(dim=1).tolist())
        before = self.changes or (0, 0, 0, 0)
        self.changes = (before[0] + first[0], before[1] + second[0], before[2] + first[1], before[3] + second[1])

    def percentages(self) -> Row:
        """Return top-1 and top-5 so far, in percent."""
        return {"top1": 100 * self.top1 / self.images, "top5": 100 * self.top5 / self.images}

    def join(self, processes: Processes) -> None:
        """Add the totals of the other processes."""
        super().join(processes)
        totals = processes.gather([(self.top1, self.top5, self.changes)])
        self.top1, self.top5 = (sum(one[i] for one in totals) for i in range(2))
        every = [one[2] for one in totals if one[2] is not None]  # a process without an image has none
        if every:
            first, second, third, fourth = (sum(one[i] for one in every) for i in range(4))
            self.changes = (first, second, third, fourth)

    def row(self, model: str, skipped: int, passes: int = 1) -> Row:
        """Return the result row of this setting: percentages with 95 % intervals, differences to the unmerged model, and speed.

        Args:
            model: name of the model.
            skipped: number of unreadable files.
            passes: how often every image was evaluated, because an image gives no evidence twice.
        """
        return {
            "model": model,
            "r": self.setting.label,
            **self._accuracy("top1", self.top1, 0, passes),
            **self._accuracy("top5", self.top5, 2, passes),
            **self.about(),
            "skipped": skipped,
        }

    def _accuracy(self, name: str, right: int, place: int, passes: int) -> Row:
        images = self.images // passes
        own, change = wilson(right // passes, images), None
        if self.changes is not None:
            gained, lost = (number // passes for number in self.changes[place : place + 2])
            change = paired_difference(gained, lost, images)
        return {
            name: 100 * right / self.images,
            f"{name}_low": 100 * own.low,
            f"{name}_high": 100 * own.high,
            f"{name}_difference": None if change is None else 100 * change.mean,
            f"{name}_difference_low": None if change is None else 100 * change.low,
            f"{name}_difference_high": None if change is None else 100 * change.high,
        }


def add_in_turns(running: Sequence[Running], images: Tensor, labels: Tensor, number: int) -> None:
    """Evaluate one batch with every setting, in an order that rotates from batch to batch.

    Before the first batch, every setting runs once without being measured, as a warm-up.
    """
    if number == 0:
        for score in running:
            score.forward(images)
    right: dict[int, Tensor] = {}
    for step in range(len(running)):
        place = (number + step) % len(running)
        right[place] = running[place].add(images, labels)
    unmerged = next((place for place, score in enumerate(running) if score.setting.is_baseline), None)
    if unmerged is not None:
        for place, score in enumerate(running):
            if place != unmerged:
                score.compare(right[place], right[unmerged])


_Kind = TypeVar("_Kind", bound=Running)


def scores(model: Any, settings: Sequence[Setting], fields: dict[str, Any], kind: type[_Kind]) -> list[_Kind]:
    """Return one empty score per setting, on copies that share the model's weights; r=0 is the unpatched model.

    Args:
        model: the model.
        settings: the schedules.
        fields: other fields of `MergeConfig`.
        kind: `Score`, or `Precision` for several labels per file.
    """
    result = []
    for setting in settings:
        if setting.is_baseline:
            result.append(kind(setting, model, model_cost(model).total() / 1e9))
        else:
            copy = share_weights(model)
            handle = patch(copy, setting.config(**fields))
            result.append(kind(setting, copy, handle.summary().flops_after / 1e9, handle, seen_by(copy, handle)))
    return result


def seen_by(model: Any, handle: Handle) -> TokensSeen | None:
    """Return the counter of a model's tokens if their number depends on the images, otherwise `None`."""
    return TokensSeen(model) if handle.summary().adaptive else None
