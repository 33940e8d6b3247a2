"""Readers of data sets for the tools' own labels: no code of a data set is run, and nothing pickled is decoded."""

from __future__ import annotations

import importlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import get_worker_info

from tokenmerge.errors import InputError, shown
from tokenmerge.files import plain_file, read_json, words_of
from tokenmerge.tools.reading.damage import damaged
from tokenmerge.tools.reading.pictures import decode_picture

_IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
_INFO = ("_info.json", "info.json")


class Reader:
    """Reader of raw samples.

    Attributes:
        names: class names in the order of the labels; `None` if the data set does not know them.
        size: number of samples; `None` if unknown.
        identity: text that tells these data from others.
    """

    names: Sequence[str] | None = None
    size: int | None = None
    identity: str = ""


def _decoded(data: bytes) -> Image.Image:
    return decode_picture(data, "the image")


def _opener(found: Any) -> Callable[[], Image.Image]:
    """Return a function that decodes an undecoded image of the package datasets."""

    def opened() -> Image.Image:
        if not isinstance(found, dict) or not (found.get("bytes") or found.get("path")):
            raise damaged("the image", "it holds no image")
        data = found.get("bytes") or plain_file(found["path"], "the image").read_bytes()
        return _decoded(data)

    return opened


def _check_version(module: Any) -> None:
    if int(module.__version__.split(".")[0]) < 4:  # older versions may run scripts of data sets
        raise InputError(
            f"datasets {module.__version__} is too old, but 4 or newer was expected: pip install -U datasets"
        )
    module.disable_progress_bars()


def _columns(features: Any, name: str) -> Sequence[str] | None:
    """Return the class names of the features, after checking that they have images and labels."""
    if features is None:
        return None
    missing = [column for column in ("image", "label") if column not in features]
    if missing:
        raise InputError(
            f"the data set {shown(name)} has the columns {', '.join(features)}, but one named {missing[0]!r} was expected: rename it"
        )
    names = getattr(features["label"], "names", None)
    return None if names is None else list(names)


class Arrow(Reader):
    """Data set of the package datasets, read by index."""

    def __init__(self, module: Any, name: str, root: Path, split: str) -> None:
        _check_version(module)
        data = module.load_dataset(name, split=split, cache_dir=str(root))
        self.names = _columns(data.features, name)
        self.data = data.cast_column("image", module.Image(decode=False))
        self.size, self.identity = len(data), str(data._fingerprint)

    def read(self, index: int) -> tuple[Callable[[], Any], Any]:
        """Return a function that decodes an image, and its label."""
        item = self.data[index]
        return _opener(item["image"]), item["label"]


class ArrowStream(Reader):
    """Data set of the package datasets, streamed."""

    def __init__(self, module: Any, name: str, root: Path, split: str) -> None:
        _check_version(module)
        data = module.load_dataset(name, split=split, cache_dir=str(root), streaming=True)
        self.names = _columns(data.features, name)
        self.data = data.cast_column("image", module.Image(decode=False))
        splits = data.info.splits or {}
        self.size = getattr(splits.get(split), "num_examples", None) or None
        self.identity = split

    def stream(self, rank: int, processes: int) -> Iterator[tuple[str, Any, Any]]:
        """Yield the place of each image, a function that decodes it, and its label; for a problem only its words."""
        split = importlib.import_module("datasets.distributed").split_dataset_by_node
        data = split(self.data, rank=rank, world_size=processes)  # and datasets divides it among workers
        worker = get_worker_info()
        place = (
            f"{'' if processes == 1 else f'process {rank}, '}{'' if worker is None else f'worker {worker.id}, '}image"
        )
        iterator = iter(data)
        for number in itertools.count():
            try:
                item = next(iterator)
            except StopIteration:
                return
            except Exception as error:  # a damaged file ends the stream
                yield f"{place} {number} and all after it: {words_of(error)}", None, None
                return
            yield f"{place} {number}", _opener(item.get("image")), item.get("label")


def _inside(root: Path, name: str) -> Path:
    """Return the path of a shard, after checking that it is a regular file below the folder."""
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(root):
        raise InputError(f"the shard {shown(name)} lies outside {shown(str(root))}: check the list of shards")
    return plain_file(path, "the shard")


class Shards(Reader):
    """Shards of webdataset in a folder; only images, `cls` and JSON labels are decoded."""

    def __init__(self, module: Any, name: str, root: Path, split: str) -> None:
        if not root.is_dir():
            raise InputError(
                f"{shown(str(root))} is not a folder, but one with the shards of wds/{name} was expected: check --data"
            )
        self.target = ""
        info: Any = {}
        file = next((root / one for one in _INFO if (root / one).exists()), None)
        if file is not None:
            found = read_json(file, "the description of the shards")
            info = found.get("splits", {}) if isinstance(found, dict) else {}
        entry = info.get(split) if isinstance(info, dict) else None
        if isinstance(entry, dict) and isinstance(entry.get("filenames"), list):
            files, count = [str(one) for one in entry["filenames"]], entry.get("num_samples")
            self.target = str(entry.get("alt_label") or "")
        elif ".tar" in split or ".." in split:
            pattern, _, number = split.partition("|")
            files = importlib.import_module("webdataset.shardlists").expand_urls(pattern)
            count = int(number) if number.isdecimal() else None
        else:
            raise InputError(
                f"{shown(str(root))} describes no split {split!r} in _info.json: give --split with a pattern such as "
                "'shard-{0000..0009}.tar'"
            )
        # regular files below the folder only, because webdataset would run a "pipe:" name as a command
        self.paths = [_inside(root.resolve(), one) for one in files]
        self.size = count if isinstance(count, int) and count > 0 else None
        self.identity = json.dumps([(path.name, path.stat().st_size) for path in self.paths])

    def stream(self, rank: int, processes: int) -> Iterator[tuple[str, Any, Any]]:
        """Yield the place of each image, a function that decodes it, and its label; for a problem only its words."""
        worker = get_worker_info()
        index, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for path in self.paths[rank * count + index :: processes * count]:
            yield from self._shard(path)

    def _shard(self, path: Path) -> Iterator[tuple[str, Any, Any]]:
        tar = importlib.import_module("webdataset.tariterators")
        wanted = {*_IMAGE_KEYS, "cls", "json"}
        try:
            with path.open("rb") as stream:
                parts = tar.tar_file_expander(iter([{"url": str(path), "stream": stream}]))
                for sample in tar.group_by_keys(parts, suffixes=wanted):
                    yield self._sample(f"{path.name}, {sample['__key__']}", sample)
        except Exception as error:  # a shard that is cut, or no tar file
            yield f"{path.name}: the rest of it cannot be read ({words_of(error)})", None, None

    def _sample(self, where: str, sample: dict[str, Any]) -> tuple[str, Any, Any]:
        data = next((sample[key] for key in _IMAGE_KEYS if key in sample), None)
        if data is None:
            return f"{where}: it holds no {', '.join(_IMAGE_KEYS)}", None, None
        try:
            label = json.loads(sample["json"])[self.target] if self.target else sample["cls"].decode().strip()
        except (KeyError, ValueError, TypeError, RecursionError):
            return f"{where}: it has no label in {f'json ({self.target})' if self.target else 'cls'}", None, None
        return where, lambda: _decoded(data), label


class TensorFlow(Reader):
    """Data set of tensorflow_datasets, by timm's reader."""

    def __init__(self, module: Any, name: str, root: Path, split: str) -> None:
        from timm.data import create_dataset

        if ":" in name:  # a data set of a community, whose code would be run
            raise InputError(
                f"tfds/{name} is made by code of its own, which is never run: give a data set of tensorflow_datasets"
            )
        self.data = create_dataset(f"tfds/{name}", root=str(root), split=split, is_training=False, batch_size=1)
        classes = getattr(self.data.reader, "class_to_idx", None) or {}
        self.names = sorted(classes, key=classes.__getitem__) or None
        self.size, self.identity = getattr(self.data.reader, "num_samples", None), split

    def stream(self, rank: int, processes: int) -> Iterator[tuple[str, Any, Any]]:
        """Yield the place of each image, a function that decodes it, and its label; for a problem only its words."""
        worker = get_worker_info()
        reader = self.data.reader
        reader.dist_rank, reader.dist_num_replicas = rank, processes
        self.data.set_loader_cfg(1 if worker is None else worker.num_workers)
        for number, (image, label) in enumerate(reader):
            yield f"image {number}", lambda image=image: image.convert("RGB"), label


class Torchvision(Reader):
    """Data set of torchvision that is on this machine already."""

    def __init__(self, module: Any, name: str, root: Path, split: str) -> None:
        from timm.data import create_dataset

        data = create_dataset(f"torch/{name}", root=str(root), split=split, download=False)
        classes = getattr(data, "wnids", None) or getattr(data, "classes", None)
        self.data, self.size, self.identity = data, len(data), split
        self.names = None if classes is None else [str(one) for one in classes]

    def read(self, index: int) -> tuple[Callable[[], Any], Any]:
        """Return a function that decodes an image, and its label."""
        image, label = self.data[index]
        return lambda: image.convert("RGB"), label
