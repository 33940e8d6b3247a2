"""Labelled data of an evaluation, with the preprocessing of the model, and their batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tokenmerge.errors import InputError
from tokenmerge.files import words_of
from tokenmerge.tools.common import DataOptions
from tokenmerge.tools.datasets import Labelled, LabelledStream, labelled
from tokenmerge.tools.folders import ClassFolder
from tokenmerge.tools.inputs import class_names, classifier_input, num_classes
from tokenmerge.tools.labels import LabelledFiles, beside
from tokenmerge.tools.media import Medium
from tokenmerge.tools.signals import check, deferred
from tokenmerge.tools.transforms import evaluation_transform
from tokenmerge.tools.videos import ONE_VIEW, Views
from tokenmerge.tools.zero_shot import ZeroShot

AnyData = ClassFolder | LabelledFiles | Labelled | LabelledStream
"""A data set of an evaluation."""


def make_dataset(
    model: Any,
    options: DataOptions,
    medium: Medium,
    overrides: Mapping[str, Any] | None = None,
    sampling_rate: int = 4,
    views: Views = ONE_VIEW,
    labels: Path | None = None,
) -> AnyData:
    """Return the data set with the preprocessing of the model.

    Args:
        model: a classifier of the medium.
        options: where the data are.
        medium: kind of the files.
        overrides: values that replace the model's own preprocessing.
        sampling_rate: stride between the sampled frames of a video.
        views: views of each video.
        labels: file with several labels per file, instead of class folders.

    Raises:
        InputError: if the data or the preprocessing does not fit the model.
    """
    classifier_input(model, medium, "eval")
    transform, medium = evaluation_transform(model, medium, dict(overrides or {}), sampling_rate, options.place, views)
    by_names = isinstance(model, ZeroShot)
    classes, names = (None, None) if by_names else (num_classes(model), class_names(model))
    dataset: AnyData
    if labels is not None:
        if by_names:
            raise InputError(
                "--labels needs a classifier with a head, but open_clip's compares with texts: give another model"
            )
        place = beside(labels, options.folder)
        dataset = LabelledFiles(options.folder, place, transform, classes, names, options.class_map, medium)
    elif options.dataset is None:
        dataset = ClassFolder(options.folder, transform, classes, names, options.class_map, medium)
    else:
        dataset = labelled(options.dataset, options.data, options.split, transform, classes, names, options.class_map)
    if by_names:
        model.name_classes(dataset.names)
    return dataset


def take_evenly(dataset: AnyData, limit: int | None, place: str) -> None:
    """Keep only `limit` files, evenly spaced in the data; all if it is `None`.

    Raises:
        InputError: if the data are a stream, whose files have no numbers.
    """
    if limit is None:
        return
    if isinstance(dataset, LabelledStream):
        raise InputError(
            f"{place} is a stream, but {limit} images spread over all of it were asked for: give hfds/… or class folders"
        )
    if limit < len(dataset):
        dataset.take(torch.linspace(0, len(dataset) - 1, limit).round().long().tolist())


def guarded(loader: Any) -> Any:
    """Yield the batches of a loader; the death of a worker process becomes an `InputError`."""
    with deferred():  # a loader whose workers are half started cannot end them
        iterator = iter(loader)
    while True:
        check()
        try:
            with loading():
                batch = next(iterator)
        except StopIteration:
            return
        yield batch


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Turn the death of a worker process, which PyTorch raises wherever the main process is, into an `InputError`."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(f"a process that decodes files died ({words_of(error)}): try --workers 0") from None
