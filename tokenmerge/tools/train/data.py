"""Training images, whose order and augmentation depend only on the seed, the epoch and the image.

A killed run can therefore resume at any update without stored random generators and with any number of workers, and the
images of an update do not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tokenmerge.errors import InputError
from tokenmerge.tools.datasets import Labelled, LabelledStream, labelled
from tokenmerge.tools.folders import ClassFolder, Item, loader_of
from tokenmerge.tools.labels import LabelledFiles, beside, classes_in
from tokenmerge.tools.media import IMAGES, Medium, medium_of
from tokenmerge.tools.reading.documents import read_class_map
from tokenmerge.tools.train.options import TrainOptions

Sample = tuple[int, int]
"""Index of an image, and index of its repeat within the epoch."""
AnyImages = ClassFolder | LabelledFiles | Labelled
"""Files of a split that are read by their number."""
_TRIES = 50


def seed_all(*key: Any) -> None:
    """Seed the random generators of Python, NumPy and torch from a hash of `key`."""
    value = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


class Augmented(Dataset[Item]):
    """Data set of training images; an unreadable image is replaced by the next one and reported.

    Args:
        folder: the images, with their transform.
        seed: random seed of the run.
    """

    def __init__(self, folder: AnyImages, seed: int) -> None:
        self.folder, self.seed, self.epoch = folder, seed, 0

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, sample: Sample) -> Item:
        """Return the image, its label, and "file: reason" of each unreadable image before it."""
        index, repeat = sample
        problems: list[str] = []
        for _ in range(_TRIES):
            seed_all(self.seed, "image", self.epoch, index, repeat)
            image, label, problem = self.folder[index]
            if image is not None:
                return image, label, "\n".join(problems)
            problems.append(problem)
            index = (index + 1) % len(self.folder)
        return None, 0, "\n".join(problems)


class EpochBatches(Sampler[list[Sample]]):
    """Sampler of one process's batches in an epoch, from any update on.

    Args:
        size: number of images in the data set.
        args: batch sizes, repeats and seed.
        rank: index of this process.
        processes: number of processes.
        weights: weight of each image, with which it is drawn with replacement; `None` draws each once.

    Raises:
        InputError: if there are fewer images than one update needs, or than an epoch is to have.
    """

    def __init__(self, size: int, args: TrainOptions, rank: int, processes: int, weights: Tensor | None = None) -> None:
        self.size, self.args, self.rank, self.processes, self.weights = size, args, rank, processes, weights
        self.epoch, self.start = 0, 0
        self.length = args.epoch_size or size
        if self.length > size and weights is None:
            raise InputError(
                f"--epoch-size {self.length} was given for {size} training files: give at most as many, or --weighted-sampling, which "
                "draws files again"
            )
        self.updates = self.length // args.global_batch(processes)
        if not self.updates:
            raise InputError(
                f"{self.length} training images are fewer than the {args.global_batch(processes)} of one update "
                f"(batch {args.batch_size} × {args.grad_accum_steps} steps × {processes} processes): give a smaller --batch-size"
            )

    def __len__(self) -> int:
        return (self.updates - self.start) * self.args.grad_accum_steps

    def samples(self) -> list[Sample]:
        """Return all samples of the epoch in order; with repeats, an epoch keeps its length, and copies are adjacent."""
        generator = torch.Generator().manual_seed((self.args.seed << 20) + self.epoch)
        if self.weights is None:
            order = torch.randperm(self.size, generator=generator).tolist()
        else:
            order = torch.multinomial(self.weights, self.length, replacement=True, generator=generator).tolist()
        repeats = self.args.aug_repeats
        drawn = [(order[place // repeats], place % repeats) for place in range(self.length)]
        if self.weights is None or repeats > 1:
            return drawn
        return _numbered(drawn)

    def __iter__(self) -> Iterator[list[Sample]]:
        order, batch = self.samples(), self.args.batch_size
        steps = self.args.grad_accum_steps
        for step in range(self.start * steps, self.updates * steps):
            first = (step * self.processes + self.rank) * batch
            yield order[first : first + batch]


def _numbered(drawn: list[Sample]) -> list[Sample]:
    """Return samples in which an image that was drawn again is another repeat of it, so that its augmentation differs."""
    times: Counter[int] = Counter()
    found = []
    for index, _ in drawn:
        found.append((index, times[index]))
        times[index] += 1
    return found


def weights_of(images: AnyImages) -> Tensor:
    """Return the weight of each file: the sum over its labels of 1 ÷ the number of files with that label, `[files]` float64.

    Files without a label count as a class of their own.
    """
    if isinstance(images, Labelled):
        raise InputError(
            "--weighted-sampling needs the labels of all files, which --dataset reads one by one: give class folders"
        )
    labels = [images.labels_of(index) or (-1,) for index in range(len(images))]
    count = Counter(label for several in labels for label in several)
    return torch.tensor([sum(1 / count[label] for label in several) for several in labels], dtype=torch.float64)


def split_folder(data: Path, split: str, option: str) -> Path:
    """Return the folder of a split; "val" and "validation" are equivalent, as in timm.

    Raises:
        InputError: if the folder does not exist.
    """
    names = _NAMES.get(split, (split,))
    found = next((data / name for name in names if os.path.isdir(data / name)), None)
    if found is None:
        raise InputError(
            f"{str(data)!r} has no folder {' or '.join(map(repr, names))}, but training takes --data DIR with "
            f"DIR/{split}/CLASS/IMAGE: check --data and {option}"
        )
    return found


def medium_to_train(args: TrainOptions) -> Medium:
    """Return the medium of the training files."""
    name = args.dataset
    return IMAGES if name is not None else medium_of(place_of(args, args.train_split, "--train-split"))


def place_of(args: TrainOptions, split: str, option: str) -> Path:
    """Return the folder of a split; with files of labels also the folder of all files."""
    if args.several and not any(os.path.isdir(args.folder / name) for name in _NAMES.get(split, (split,))):
        return args.folder
    return split_folder(args.folder, split, option)


def open_split(
    args: TrainOptions,
    split: str,
    option: str,
    transform: Any,
    num_classes: int | None,
    medium: Medium = IMAGES,
    label_names: Sequence[str] | None = None,
) -> AnyImages:
    """Open the class folders of a split, its files with several labels, or a named data set.

    Classes have the order of `label_names`, which are those of the model, if these are the names of the data.

    Raises:
        InputError: if there is no such split, or it cannot be read by index.
    """
    name, classes = args.dataset, class_map_for(args)
    if args.several:
        labels = labels_of(args, option)
        own = classes_in(labels_of(args, "--train-split"))
        same = label_names is not None and set(own) <= set(label_names)
        names = None if classes is not None else label_names if same else own
        return LabelledFiles(place_of(args, split, option), labels, transform, num_classes, names, classes, medium)
    if name is None:
        folder = split_folder(args.folder, split, option)
        return ClassFolder(folder, transform, num_classes, label_names, classes, medium)
    *others, last = _NAMES.get(split, (split,))
    for one in others:
        with contextlib.suppress(InputError):
            return _by_index(labelled(name, args.data, one, transform, num_classes, label_names, classes))
    return _by_index(labelled(name, args.data, last, transform, num_classes, label_names, classes))


def labels_of(args: TrainOptions, option: str) -> Path:
    """Return the file of labels of a split, which `option` names."""
    found = args.train_labels if option == "--train-split" else args.val_labels
    assert found is not None  # checked when the options were made
    return beside(found, args.folder)


def _by_index(found: Labelled | LabelledStream) -> Labelled:
    if isinstance(found, LabelledStream):
        raise InputError(
            f"--dataset {found.name} is a stream, but the order of training is one of numbered images: give hfds/… or class folders"
        )
    return found


def class_map_for(args: TrainOptions) -> Path | None:
    """Return the file of class names, whose path may begin at the folder of the data; `None` if there is none."""
    return args.class_map if args.class_map is None or args.data is None else beside(args.class_map, args.data)


def count_classes(args: TrainOptions) -> int:
    """Return the number of classes of the training data."""
    classes = class_map_for(args)
    if classes is not None:
        return len(read_class_map(classes, "the class map"))
    if args.dataset is not None:
        return open_split(args, args.train_split, "--train-split", None, None).num_classes
    if args.several:
        return len(classes_in(labels_of(args, "--train-split")))
    folder = split_folder(args.folder, args.train_split, "--train-split")
    found = sum(path.is_dir() for path in folder.iterdir())
    if not found:
        raise InputError(
            f"{str(folder)!r} holds no folders, but one per class was expected: give class folders, or --train-labels FILE"
        )
    return found


_NAMES = {"val": ("val", "validation"), "validation": ("validation", "val")}
"""Equivalent names of splits, as in timm."""


def make_loader(dataset: Dataset[Any], sampler: Sampler[Any], workers: int) -> DataLoader[Any]:
    """Return the loader of an epoch; its workers start in every epoch, so that they receive its number."""
    return loader_of(dataset, workers, batch_sampler=sampler)


def fingerprint(folder: AnyImages) -> str:
    """Return a hash of names, sizes and labels of the images, which tells whether two runs use the same data."""
    digest = hashlib.sha256()
    if isinstance(folder, Labelled):
        digest.update(f"{folder.fingerprint()}\n{len(folder)}".encode())
        return digest.hexdigest()[:16]
    for path, label in folder.samples:
        digest.update(f"{path.relative_to(folder.root)}\0{path.stat().st_size}\0{label}\n".encode())
    return digest.hexdigest()[:16]
