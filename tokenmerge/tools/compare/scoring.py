"""Scores of every variant for each image, so that differences can be tested pairwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenmerge import files
from tokenmerge.errors import InputError
from tokenmerge.tools.buckets import in_buckets
from tokenmerge.tools.inputs import check_finite, logits_of


@dataclasses.dataclass
class Scores:
    """Scores of one variant for each of n images, float64.

    Attributes:
        top1: `[n]`: 1 if the most likely class is the label, else 0.
        top5: `[n]`: 1 if the label is among the five most likely classes, else 0.
        divergence: `[n]`: KL divergence from the unmerged model's prediction, in nats.
        gflops: GFLOPs per image that ran, for matchers that go by the images; `None` for all others.
    """

    top1: Tensor
    top5: Tensor
    divergence: Tensor
    gflops: float | None = None

    def save(self, path: Path) -> None:
        """Write the scores atomically, as JSON; scores that are not finite are not kept, because JSON has no such number.

        Raises:
            InputError: if the file cannot be written.
        """
        values: dict[str, Any] = {name: getattr(self, name).tolist() for name in ("top1", "top5", "divergence")}
        if all(bool(getattr(self, name).isfinite().all()) for name in values):
            values["gflops"] = self.gflops
            files.write(path, files.to_json(values, "the scores", indent=None), "the scores")

    @classmethod
    def load(cls, path: Path) -> Scores | None:
        """Return the scores that `save` wrote; `None` if the file is missing or damaged, so that they are measured again."""
        try:
            found = files.read_json(path, "the scores")
            names = ("top1", "top5", "divergence")
            top1, top5, divergence = (torch.tensor(found[name], dtype=torch.float64) for name in names)
            gflops = found.get("gflops")
            return cls(top1, top5, divergence, None if gflops is None else float(gflops))
        except (OSError, ValueError, KeyError, TypeError):
            return None


@torch.inference_mode()
def score(
    model: Any, batches: Iterable[tuple[Tensor, Tensor]], reference: Tensor | None, buckets: bool = False
) -> tuple[Scores, Tensor]:
    """Score a model on all images.

    Args:
        model: the model to score.
        batches: images and labels.
        reference: log-probabilities of the unmerged model, `[n, classes]`; `None` if `model` is the unmerged one.
        buckets: whether to batch images of similar detail together; the scores keep the original order.

    Returns:
        The scores, and without `reference` the log-probabilities `[n, classes]` on the CPU.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    said, places, count = [], [], 0
    if buckets:
        turns = in_buckets(batches)
    else:
        turns = ((images, labels, torch.empty(0)) for images, labels in batches)
    for images, labels, index in turns:
        logits = logits_of(model(images)).float()
        check_finite(logits, "r=0" if reference is None else "this setting")
        log = logits.log_softmax(dim=1)
        index = index if buckets else torch.arange(count, count + len(log))
        count += len(log)
        hits = log.topk(min(5, log.shape[1]), dim=1).indices == labels.unsqueeze(1)
        if reference is None:
            said.append(log.cpu())
            divergence = log.new_zeros(len(log))
        else:
            wanted = reference[index].to(log.device)
            divergence = (wanted.exp() * (wanted - log)).sum(dim=1)
        places.append(index)
        parts.append((hits[:, 0].double(), hits.any(dim=1).double(), divergence.double()))
    if not parts:
        raise InputError("not one image was there to score: check --data")
    order = torch.cat(places).argsort()
    top1, top5, divergence = (torch.cat([part[i].cpu() for part in parts])[order] for i in range(3))
    return Scores(top1, top5, divergence), torch.cat(said) if said else torch.empty(0)
