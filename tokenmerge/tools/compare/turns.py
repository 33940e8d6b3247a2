"""Speed of trained models, in evaluation and in training, measured in turns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenmerge.ops.timing import Spread, take_turns
from tokenmerge.tools.inputs import logits_of
from tokenmerge.tools.train.merging import loss_of_predictors

Batches = Sequence[Tensor]


@torch.inference_mode()
def over_batches(models: Sequence[tuple[Any, Batches]], rounds: int) -> tuple[list[Spread], list[float]]:
    """Return the speed-up of each model over the first one, and its images per second.

    Args:
        models: models, each with its batches; a round is one pass over all of them.
        rounds: timed rounds, in which all models take turns.
    """

    def call(model: Any, batches: Batches) -> Callable[[], None]:
        def run() -> None:
            for batch in batches:
                model(batch)

        return run

    device = models[0][1][0].device
    times = take_turns([call(*one) for one in models], device, 1, rounds)
    images = sum(len(batch) for batch in models[0][1])
    return [Spread.of_ratios(times[0], mine) for mine in times], [images / Spread.of(mine).p50 for mine in times]


def training_speedups(
    models: Sequence[tuple[nn.Module, Any]], images: Tensor, labels: Tensor, rounds: int
) -> list[Spread]:
    """Return the speed-up of a training step of each model over the first one: forward, loss and backward, without optimizer.

    Args:
        models: models and their handles, `None` for an unpatched one; they are in evaluation mode again afterwards.
        images: one batch.
        labels: `[B]` int64.
        rounds: timed rounds, in which all models take turns.
    """

    def step(model: nn.Module, further: Callable[[], Tensor | None]) -> None:
        loss, more = F.cross_entropy(logits_of(model(images)).float(), labels), further()
        (loss if more is None else loss + more).backward()
        model.zero_grad(set_to_none=True)

    images, labels = images.clone(), labels.clone()  # which may have been made in inference mode
    learning = [p for model, _ in models for p in model.parameters()]
    before = [p.requires_grad for p in learning]
    try:
        for model, _ in models:
            model.train()
            model.requires_grad_(True)
        further = [loss_of_predictors(*one) if one[1] is not None else lambda: None for one in models]
        steps = [functools.partial(step, one[0], more) for one, more in zip(models, further, strict=True)]
        times = take_turns(steps, images.device, 1, rounds)
    finally:
        for parameter, learns in zip(learning, before, strict=True):
            parameter.requires_grad_(learns)
        for model, _ in models:
            model.eval()
    return [Spread.of_ratios(times[0], mine) for mine in times]
