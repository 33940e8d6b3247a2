"""A walk through folders that ends: each real folder is visited once, and pipes, devices and broken links are left out."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from tokenmerge import files


class Walk:
    """Regular files below a folder; iterating again walks again.

    A folder that several links lead to is visited once, under its own name if it lies below the root. Links to a folder above
    themselves are not followed.

    Args:
        root: the folder.
        suffixes: suffixes of wanted files in lower case, with the dot; `None` for any file.
        follow: whether links to folders are followed.

    Attributes:
        left_out: "path: reason" of each odd file with such a suffix, and of each folder that was not entered, of the last walk.
    """

    def __init__(self, root: Path | str, suffixes: Collection[str] | None = None, follow: bool = True) -> None:
        self.root, self.follow = Path(root), follow
        self._suffixes = None if suffixes is None else frozenset(suffixes)
        self.left_out: list[str] = []

    def __iter__(self) -> Iterator[Path]:
        self.left_out.clear()
        seen: set[tuple[int, int]] = set()
        links = [str(self.root)]
        while links:  # links last, so that a folder is visited under its own name
            folders = [links.pop(0)]
            while folders:
                place = folders.pop()
                inside: list[str] = []
                if self._is_new(place, seen):
                    yield from self._files(place, inside, links)
                folders += reversed(inside)

    def _is_new(self, place: str, seen: set[tuple[int, int]]) -> bool:
        try:
            found = os.stat(place)
        except OSError as error:
            self._leave(place, files.words_of(error))
            return False
        key = (found.st_dev, found.st_ino)
        if key in seen:
            self._leave(place, "it is a folder that was visited under another name")
            return False
        seen.add(key)
        return True

    def _files(self, place: str, inside: list[str], links: list[str]) -> Iterator[Path]:
        """Yield the files of one folder, and append the folders in it to `inside`, and the linked ones to `links`."""
        try:
            with os.scandir(place) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            self._leave(place, files.words_of(error))
            return
        for entry in entries:
            path = entry.path
            try:
                if entry.is_dir(follow_symlinks=False):
                    inside.append(path)
                elif entry.is_symlink() and entry.is_dir():
                    self._follow(path, links)
                elif self._suffixes is None or os.path.splitext(entry.name)[1].lower() in self._suffixes:
                    if entry.is_file():
                        yield Path(path)
                    else:
                        self._leave(path, _kind(path))
            except OSError as error:  # a link to itself, or a path that is too long
                self._leave(path, files.words_of(error))

    def _follow(self, path: str, links: list[str]) -> None:
        if not self.follow:
            self._leave(path, "it is a link to a folder, and links are not followed here")
        elif _is_above(path):
            self._leave(path, "it is a link to a folder above it")
        else:
            links.append(path)

    def _leave(self, path: str, reason: str) -> None:
        self.left_out.append(f"{os.path.relpath(path, self.root)}: {reason}")


def _is_above(link: str) -> bool:
    """Return whether a link leads to a folder that it lies in."""
    target, place = os.path.realpath(link), os.path.realpath(os.path.dirname(link))
    return os.path.commonpath([target, place]) == target


def _kind(path: str) -> str:
    try:
        return f"it is {files.kind_of(os.stat(path).st_mode)}"
    except OSError as error:
        return f"it is a link that leads nowhere ({files.words_of(error)})"


def natural_key(path: Path | str) -> list[str | int]:
    """Return a key that sorts numbers in names by value, as timm does: 2.png before 10.png."""
    parts = re.split(r"(\d+)", str(path).lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]
