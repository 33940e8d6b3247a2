"""Files with several labels each, listed in a CSV file in the form of AudioSet's segments."""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenmerge.errors import InputError, nearest, shown
from tokenmerge.files import read_text
from tokenmerge.tools.folders import Files, class_map_of, suffixes_of
from tokenmerge.tools.media import IMAGES, SOUNDS, Medium
from tokenmerge.tools.reading.damage import damaged
from tokenmerge.tools.reading.documents import MOST_NAME
from tokenmerge.tools.reading.walk import Walk, natural_key

_MOST_BYTES = 2**28
"""Largest size of a file of labels; AudioSet's of two million clips has 100 MB."""
_SLACK = 1.0
"""Seconds by which a file may be longer than its segment, because codecs pad."""
_HEADERS = ("ytid", "filename", "file", "fname", "id")


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a file of labels.

    Attributes:
        name: name of a file, with or without its suffix.
        labels: its labels.
        seconds: length of the segment that the file holds; `None` if the line does not say.
    """

    name: str
    labels: tuple[str, ...]
    seconds: float | None = None


def read_labels(path: Path) -> list[Line]:
    """Return the lines of a file of labels.

    A line is `name, start, end, "label,label"`, as AudioSet's are, or `name, "label,label"`. Empty lines, lines that begin with
    `#`, and a first line of headings are passed over.

    Raises:
        InputError: if the file cannot be read, has no lines, or a line has another form.
    """
    text = read_text(path, "the file of labels", _MOST_BYTES)
    found: list[Line] = []
    known: dict[str, int] = {}
    for number, part in enumerate(
        text.split("\n"), 1
    ):  # (each line alone, or a quote that is not closed would swallow others)
        try:
            row = next(csv.reader([part.removesuffix("\r")], skipinitialspace=True, strict=True), [])
        except csv.Error as error:
            raise _odd(path, number, f"is no CSV ({error})") from None
        if not row or row[0].startswith("#") or (not found and row[0].strip().lower() in _HEADERS):
            continue
        line = _line(path, number, [cell.strip() for cell in row])
        if line.name in known:
            raise _odd(path, number, f"names {shown(line.name)} again, after line {known[line.name]}")
        known[line.name] = number
        found.append(line)
    if not found:
        raise InputError(f"the file of labels {shown(str(path))} has no lines, but one per file was expected: check it")
    return found


def _line(path: Path, number: int, cells: list[str]) -> Line:
    if len(cells) not in (2, 4) or not cells[0]:
        raise _odd(path, number, f"has {len(cells)} columns")
    seconds = None
    if len(cells) == 4:
        try:
            start, end = float(cells[1]), float(cells[2])
        except ValueError:
            raise _odd(path, number, f"has {shown(cells[1])} and {shown(cells[2])} as start and end") from None
        seconds = end - start
        if not math.isfinite(seconds) or start < 0 or seconds <= 0:
            raise _odd(path, number, f"starts at {cells[1]} and ends at {cells[2]} seconds")
    labels = [label.strip() for label in cells[-1].split(",") if label.strip()]
    odd = next((one for one in labels if len(one) > MOST_NAME or not one.isprintable() or '"' in one), None)
    if odd is not None:
        raise _odd(path, number, f"has the label {shown(odd)}")
    return Line(cells[0], tuple(dict.fromkeys(labels)), seconds)


def _odd(path: Path, number: int, reason: str) -> InputError:
    return InputError(
        f'line {number} of the file of labels {shown(str(path))} {reason}, but NAME, START, END, "LABEL,LABEL" or NAME, "LABEL,LABEL" was '
        "expected, each file once: correct it"
    )


def beside(labels: Path, data: Path) -> Path:
    """Return the path of a file of labels, which may begin at the folder of the data."""
    return labels if labels.is_absolute() or os.path.exists(labels) else data / labels


def classes_in(path: Path) -> list[str]:
    """Return all labels of a file of labels, in natural order."""
    try:
        found = os.stat(path)
    except OSError:
        return _classes_of(read_labels(path))  # which says what is wrong
    return list(_classes_in(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)))


@functools.lru_cache(maxsize=4)  # `train` asks for each split, and AudioSet's file has two million lines
def _classes_in(path: Path, version: tuple[int, ...]) -> list[str]:
    """Return the labels of one version of a file."""
    return _classes_of(read_labels(path))


def _classes_of(lines: Sequence[Line]) -> list[str]:
    return sorted({label for line in lines for label in line.labels}, key=natural_key)


class LabelledFiles(Files):
    """Data set of files with several labels each; the target of a file is 1 for each of its labels and 0 for all other classes.

    Args:
        root: folder of the files, which may lie in subfolders.
        labels: the file of labels.
        transform: function from a decoded file to a tensor.
        num_classes: outputs of the model; `None` takes the classes from the file of labels.
        label_names: class names in the order of the model's outputs, or `None` if unknown.
        class_map: file of class names in that order.
        medium: kind of the files.

    Attributes:
        left_out: "name: reason" of lines without a file, and of pipes, devices and broken links.

    Raises:
        InputError: if the folder or the file of labels cannot be read, none of its files is there, or the labels do not fit the model.
    """

    def __init__(
        self,
        root: Path,
        labels: Path,
        transform: Any,
        num_classes: int | None,
        label_names: Sequence[str] | None = None,
        class_map: Path | None = None,
        medium: Medium = IMAGES,
    ) -> None:
        if not os.path.isdir(root):
            raise InputError(f"{str(root)!r} is not a folder, but one of {medium.name} was expected: check --data")
        lines = read_labels(labels)
        self.root, self.transform, self.medium = root, transform, medium
        self.names = _names(_classes_of(lines), labels, root, num_classes, label_names, class_map)
        self.num_classes = len(self.names)
        place = {name: index for index, name in enumerate(self.names)}
        walk = Walk(root, suffixes_of(medium))
        files = _by_name(walk)
        self.samples, self.left_out = [], list(walk.left_out)
        self._seconds: dict[Path, float | None] = {}
        by_path: dict[Path, str] = {}
        for line in lines:
            path = _found(files, line.name, root)
            if path is None:
                self.left_out.append(f"{line.name}: the file of labels names it, but it is not there")
            else:
                if path in by_path:
                    raise InputError(
                        f"{shown(str(labels))} names {path.name} twice, as {shown(by_path[path])} and {shown(line.name)}, but one line per file "
                        "was expected: remove one"
                    )
                by_path[path] = line.name
                self.samples.append((path, tuple(place[label] for label in line.labels)))
                self._seconds[path] = line.seconds
        if not self.samples:
            raise InputError(
                f"none of the {len(lines)} files in {shown(str(labels))}, such as {shown(lines[0].name)}, is among the {medium.name} in "
                f"{str(root)!r}: check --data and the names"
            )

        if not any(label for _, label in self.samples):
            raise InputError(
                f"no file in {shown(str(labels))} has a label, but some were expected: check its last column"
            )

    def target(self, label: Any) -> Tensor:
        """Return the target `[classes]` float32 of the labels of a file."""
        found = torch.zeros(self.num_classes)
        found[list(label)] = 1.0
        return found

    def check_decoded(self, path: Path, decoded: Any) -> None:
        """Raise `DamagedFileError` if a sound is longer than the segment that its labels are for."""
        seconds = self._seconds[path]
        if self.medium.name != SOUNDS.name or seconds is None:
            return
        length = len(decoded) / self.medium.rate
        if length > seconds + _SLACK:
            raise damaged(path, f"it lasts {length:.1f} s, but its line is about {seconds:.1f} s", "the segment alone")


def _by_name(walk: Walk) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in walk:
        for name in {path.name, path.stem}:
            found.setdefault(name, []).append(path)
    return found


def _found(files: dict[str, list[Path]], name: str, root: Path) -> Path | None:
    """Return the file of a line: `name` with or without its suffix, also with the Y that downloads of AudioSet put before it."""
    paths = files.get(name) or files.get(f"Y{name}") or []
    if len(paths) > 1:
        places = " and ".join(str(path.relative_to(root)) for path in sorted(paths)[:2])
        raise InputError(f"{shown(name)} names {places}, but one file was expected: give each another name")
    return paths[0] if paths else None


def _names(
    own: list[str],
    labels: Path,
    root: Path,
    num_classes: int | None,
    label_names: Sequence[str] | None,
    class_map: Path | None,
) -> list[str]:
    """Return the class names in the order of the model's outputs."""
    if class_map is not None:
        _, every = class_map_of(own, class_map, root, num_classes, f"labels of {shown(str(labels))}")
        return sorted(every, key=every.__getitem__)
    names = own if label_names is None else list(label_names)
    strange = [label for label in own if label not in set(names)]
    if strange:
        near = nearest(strange[0], names)
        hint = "" if near is None else f" (the nearest is {shown(near)})"
        raise InputError(
            f"{shown(str(labels))} has the label {shown(strange[0])}, which is none of the model's {len(names)} classes{hint}: correct it, or "
            "give --class-map"
        )
    if num_classes is not None and len(names) != num_classes:
        raise InputError(
            f"{shown(str(labels))} has {len(names)} labels, but the model has {num_classes} outputs and does not know their names: give "
            f"--class-map with all class names in order, or --num-classes {len(names)}"
        )
    return names
