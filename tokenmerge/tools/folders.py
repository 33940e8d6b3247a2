"""Labelled files from class folders; damaged files are listed instead of raising."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tokenmerge.errors import InputError
from tokenmerge.tools.media import IMAGES, Medium


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        images: `[b, C, H, W]` for images.
        labels: `[b]` int64.
        skipped: "file: reason" for each unreadable file.
    """

    images: Tensor
    labels: Tensor
    skipped: tuple[str, ...]


class ClassFolder(Dataset[tuple[Tensor | None, int, str]]):
    """Data set of files in one folder per class; `names` lists the classes in the order of the model's outputs.

    Args:
        root: folder with one subfolder per class.
        label_names: class names in the order of the model's outputs, or `None` if unknown.
        num_classes: outputs of the model.
        transform: function from a decoded file, such as an RGB image of Pillow, to a tensor.
        class_map: file of class names, as for timm's `--class-map`.
        medium: kind of the files.

    Raises:
        InputError: if the folder is missing, has no such files or classes, or the classes do not fit the model.
    """

    def __init__(
        self,
        root: Path,
        transform: Any,
        num_classes: int,
        label_names: Sequence[str] | None = None,
        class_map: str | None = None,
        medium: Medium = IMAGES,
    ) -> None:
        from timm.data.readers.reader_image_folder import find_images_and_targets

        if root.is_file():
            raise InputError(
                f"{str(root)!r} is a file, but a folder with one folder of {medium.name} per class was expected: check --data"
            )
        if not root.is_dir():
            raise InputError(
                f"the data folder {str(root)!r} does not exist, but one folder per class was expected there: check --data"
            )
        samples, classes = find_images_and_targets(str(root), types=medium.suffixes)
        if not samples:
            raise InputError(
                f"the data folder {str(root)!r} holds no {medium.name}, but one folder of {medium.name} per class was expected: "
                "check --data"
            )
        if "" in classes:
            raise InputError(
                f"{medium.name} lie directly in {str(root)!r} instead of in one folder per class, so they have no labels: "
                "move them into class folders, or give the folder above"
            )
        _check_one_place(root, [Path(file).parent for file, _ in samples])
        self.root, self.transform, self.medium = root, transform, medium
        folders = sorted(classes, key=classes.__getitem__)
        if class_map:
            labels = _mapped(folders, class_map, root, num_classes)
        else:
            labels = _labels(root, folders, num_classes, label_names)
        names = {index: name for name, index in classes.items()}
        self.samples = [(Path(file), labels[names[target]]) for file, target in samples]
        by_label = {label: name for name, label in labels.items()}
        self.num_classes = num_classes
        self.names = [by_label.get(label, str(label)) for label in range(num_classes)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, str]:
        """Return the transformed file (`None` if unreadable), its label, and "file: reason" if it is unreadable."""
        path, label = self.samples[index]
        try:
            return self.transform(self.medium.read(path)), label, ""
        except self.medium.unreadable as error:
            reason = " ".join(str(error).replace(str(path), path.name).split()) or type(error).__name__
            return None, label, f"{path.relative_to(self.root)}: {reason}"


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


def _mapped(folders: list[str], class_map: str, root: Path, num_classes: int) -> dict[str, int]:
    """Return the model output of each folder name, from the file given by `--class-map`."""
    from timm.data.readers.class_map import load_class_map

    try:
        known: dict[str, int] = load_class_map(class_map, str(root))
    except Exception as error:  # may be an assertion, pickle or file error
        raise InputError(
            f"the class map {class_map!r} cannot be read ({error}): give a text file with one class per line"
        ) from None
    if len(known) != num_classes:
        raise InputError(
            f"the class map {class_map!r} lists {len(known)} classes, but the model has {num_classes} outputs: give one per output"
        )
    strange = [name for name in folders if name not in known]
    if strange:
        raise InputError(
            f"{len(strange)} class folders such as {strange[0]!r} are not in the class map {class_map!r}: add them, or give another map"
        )
    return {name: known[name] for name in folders}


def _labels(root: Path, classes: list[str], num_classes: int, label_names: Sequence[str] | None) -> dict[str, int]:
    """Return the model output of each folder name, by name if the model knows its class names, otherwise by order."""
    for names in (label_names, _imagenet_names() if num_classes == 1000 else None):
        if names and len(names) == num_classes and set(classes) <= set(names):
            return {name: list(names).index(name) for name in classes}
    if len(classes) != num_classes:
        raise InputError(
            f"{str(root)!r} holds {len(classes)} class folders, but the model has {num_classes} outputs and does not know "
            "these names: give --class-map with all class names in order, or the model's own --num-classes"
        )
    return {name: index for index, name in enumerate(classes)}


def _imagenet_names() -> list[str]:
    from timm.data.imagenet_info import ImageNetInfo

    return [str(name) for name in ImageNetInfo("imagenet-1k").label_names()]


def collate(samples: list[tuple[Tensor | None, int, str]]) -> Batch:
    """Collate samples into one batch, with the unreadable files listed."""
    read = [(image, label) for image, label, _ in samples if image is not None]
    images = torch.stack([image for image, _ in read]) if read else torch.empty(0)
    labels = torch.tensor([label for _, label in read], dtype=torch.int64)
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


def batches(dataset: ClassFolder, batch_size: int, workers: int, rank: int = 0, processes: int = 1) -> DataLoader[Any]:
    """Return a loader of this process's share of the data set, in order."""
    share = ShareOfBatches(len(dataset), batch_size, rank, processes)
    return DataLoader(
        dataset,
        batch_sampler=share,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )
