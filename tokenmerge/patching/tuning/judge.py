"""How far a schedule moves a model's predictions, on images that the user gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from tokenmerge.errors import InputError

Predict = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Scores of a schedule.

    Attributes:
        moved: mean KL divergence of its predictions from those of the unmerged model.
        correct: how many images it classified correctly; `None` without labels.
    """

    moved: float
    correct: int | None

    def objection(self, other: Verdict) -> str:
        """Return why another schedule is not allowed in place of this one; empty if it is."""
        if not other.moved <= self.moved:  # written this way so that NaN is not allowed
            return "it moves predictions more than the schedule that was asked for"
        if self.correct is not None and (other.correct or 0) < self.correct:
            return "it classifies fewer images correctly than the schedule that was asked for"
        return ""


class Judge:
    """Comparison of predictions with those of the unmerged model.

    Attributes:
        predict: function of one batch that returns the model's output.
        batches: the images, each with labels `[B]` int64 or `None`.
    """

    def __init__(self, predict: Predict, given: Any) -> None:
        """Create the judge, while the model merges nothing.

        Args:
            predict: function of one batch that returns the model's output.
            given: a batch, a pair of a batch and its labels, or an iterable of such; a batch is a tensor, or a mapping of keyword
                arguments.

        Raises:
            InputError: if `given` holds no batch, or the model returns no logits `[B, K]`.
        """
        self.predict = predict
        self.batches = list(_batches(given))
        if not self.batches:
            raise InputError("judge holds no images, but predictions must be judged on some: give a batch of images")
        self._reference = [self._logits(images) for images, _ in self.batches]
        for (_, labels), logits in zip(self.batches, self._reference, strict=True):
            if len(logits) == 0 or (labels is not None and labels.shape != logits.shape[:1]):
                shape = None if labels is None else tuple(labels.shape)
                raise InputError(
                    f"judge holds a batch of {len(logits)} images with labels of shape {shape}, but at least one image, and one label "
                    "for each, were expected"
                )

    def _logits(self, images: Any) -> Tensor:
        output = self.predict(images)
        found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[1] < 2:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
            raise InputError(
                f"the model returned {shape}, but schedules are judged by logits [B, K] of K classes: give call=, a function from "
                "inputs to logits, such as the classifier around the model"
            )
        return found.float().log_softmax(dim=1)

    def verdict(self) -> Verdict:
        """Return the scores of the model as it merges now."""
        moved, correct, images, labelled = 0.0, 0, 0, False
        for (given, labels), reference in zip(self.batches, self._reference, strict=True):
            found = self._logits(given)
            moved += float((reference.exp() * (reference - found)).sum())
            images += found.shape[0]
            if labels is not None:
                labelled = True
                correct += int((found.argmax(dim=1) == labels.to(found.device)).sum())
        return Verdict(moved / images, correct if labelled else None)


def _batches(given: Any, depth: int = 0) -> Iterable[tuple[Any, Tensor | None]]:
    if isinstance(given, tuple | list) and len(given) == 2 and _are_labels(given[1]):
        yield given[0], given[1]
    elif isinstance(given, Tensor) or hasattr(given, "keys"):
        yield given, None
    elif isinstance(given, Iterable) and not isinstance(given, str | bytes) and depth < 2:
        for one in given:
            yield from _batches(one, depth + 1)
    else:
        raise InputError(
            f"judge={given!r:.60} is of type {type(given).__name__}, but images, a pair of images and labels, or several of these were "
            "expected"
        )


def _are_labels(given: Any) -> bool:
    return isinstance(given, Tensor) and given.dim() <= 2 and not (given.is_floating_point() or given.is_complex())
