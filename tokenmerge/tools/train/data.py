"""Training images, whose order and augmentation depend only on the seed, the epoch and the image.

A killed run can therefore resume at any update without stored random generators and with any number of workers, and the
images of an update do not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tokenmerge.errors import InputError
from tokenmerge.tools.datasets import Labelled, LabelledStream, labelled
from tokenmerge.tools.folders import ClassFolder, loader_of
from tokenmerge.tools.media import IMAGES, Medium, medium_of
from tokenmerge.tools.train.options import TrainOptions

Sample = tuple[int, int]
"""Index of an image, and index of its repeat within the epoch."""
_TRIES = 50


def seed_all(*key: Any) -> None:
    """Seed the random generators of Python, NumPy and torch from a hash of `key`."""
    value = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


class Augmented(Dataset[tuple[Tensor | None, int, str]]):
    """Data set of training images; an unreadable image is replaced by the next one and reported.

    Args:
        folder: the images, with their transform.
        seed: random seed of the run.
    """

    def __init__(self, folder: ClassFolder | Labelled, seed: int) -> None:
        self.folder, self.seed, self.epoch = folder, seed, 0

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, sample: Sample) -> tuple[Tensor | None, int, str]:
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

    Raises:
        InputError: if there are fewer images than one update needs.
    """

    def __init__(self, size: int, args: TrainOptions, rank: int, processes: int) -> None:
        self.size, self.args, self.rank, self.processes = size, args, rank, processes
        self.epoch, self.start = 0, 0
        self.updates = size // args.global_batch(processes)
        if not self.updates:
            raise InputError(
                f"{size} training images are fewer than the {args.global_batch(processes)} of one update "
                f"(batch {args.batch_size} × {args.grad_accum_steps} steps × {processes} processes): give a smaller --batch-size"
            )

    def __len__(self) -> int:
        return (self.updates - self.start) * self.args.grad_accum_steps

    def samples(self) -> list[Sample]:
        """Return all samples of the epoch in order; with repeats, an epoch keeps its length, and copies are adjacent."""
        generator = torch.Generator().manual_seed((self.args.seed << 20) + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        repeats = self.args.aug_repeats
        return [(order[place // repeats], place % repeats) for place in range(self.size)]

    def __iter__(self) -> Iterator[list[Sample]]:
        order, batch = self.samples(), self.args.batch_size
        steps = self.args.grad_accum_steps
        for step in range(self.start * steps, self.updates * steps):
            first = (step * self.processes + self.rank) * batch
            yield order[first : first + batch]


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
    return IMAGES if name is not None else medium_of(split_folder(args.folder, args.train_split, "--train-split"))


def open_split(
    args: TrainOptions, split: str, option: str, transform: Any, num_classes: int | None, medium: Medium = IMAGES
) -> ClassFolder | Labelled:
    """Open the class folders of a split, or a named data set.

    Raises:
        InputError: if there is no such split, or it cannot be read by index.
    """
    name = args.dataset
    if name is None:
        return ClassFolder(split_folder(args.folder, split, option), transform, num_classes, medium=medium)
    *others, last = _NAMES.get(split, (split,))
    for one in others:
        with contextlib.suppress(InputError):
            return _by_index(labelled(name, args.data, one, transform, num_classes))
    return _by_index(labelled(name, args.data, last, transform, num_classes))


def _by_index(found: Labelled | LabelledStream) -> Labelled:
    if isinstance(found, LabelledStream):
        raise InputError(
            f"--dataset {found.name} is a stream, but the order of training is one of numbered images: give hfds/… or class folders"
        )
    return found


def count_classes(args: TrainOptions) -> int:
    """Return the number of classes of the training data."""
    if args.dataset is not None:
        return open_split(args, args.train_split, "--train-split", None, None).num_classes
    return sum(path.is_dir() for path in split_folder(args.folder, args.train_split, "--train-split").iterdir())


_NAMES = {"val": ("val", "validation"), "validation": ("validation", "val")}
"""Equivalent names of splits, as in timm."""


def make_loader(dataset: Dataset[Any], sampler: Sampler[Any], workers: int) -> DataLoader[Any]:
    """Return the loader of an epoch; its workers start in every epoch, so that they receive its number."""
    return loader_of(dataset, workers, batch_sampler=sampler)


def fingerprint(folder: ClassFolder | Labelled) -> str:
    """Return a hash of names, sizes and labels of the images, which tells whether two runs use the same data."""
    digest = hashlib.sha256()
    if isinstance(folder, Labelled):
        digest.update(f"{folder.fingerprint()}\n{len(folder)}".encode())
        return digest.hexdigest()[:16]
    for path, label in folder.samples:
        digest.update(f"{path.relative_to(folder.root)}\0{path.stat().st_size}\0{label}\n".encode())
    return digest.hexdigest()[:16]
