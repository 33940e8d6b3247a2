"""Labelled files from class folders; damaged files are listed instead of raising."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from tokenmerge.errors import DamagedFileError, InputError
from tokenmerge.tools.media import IMAGES, Medium
from tokenmerge.tools.reading.documents import read_class_map
from tokenmerge.tools.reading.walk import Walk, natural_key
from tokenmerge.tools.signals import in_worker


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        images: `[b, C, H, W]` for images.
        labels: `[b]` int64; of files with several labels `[b, classes]` float32.
        skipped: "file: reason" for each unreadable file.
    """

    images: Tensor
    labels: Tensor
    skipped: tuple[str, ...]


Item = tuple[Tensor | None, Any, str]
"""Transformed file (`None` if unreadable), its label or target, and "file: reason" if it is unreadable."""


class Files(Dataset[Item]):
    """Base of data sets of files.

    Attributes:
        root: folder of the files.
        transform: function from a decoded file to a tensor.
        medium: kind of the files.
        samples: the files, each with its label; with several labels with the tuple of them.
        names: class names in the order of the model's outputs.
        num_classes: number of classes.
        left_out: "path: reason" of files that are no samples.
    """

    root: Path
    transform: Any
    medium: Medium
    samples: list[tuple[Path, Any]]
    names: list[str]
    num_classes: int
    left_out: Sequence[str]

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, places: Sequence[int]) -> None:
        """Keep only the files at these places."""
        self.samples = [self.samples[place] for place in places]

    def name_of(self, index: int) -> str:
        """Return the name of a file, for messages."""
        return self.samples[index][0].name

    def fingerprint(self) -> dict[str, Any]:
        """Return the names and sizes of the files, to tell these data from others."""
        files = [(str(path.relative_to(self.root)), path.stat().st_size) for path, _ in self.samples]
        return {"root": str(self.root.resolve()), "files": files}

    def labels_of(self, index: int) -> tuple[int, ...]:
        """Return the labels of a file."""
        label = self.samples[index][1]
        return label if isinstance(label, tuple) else (label,)

    def target(self, label: Any) -> Any:
        """Return what the loss compares an output with: the label itself, if a file has one."""
        return label

    def check_decoded(self, path: Path, decoded: Any) -> None:
        """Raise `DamagedFileError` if a decoded file does not fit its label."""

    def __getitem__(self, index: int) -> Item:
        """Return the transformed file (`None` if unreadable), its target, and "file: reason" if it is unreadable."""
        path, label = self.samples[index]
        try:
            decoded = self.medium.read(path)
            self.check_decoded(path, decoded)
            return self.transform(decoded), self.target(label), ""
        except DamagedFileError as error:
            return None, self.target(label), f"{path.relative_to(self.root)}: {error.reason}"


class ClassFolder(Files):
    """Data set of files in one folder per class; `names` lists the classes in the order of the model's outputs.

    Args:
        root: folder with one subfolder per class.
        label_names: class names in the order of the model's outputs, or `None` if unknown.
        num_classes: outputs of the model; `None` for a model whose classes are taken from the data.
        transform: function from a decoded file, such as an RGB image of Pillow, to a tensor.
        class_map: text file of class names, one per line, as for timm's `--class-map`; a relative path may start at `root`.
        medium: kind of the files.

    Attributes:
        left_out: "path: reason" of pipes, devices, broken links and loops of links, which are no samples.

    Raises:
        InputError: if the folder is missing, has no such files or classes, or the classes do not fit the model.
    """

    def __init__(
        self,
        root: Path,
        transform: Any,
        num_classes: int | None,
        label_names: Sequence[str] | None = None,
        class_map: Path | None = None,
        medium: Medium = IMAGES,
    ) -> None:
        if os.path.isfile(root):  # False for a name that is too long, where a Path would raise
            raise InputError(
                f"{str(root)!r} is a file, but a folder with one folder of {medium.name} per class was expected: check --data"
            )
        if not os.path.isdir(root):
            raise InputError(
                f"the data folder {str(root)!r} does not exist, but one folder per class was expected there: check --data"
            )
        walk = Walk(root, suffixes_of(medium))
        found = sorted(walk, key=natural_key)  # the order of timm
        self.left_out = walk.left_out
        if not found:
            odd = f" except {len(self.left_out)} that are no files, such as {self.left_out[0]}" if self.left_out else ""
            raise InputError(
                f"the data folder {str(root)!r} holds no {medium.name}{odd}, but one folder of {medium.name} per class was expected: "
                "check --data"
            )
        if root in (file.parent for file in found):
            raise InputError(
                f"{medium.name} lie directly in {str(root)!r} instead of in one folder per class, so they have no labels: "
                "move them into class folders, or give the folder above"
            )
        _check_one_place(root, [file.parent for file in found])
        self.root, self.transform, self.medium = root, transform, medium
        folders = sorted({file.parent.name for file in found}, key=natural_key)
        if class_map:
            labels, every = class_map_of(folders, class_map, root, num_classes)
        else:
            labels = every = labels_of(
                f"{str(root)!r} holds {len(folders)} class folders", folders, num_classes, label_names
            )
        self.samples = [(file, labels[file.parent.name]) for file in found]
        by_label = {label: name for name, label in every.items()}
        self.num_classes = len(every) if num_classes is None else num_classes
        self.names = [by_label.get(label, str(label)) for label in range(self.num_classes)]


def suffixes_of(medium: Medium) -> frozenset[str]:
    """Return the file name suffixes of a medium in lower case."""
    if medium.suffixes is not None:
        return frozenset(medium.suffixes)
    from timm.data.readers.img_extensions import get_img_extensions

    return frozenset(get_img_extensions(as_set=True))


def _check_one_place(root: Path, parents: list[Path]) -> None:
    """Raise if two folders share the name of a class, as `train/cat` and `val/cat`, because they would be mixed."""
    place: dict[str, Path] = {}
    for parent in dict.fromkeys(parents):
        first = place.setdefault(parent.name, parent)
        if first != parent:
            raise InputError(
                f"{str(root)!r} holds the class {parent.name!r} twice, in {first.relative_to(root)} and "
                f"{parent.relative_to(root)}, but one folder per class was expected: give one of the folders above them"
            )


def class_map_of(
    folders: list[str], class_map: Path, root: Path, num_classes: int | None, what: str = "class folders"
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the model output of each folder name, and of all names, from the file given by `--class-map`."""
    whole = os.path.exists(class_map) or class_map.is_absolute()
    known = read_class_map(class_map if whole else root / class_map, "the class map")
    if num_classes is not None and len(known) != num_classes:
        raise InputError(
            f"the class map {str(class_map)!r} lists {len(known)} classes, but the model has {num_classes} outputs: give one per output"
        )
    strange = [name for name in folders if name not in known]
    if strange:
        raise InputError(
            f"{len(strange)} {what} such as {strange[0]!r} are not in the class map {str(class_map)!r}: add them, or give another map"
        )
    return {name: known[name] for name in folders}, known


def labels_of(
    source: str, classes: list[str], num_classes: int | None, label_names: Sequence[str] | None
) -> dict[str, int]:
    """Return the model output of each class name, by name if the model knows its class names, otherwise by order.

    Args:
        source: the data and its number of classes, for messages.
        classes: class names of the data.
        num_classes: outputs of the model; `None` if they are taken from the data.
        label_names: class names of the model, if known.

    Raises:
        InputError: if the numbers of classes differ, and the model does not know the names.
    """
    num_classes = len(classes) if num_classes is None else num_classes
    for names in (label_names, _imagenet_names() if num_classes == 1000 else None):
        if names and len(names) == num_classes and set(classes) <= set(names):
            return {name: list(names).index(name) for name in classes}
    if len(classes) != num_classes:
        raise InputError(
            f"{source}, but the model has {num_classes} outputs and does not know "
            "these names: give --class-map with all class names in order, or the model's own --num-classes"
        )
    return {name: index for index, name in enumerate(classes)}


def _imagenet_names() -> list[str]:
    from timm.data.imagenet_info import ImageNetInfo

    return [str(name) for name in ImageNetInfo("imagenet-1k").label_names()]


def collate(samples: list[Item]) -> Batch:
    """Collate samples into one batch, with the unreadable files listed."""
    read = [(image, label) for image, label, _ in samples if image is not None]
    images = torch.stack([image for image, _ in read]) if read else torch.empty(0)
    several = bool(read) and isinstance(read[0][1], Tensor)
    labels = torch.stack([label for _, label in read]) if several else torch.tensor([label for _, label in read])
    labels = labels if several else labels.to(torch.int64)
    return Batch(images, labels, tuple(line for *_, problem in samples for line in problem.splitlines()))


class ShareOfBatches(Sampler[list[int]]):
    """Sampler of every `processes`-th batch, in order, so that each image is evaluated by exactly one process."""

    def __init__(self, size: int, batch: int, rank: int, processes: int) -> None:
        self.starts = range(rank * batch, size, batch * processes)
        self.size, self.batch = size, batch

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.starts:
            yield list(range(start, min(start + self.batch, self.size)))


def loader_of(dataset: Any, workers: int, **order: Any) -> DataLoader[Any]:
    """Return a loader of batches; `order` says how it draws them: a `batch_size` or a `batch_sampler`."""
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=in_worker,
        **order,
    )


def batches(dataset: Any, batch_size: int, workers: int, rank: int = 0, processes: int = 1) -> DataLoader[Any]:
    """Return a loader of this process's share of the data set, in order; a stream divides itself among processes and workers."""
    if isinstance(dataset, IterableDataset):
        dataset.share(rank, processes)  # type: ignore[attr-defined]
        return loader_of(dataset, workers, batch_size=batch_size)
    share = ShareOfBatches(len(dataset), batch_size, rank, processes)
    return loader_of(dataset, workers, batch_sampler=share)
