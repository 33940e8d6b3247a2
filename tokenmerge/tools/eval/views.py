"""The mean prediction of a model over several views of each input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenmerge.tools.inputs import logits_of


class ViewMean:
    """Function from views to the logarithm of the classes' mean probabilities, as published evaluations of videos average them.

    Args:
        model: function from inputs `[n, …]` to an output with logits `[n, classes]`.
        most: largest number of views in one pass of the model.
        several: whether an input may have several labels, so that the probability of each class is the sigmoid of its logit.

    Attributes:
        model: the function.
    """

    def __init__(self, model: Callable[[Tensor], Any], most: int, several: bool = False) -> None:
        self.model, self.most, self.several = model, most, several

    def __call__(self, views: Tensor) -> Tensor:
        """Return `[b, classes]` from views `[b, V, …]`, float64 so that probabilities near 1 do not become equal; NaN stays NaN."""
        parts = [logits_of(self.model(part)).cpu().double() for part in views.flatten(0, 1).split(self.most)]
        logits = torch.cat(parts).unflatten(0, tuple(views.shape[:2]))
        each = torch.nn.functional.logsigmoid(logits) if self.several else logits.log_softmax(dim=2)
        mean: Tensor = each.logsumexp(dim=1) - math.log(views.shape[1])
        return mean
