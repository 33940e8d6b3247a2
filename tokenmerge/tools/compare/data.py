"""Images of a comparison, decoded once and kept in memory if they fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.tools.datasets import LabelledStream, medium_for
from tokenmerge.tools.device import place
from tokenmerge.tools.eval.data import guarded, make_dataset, take_evenly
from tokenmerge.tools.folders import batches
from tokenmerge.tools.models import load_model, warn_if_random
from tokenmerge.tools.options import plain
from tokenmerge.tools.report import Report

_KEPT = 3 * 2**30
"""Most bytes of decoded images to keep in memory."""


class Images:
    """Batches of images and labels that can be iterated repeatedly.

    Args:
        model: model whose preprocessing is used.
        options: options of model, data and batch size.
        limit: number of images to use, evenly spaced over the data; `None` uses all.

    Raises:
        InputError: if the folder cannot be read, or its classes do not fit the model.
    """

    def __init__(self, model: Any, options: Any, limit: int | None = None) -> None:
        self._options, self._workers, self.batch_size = options, options.workers, options.batch_size
        self.place = options.place
        self.dataset = make_dataset(model, options, medium_for(options.data, options.dataset))
        self.skipped: list[str] = []
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        take_evenly(self.dataset, limit, self.place)

    def __len__(self) -> int:
        """Return the number of images; of a stream of unknown length 0."""
        return (self.dataset.reader.size or 0) if isinstance(self.dataset, LabelledStream) else len(self.dataset)

    def __bool__(self) -> bool:
        return True

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells these data from others."""
        return self.dataset.fingerprint()

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
        raise InputError(f"none of the files in {self.place} could be read: check --data")

    def _placed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        options = self._options
        return place(images, options.device, options.dtype, options.channels_last), labels.to(options.device)

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
        self.skipped, self._kept = [*self.dataset.left_out, *skipped], kept


def load_scored(options: Any, report: Report) -> Any:
    """Load the classifier for the medium of the data, and warn if its weights are random."""
    model = load_model(options, head=medium_for(options.data, options.dataset).name)
    warn_if_random(options, report.warn)
    return model


def describe(options: Any) -> dict[str, Any]:
    """Return the options of a model that its predictions depend on."""
    wanted = ("model", "pretrained", "checkpoint", "num_classes", "img_size", "model_kwargs", "dtype")
    return {name: plain(getattr(options, name)) for name in wanted}
