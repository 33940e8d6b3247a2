"""YAML documents and class maps, read with limits; JSON is read by `tokenmerge.files`."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

import yaml

from tokenmerge import files
from tokenmerge.errors import InputError, shown

MOST_YAML = 2**18
"""Largest size in bytes of a YAML file, because its parser is slow; configs have a few kilobytes."""
MOST_NAME = 255
"""Most characters of a class name, which is the name of a folder."""
_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map"))
_BINARY = (".pkl", ".pickle", ".npy", ".npz", ".pt", ".pth", ".joblib", ".bin", ".zip", ".gz")


class _Loader(yaml.SafeLoader):
    """Loader that refuses a name that stands twice in a mapping, and numbers of too many digits.

    Numbers and truth values are those of YAML 1.2. In YAML 1.1, the schedule 16:1 would be 961 (to base 60), 010 would be 8,
    and `on` a truth value.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep=True)
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(found) < len(names):
            twin = next(name for number, name in enumerate(names) if name in names[:number])
            raise ValueError(f"it holds {shown(twin)[:60]} twice, and nobody can tell which one counts")
        return found

    def construct_short(self, node: Any) -> Any:
        if len(node.value) > files.MOST_DIGITS:
            raise ValueError(f"it holds a number of {len(node.value)} digits, and at most {files.MOST_DIGITS} are read")
        return self.construct_yaml_int(node)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", "~nN"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, *([""] if _tag == "null" else [])]
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_short)


def read_yaml(path: Path | str, what: str) -> Any:
    """Return what a YAML file holds: one document of mappings, lists and plain values; see `parse_yaml`.

    Args:
        path: the file.
        what: what it holds, for messages, such as "the config".

    Raises:
        InputError: if it cannot be read, or is not such a document.
    """
    return parse_yaml(files.read_text(path, what, MOST_YAML), f"{what} {shown(str(path))}")


def parse_yaml(text: str, what: str) -> Any:
    """Return what a YAML text holds.

    Aliases are refused, because a few lines of them can stand for gigabytes; tags are, because they name types to make.

    Args:
        text: the text.
        what: the text's origin, for messages, such as "the config 'a.yaml'".

    Raises:
        InputError: if it is no YAML, has aliases, tags, several documents or a name twice, is nested too deeply, or holds a number
            that is not finite or has too many digits.
    """
    try:
        _check_events(text)
        found = yaml.load(text, _Loader)
        _check_finite(found)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f" in line {mark.line + 1}"
        raise InputError(f"{what} is not YAML ({error.problem or error.context}{place}): check the file") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise InputError(f"{what} is not YAML ({files.words_of(error)}): check the file") from None
    return found


def _check_events(text: str) -> None:
    """Raise `ValueError` for what must not be built: the parser of events does not recurse, but the builder of values does."""
    depth = documents = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        place = f"in line {event.start_mark.line + 1 if event.start_mark else 0}"
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it has an alias {place}, and aliases are not followed: write the value again")
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _TAGS:
            raise ValueError(f"it has the tag {tag[:60]!r} {place}, and only plain values are read")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        if depth > files.MOST_DEPTH:
            raise ValueError(f"it is nested more than {files.MOST_DEPTH} deep {place}")
        if documents > 1:
            raise ValueError(f"it has a second document {place}, and one is read")


def _check_finite(value: Any) -> None:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for part in value:
            _check_finite(part)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"it holds the number {value}, and only finite ones are read")


_AUDIOSET = "index,mid,display_name"


def _of_audioset(lines: list[str], name: str) -> list[str]:
    """Return the class names in AudioSet's list of classes, in the order of their indices."""
    found = []
    for number, row in enumerate(csv.reader(lines[1:], skipinitialspace=True)):
        if len(row) != 3 or row[0].strip() != str(number):
            raise InputError(
                f"{name} has {shown(','.join(row))[:80]} in line {number + 2}, but {number},MID,DISPLAY_NAME was expected: correct the file"
            )
        found.append(row[1])
    return found


def read_class_map(path: Path | str, what: str) -> dict[str, int]:
    """Return the index of each class, from a text file with one class name per line in the order of the model's outputs.

    This is timm's text format. A CSV file that begins with `index,mid,display_name`, as AudioSet's list of classes does, names them in
    its second column. Its other format, a pickle, is refused, because reading one can run any code.

    Args:
        path: the file.
        what: what it is, for messages, such as "the class map".

    Raises:
        InputError: if it cannot be read, is no text, or has an empty line, a name twice or no name.
    """
    name = f"{what} {shown(str(path))}"
    if Path(path).suffix.lower() in _BINARY:
        raise InputError(
            f"{name} is no text file, and pickles can run any code: give a text file with one class per line"
        )
    lines = files.read_text(path, what, MOST_YAML * 16).removesuffix("\n").split("\n")
    if lines[0].strip() == _AUDIOSET:
        lines = _of_audioset(lines, name)
    found: dict[str, int] = {}
    for index, line in enumerate(lines):
        label, place = line.strip(), f"in line {index + 1}"
        reason = "no class" if not label else ""
        if label in found:
            reason = f"{shown(label)[:80]} again, after line {found[label] + 1},"
        if len(label) > MOST_NAME or not all(character.isprintable() for character in label):
            reason = f"{shown(label[:40])}, which is no name of a folder,"
        if reason:
            raise InputError(f"{name} has {reason} {place}, but one class per line was expected: correct the file")
        found[label] = index
    return found
