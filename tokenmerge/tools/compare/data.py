"""Images of a comparison, decoded once and kept in memory if they fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.tools.device import place
from tokenmerge.tools.evaluate import EvalArgs, guarded, make_dataset
from tokenmerge.tools.folders import ClassFolder, batches
from tokenmerge.tools.media import medium_of
from tokenmerge.tools.models import ModelArgs

_KEPT = 3 * 2**30
"""Most bytes of decoded images to keep in memory."""


class Images:
    """Batches of images and labels that can be iterated repeatedly.

    Args:
        model: model whose preprocessing is used.
        args: arguments that the model was loaded with, for device and dtype.
        data: folder with one subfolder per class.
        batch_size: images per batch.
        workers: processes that decode.
        limit: number of images to use, evenly spaced over the data; `None` uses all.

    Raises:
        InputError: if the folder cannot be read, or its classes do not fit the model.
    """

    def __init__(
        self, model: Any, args: ModelArgs, data: Path, batch_size: int, workers: int, limit: int | None = None
    ) -> None:
        self._args, self._workers, self.batch_size = args, workers, batch_size
        self.dataset: ClassFolder = make_dataset(model, EvalArgs(data=data), medium_of(data))
        if limit is not None and limit < len(self.dataset):
            chosen = torch.linspace(0, len(self.dataset) - 1, limit).round().long().tolist()
            self.dataset.samples = [self.dataset.samples[i] for i in chosen]
        self.skipped: list[str] = []
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def fingerprint(self) -> dict[str, Any]:
        """Return the names and sizes of the files, to tell these data from others."""
        files = [(str(path.relative_to(self.dataset.root)), path.stat().st_size) for path, _ in self.dataset.samples]
        return {"root": str(self.dataset.root.resolve()), "files": files}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._kept is None:
            yield from self._decode()
        else:
            yield from (self._placed(images, labels) for images, labels in self._kept)

    def first(self, count: int) -> Tensor:
        """Return `count` images for timing: the first batch, repeated if it is smaller.

        Raises:
            InputError: if no image can be read.
        """
        for images, _ in self:
            again = -(-count // len(images))
            return images.repeat(again, *[1] * (images.dim() - 1))[:count]
        raise InputError(f"none of the {len(self)} files in {str(self.dataset.root)!r} could be read: check --data")

    def _placed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        args = self._args
        return place(images, args.device, args.dtype, args.channels_last), labels.to(args.device)

    def _decode(self) -> Iterator[tuple[Tensor, Tensor]]:
        kept: list[tuple[Tensor, Tensor]] | None = []
        used, skipped = 0, []
        for batch in guarded(batches(self.dataset, self.batch_size, self._workers)):
            skipped += batch.skipped
            if not len(batch.labels):
                continue
            used += batch.images.numel() * batch.images.element_size()
            if kept is not None and used <= _KEPT:
                kept.append((batch.images, batch.labels))
            else:
                kept = None
            yield self._placed(batch.images, batch.labels)
        self.skipped, self._kept = skipped, kept


def describe(args: ModelArgs) -> dict[str, Any]:
    """Return the arguments of a model that its predictions depend on."""
    wanted = ("model", "pretrained", "checkpoint", "num_classes", "img_size", "dtype")
    return {name: getattr(args, name) for name in wanted if any(f.name == name for f in dataclasses.fields(args))}
