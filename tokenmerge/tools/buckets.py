"""Batches of images of like content, so that adaptive merging really removes tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def detail(images: Tensor) -> Tensor:
    """`[B]` float32: mean absolute difference of neighbouring pixels; few tokens of a detailed image are alike."""
    x = images.float()
    across, down = (x[..., 1:] - x[..., :-1]).abs(), (x[..., 1:, :] - x[..., :-1, :]).abs()
    return across.flatten(1).mean(dim=1) + down.flatten(1).mean(dim=1)


def in_buckets(batches: Iterable[tuple[Tensor, Tensor]], depth: int = 8) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of the same images, sorted by detail within every `depth` batches; and the number of each image before it."""
    held: list[tuple[Tensor, Tensor]] = []
    start = 0
    for batch in batches:
        held.append(batch)
        if len(held) == depth:
            yield from _sorted(held, start)
            start += sum(len(labels) for _, labels in held)
            held = []
    if held:
        yield from _sorted(held, start)


def _sorted(held: list[tuple[Tensor, Tensor]], start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    images, labels = torch.cat([one for one, _ in held]), torch.cat([one for _, one in held])
    for index in detail(images).argsort().split(len(held[0][1])):
        yield images[index], labels[index], index.cpu() + start
