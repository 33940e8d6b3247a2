"""Batches of images with similar detail, because a batch loses only as many tokens as each of its images can spare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def detail(images: Tensor) -> Tensor:
    """`[B]` float32: mean absolute difference of neighbouring pixels, which is high if few tokens are similar."""
    x = images.float()
    across, down = (x[..., 1:] - x[..., :-1]).abs(), (x[..., 1:, :] - x[..., :-1, :]).abs()
    return across.flatten(1).mean(dim=1) + down.flatten(1).mean(dim=1)


def in_buckets(
    batches: Iterable[tuple[Tensor, Tensor]], depth: int = 8, keys: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Sort images within every `depth` batches, and yield new batches with the original index of each image.

    Args:
        batches: images and labels.
        depth: number of batches that are sorted together.
        keys: one number for each image to sort by; `None` sorts by detail.
    """
    held: list[tuple[Tensor, Tensor]] = []
    start = 0
    for batch in batches:
        held.append(batch)
        if len(held) == depth:
            yield from _sorted(held, start, keys)
            start += sum(len(labels) for _, labels in held)
            held = []
    if held:
        yield from _sorted(held, start, keys)


def _sorted(
    held: list[tuple[Tensor, Tensor]], start: int, keys: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    images, labels = torch.cat([one for one, _ in held]), torch.cat([one for _, one in held])
    key = detail(images) if keys is None else keys[start : start + len(labels)].to(images.device)
    for index in key.argsort().split(len(held[0][1])):
        yield images[index], labels[index], index.cpu() + start
