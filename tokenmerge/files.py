"""Files that may be damaged, hostile or in the way: one way to read them, with limits, and one way to write them whole.

Everything that reads or writes a file goes through this module or builds on it (tokenmerge/tools/reading), so that each fault
is one sentence: an `InputError` that names the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenmerge.errors import InputError, shown

MOST_TEXT = 64 * 2**20
"""Largest size in bytes of a text file; configs, records and class maps are far smaller."""
MOST_DEPTH = 64
"""Deepest nesting of a document; deeper ones would exhaust the stack of Python."""


def words_of(error: BaseException) -> str:
    """Return the reason of an error in one line: the system's words of an `OSError`, otherwise the first line of its text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def plain_file(path: Path | str, what: str, most: int | None = None) -> Path:
    """Return the path of a regular file, after checking its kind and size.

    Pipes, devices and sockets are refused, because opening one can wait for ever.

    Args:
        path: the file.
        what: what the file holds, for messages, such as "the config".
        most: largest size in bytes; `None` for any.

    Raises:
        InputError: if it is missing, no regular file, or too large.
    """
    path = Path(path)
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise InputError(f"{what} {shown(str(path))} cannot be read ({words_of(error)}): check the path") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(
            f"{what} {shown(str(path))} is {_kind(found.st_mode)}, but a file was expected: check the path"
        )
    if most is not None and found.st_size > most:
        raise InputError(
            f"{what} {shown(str(path))} has {found.st_size:,} bytes, but at most {most:,} were expected: check the path"
        )
    return path


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_text(path: Path | str, what: str, most: int = MOST_TEXT) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        InputError: if it is missing, no regular file, too large, or no text.
    """
    path = plain_file(path, what, most)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} {shown(str(path))} cannot be read ({words_of(error)}): give a text file") from None


def read_json(path: Path | str, what: str, most: int = MOST_TEXT) -> Any:
    """Return what a JSON file holds.

    Raises:
        InputError: if it cannot be read, is no JSON, or is nested too deeply.
    """
    return parse_json(read_text(path, what, most), f"{what} {shown(str(path))}")


def parse_json(text: str, what: str) -> Any:
    """Return what a JSON text holds.

    Args:
        text: the text.
        what: the text's origin, for messages, such as "the config 'a.json'".

    Raises:
        InputError: if it is no JSON, holds a number of too many digits, or is nested too deeply.
    """
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{what} is not JSON ({words_of(error)}): check the file") from None
    check_depth(found, what)
    return found


def check_depth(value: Any, what: str) -> None:
    """Raise `InputError` if lists and mappings are nested more deeply than `MOST_DEPTH`."""
    level, depth = [value], 0
    while level := [
        part
        for one in level
        if isinstance(one, dict | list)
        for part in (one.values() if isinstance(one, dict) else one)
    ]:
        depth += 1
        if depth > MOST_DEPTH:
            raise InputError(f"{what} is nested more than {MOST_DEPTH} deep, but a few levels were expected: check it")


def check_writable(path: Path | str, flag: str, example: str) -> None:
    """Check before any work that a file can be written.

    Args:
        path: the file that will be written.
        flag: the option that named it, for messages, such as "--json".
        example: a good name, for messages.

    Raises:
        InputError: if the path is a folder, its folder does not exist, or the name is not possible.
    """
    path = Path(path)
    try:
        folder, missing = path.is_dir(), not Path(os.path.realpath(path)).parent.is_dir()
        path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or a null byte in it
        raise InputError(
            f"{flag} {shown(str(path))} cannot be written ({words_of(error)}): choose another name"
        ) from None
    if folder:
        raise InputError(
            f"{flag} {shown(str(path))} is a folder, but a file was expected: add a name such as {example}"
        )
    if missing:
        raise InputError(f"the folder of {flag} {shown(str(path))} does not exist: make it first")
    if len(os.fsencode(path.name)) > 200:  # a temporary name beside it must be possible, too
        raise InputError(f"{flag} {shown(str(path))[:60]}… has a name of over 200 bytes: choose a shorter one")


@contextlib.contextmanager
def replacing(path: Path | str, what: str) -> Iterator[Path]:
    """Give a temporary path in the same folder, and move the file that the body writes there to `path`, whole or not at all.

    If the body raises, `path` keeps what it held before. A device or pipe, such as /dev/stdout, is not replaced: it receives the
    bytes.

    Args:
        path: the file to write.
        what: what it holds, for messages, such as "the config".

    Raises:
        InputError: if it cannot be written, for instance because the disk is full.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp(), "notes.txt")
        >>> with replacing(file, "the notes") as beside:
        ...     _ = beside.write_text("merged")
        >>> file.read_text()
        'merged'
    """
    try:
        target = Path(os.path.realpath(path))  # a link stays a link
    except ValueError as error:  # a null byte
        raise InputError(f"{what} {shown(str(path))} cannot be written ({error}): choose another name") from None
    try:
        odd = target.exists() and not target.is_file()
        place = None if odd else target.parent
        with tempfile.TemporaryDirectory(prefix=".tokenmerge-", dir=place) as folder:
            beside = Path(folder, target.name)
            yield beside
            if odd:
                target.write_bytes(beside.read_bytes())
                return
            for part in sorted(Path(folder).iterdir()):  # a large model may come with a separate file of weights
                _sync(part)
            for part in sorted(Path(folder).iterdir(), key=lambda one: one == beside):  # the named file last
                os.replace(part, target.parent / part.name)
            _sync(target.parent)
    except OSError as error:
        raise InputError(
            f"{what} {shown(str(path))} cannot be written ({words_of(error)}): make room, or choose another place"
        ) from None


def write(path: Path | str, data: bytes | str, what: str) -> None:
    """Write a file whole or not at all; see `replacing`.

    Raises:
        InputError: if it cannot be written.
    """
    with replacing(path, what) as beside:
        beside.write_bytes(data.encode("utf-8", "replace") if isinstance(data, str) else data)


def write_json(path: Path | str, value: Any, what: str) -> None:
    """Write a value as indented JSON, whole or not at all; NaN and infinities are an error, because JSON has none.

    Raises:
        InputError: if it cannot be written.
    """
    write(path, json.dumps(value, indent=2, allow_nan=False) + "\n", what)


def _sync(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can synchronize a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
