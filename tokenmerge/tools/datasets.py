"""Labelled images from data sets other than class folders, by timm's names: hfds/, hfids/, wds/, tfds/ and torch/."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from tokenmerge.errors import DamagedFileError, InputError, TokenMergeError, nearest, shown
from tokenmerge.files import words_of
from tokenmerge.tools.folders import Item, class_map_of, labels_of
from tokenmerge.tools.media import IMAGES, Medium, medium_of
from tokenmerge.tools.readers import Arrow, ArrowStream, Reader, Shards, TensorFlow, Torchvision

PACKAGES = {
    "hfds": "datasets",
    "hfids": "datasets",
    "wds": "webdataset",
    "tfds": "tensorflow_datasets",
    "torch": "torchvision",
}
"""Package that reads the data sets of each prefix of timm."""


def _installed_by(package: str) -> str:
    """Return what pip installs a package by: an extra, where one of ours has it."""
    extra = {"datasets": "datasets", "webdataset": "datasets", "torchvision": "torchvision"}.get(package)
    return package.replace("_", "-") if extra is None else f"'tokenmerge[{extra}]'"


def medium_for(data: Path | None, dataset: str | None) -> Medium:
    """Return the medium of a named data set, or of a folder if none is named."""
    return IMAGES if dataset is not None or data is None else medium_of(data)


class _Labels:
    """What both kinds of data set share: transform, class names and the model output of each label."""

    medium = IMAGES
    left_out: Sequence[str] = ()

    def __init__(
        self,
        name: str,
        root: Path | None,
        reader: Reader,
        transform: Any,
        num_classes: int | None,
        label_names: Sequence[str] | None,
        class_map: Path | None,
    ) -> None:
        self.name, self.root, self.reader, self.transform = name, root, reader, transform
        known = reader.names
        if known is None and (class_map or num_classes is None):
            flag = "leave out --class-map" if class_map else "give --num-classes"
            raise InputError(f"--dataset {name} does not know the names of its classes: {flag}, or give class folders")
        self.outputs: dict[int, int] | None = None
        if known is not None:
            if class_map:
                of_name, every = class_map_of(list(known), class_map, root or Path(), num_classes)
            else:
                of_name = every = labels_of(
                    f"--dataset {name} holds {len(known)} classes", list(known), num_classes, label_names
                )
            self.outputs = {index: of_name[text] for index, text in enumerate(known)}
            by_output = {output: text for text, output in every.items()}
            num_classes = len(every) if num_classes is None else num_classes
            self.names = [by_output.get(output, str(output)) for output in range(num_classes)]
        else:
            assert num_classes is not None
            self.names = [str(output) for output in range(num_classes)]
        self.num_classes = num_classes

    def item(self, where: str, open_image: Callable[[], Any], label: Any) -> Item:
        """Return the transformed image (`None` if unreadable), its label, and the problem if there is one."""
        try:
            found = int(label)
            output = found if self.outputs is None else self.outputs[found]
            if not 0 <= output < self.num_classes:
                raise KeyError
        except (KeyError, ValueError, TypeError):
            return None, 0, f"{where}: its label {shown(label)} is none of the {self.num_classes} classes"
        try:
            return self.transform(open_image()), output, ""
        except DamagedFileError as error:
            return None, output, f"{where}: {error.reason}"

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells these data from others."""
        return {"dataset": self.name, "root": str(self.root), "identity": self.reader.identity}


class Labelled(_Labels, Dataset[Item]):
    """Data set whose images are read by index."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _Labels.__init__(self, *args, **kwargs)
        self.indices: Sequence[int] = range(self.reader.size or 0)

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, places: Sequence[int]) -> None:
        """Keep only the images at these places."""
        self.indices = [self.indices[place] for place in places]

    def name_of(self, place: int) -> str:
        """Return the name of an image, for messages."""
        return f"image {self.indices[place]}"

    def __getitem__(self, place: int) -> Item:
        """Return the transformed image (`None` if unreadable), its label, and the problem if it is unreadable."""
        index = self.indices[place]
        reader: Any = self.reader
        try:
            open_image, label = reader.read(index)
        except Exception as error:  # every library raises its own exception types
            return None, 0, f"image {index}: {words_of(error)}"
        return self.item(f"image {index}", open_image, label)


class LabelledStream(_Labels, IterableDataset[Item]):
    """Data set whose images come one after the other; processes and workers get different parts of it."""

    rank, processes = 0, 1

    def share(self, rank: int, processes: int) -> None:
        """Set which part of the processes' parts to read."""
        self.rank, self.processes = rank, processes

    def __iter__(self) -> Iterator[Item]:
        reader: Any = self.reader
        for where, open_image, label in reader.stream(self.rank, self.processes):
            yield (None, 0, where) if open_image is None else self.item(where, open_image, label)


def labelled(
    name: str,
    root: Path | None,
    split: str,
    transform: Any,
    num_classes: int | None,
    label_names: Sequence[str] | None = None,
    class_map: Path | None = None,
) -> Labelled | LabelledStream:
    """Open a data set by its name in timm; no code of it is run, and nothing pickled is read from its samples.

    Args:
        name: `hfds/NAME` and `hfids/NAME` (streamed) of Hugging Face or a folder, `wds/NAME` (shards in `root`), `tfds/NAME`, or
            `torch/NAME` of torchvision.
        root: folder of the data, or cache folder.
        split: name of the split; for wds also a pattern such as `shard-{0000..0009}.tar`.
        transform: function from an RGB image of Pillow to a tensor.
        num_classes: outputs of the model; `None` for a model whose classes are taken from the data.
        label_names: class names of the model in the order of its outputs, if known.
        class_map: file of class names, as for class folders.

    Raises:
        InputError: if the package is missing, the data cannot be read, or their classes do not fit the model.
    """
    prefix, slash, rest = name.partition("/")
    prefix = prefix.lower()
    if prefix not in PACKAGES or not slash:
        known = ", ".join(f"{one}/NAME" for one in PACKAGES)
        near = nearest(prefix, PACKAGES)
        hint = "" if near is None else f": did you mean {near}/?"
        raise InputError(
            f"--dataset {shown(name)} is unknown, but one of {known} was expected, or class folders without it{hint}"
        )
    package = PACKAGES[prefix]
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise InputError(
            f"{package} is not installed, but --dataset {prefix}/… is read by it: pip install {_installed_by(package)}"
        ) from None
    opened: dict[str, Callable[[Any, str, Any, str], Reader]] = {
        "hfds": Arrow,
        "hfids": ArrowStream,
        "wds": Shards,
        "tfds": TensorFlow,
        "torch": Torchvision,
    }
    try:
        with _quiet():
            reader = opened[prefix](module, rest, root, split)
    except TokenMergeError:
        raise
    except Exception as error:  # every library raises its own exception types
        raise InputError(
            f"--dataset {name} cannot be opened ({type(error).__name__}: {words_of(error)}): check the name, --split {split} and that the "
            "network is there if it is to be downloaded"
        ) from None
    kind = LabelledStream if hasattr(reader, "stream") else Labelled
    return kind(name, root, reader, transform, num_classes, label_names, class_map)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
