"""Files that may be damaged, hostile or in the way: one way to read them, with limits, and one way to write them whole.

Everything that reads or writes a file goes through this module or builds on it (tokenmerge/tools/reading), so that each fault
is one sentence: an `InputError` that names the file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
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
MOST_DIGITS = 300
"""Most digits of an integer in a document; a longer one is no float any more, and cannot be printed in the end."""
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)  # opening a pipe must not wait; Windows has no such flag


def words_of(error: BaseException) -> str:
    """Return the reason of an error in one line: the system's words of an `OSError`, otherwise the first line of its text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def plain_file(path: str | os.PathLike[str], what: str, most: int | None = None) -> Path:
    """Return the path of a regular file, after checking its kind and size.

    Pipes, devices and sockets are refused, because opening one can wait for ever.

    Args:
        path: the file.
        what: what the file holds, for messages, such as "the config".
        most: largest size in bytes; `None` for any.

    Raises:
        InputError: if it is missing, no regular file, or too large.
    """
    try:
        path = Path(path)
        found = path.stat()
    except (OSError, ValueError, TypeError) as error:  # ValueError: a null byte in the name
        raise InputError(f"{what} {shown(_text(path))} cannot be read ({words_of(error)}): check the path") from None
    _check_plain(found, path, what, most)
    return path


def kind_of(mode: int) -> str:
    """Return the kind of an odd file in words, such as "a pipe", from the mode that `os.stat` returned."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def is_plain(mode: int) -> bool:
    """Return whether a mode that `os.stat` returned belongs to a regular file."""
    return stat.S_ISREG(mode)


def _check_plain(found: os.stat_result, path: Path, what: str, most: int | None) -> None:
    name = shown(str(path))
    if not stat.S_ISREG(found.st_mode):
        raise InputError(
            f"{what} {name} cannot be read (it is {kind_of(found.st_mode)}, but a file was expected): check the path"
        )
    if most is not None and found.st_size > most:
        raise InputError(
            f"{what} {name} cannot be read (it has {found.st_size:,} bytes, but at most {most:,} were expected): check the path"
        )


def _text(path: Any) -> str:
    return str(path) if isinstance(path, str | os.PathLike) else f"of type {type(path).__name__}"


def read_bytes(path: str | os.PathLike[str], what: str, most: int = MOST_TEXT) -> bytes:
    """Return the bytes of a regular file.

    The kind and size are checked on the opened file, so that nothing can be put in its place in between.

    Args:
        path: the file.
        what: what it holds, for messages, such as "the config".
        most: largest size in bytes.

    Raises:
        InputError: if it is missing, no regular file, or too large.
    """
    path = plain_file(path, what, most)
    try:
        # a pipe that took the file's place must not be waited for; a regular file ignores the flag
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _AT_ONCE)) as file:
            _check_plain(os.fstat(file.fileno()), path, what, most)
            data = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{what} {shown(str(path))} cannot be read ({words_of(error)}): check the path") from None
    if len(data) > most:  # files of /proc state no size, and others may grow
        raise InputError(
            f"{what} {shown(str(path))} cannot be read (it has over {most:,} bytes, but no more were expected): check the path"
        )
    return data


def read_text(path: str | os.PathLike[str], what: str, most: int = MOST_TEXT) -> str:
    """Return the text of a UTF-8 file, with line feeds at the end of lines; a byte order mark is left out.

    Raises:
        InputError: if it is missing, no regular file, too large, or no text.
    """
    data = read_bytes(path, what, most)
    try:
        text = data.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError(f"it holds a null byte after {text.index(chr(0))} characters")
    except ValueError as error:  # UnicodeDecodeError is one
        raise InputError(
            f"{what} {shown(str(path))} cannot be read ({words_of(error)}): give a text file in UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike[str], what: str, most: int = MOST_TEXT, finite: bool = True) -> Any:
    """Return what a JSON file holds; see `parse_json`.

    Raises:
        InputError: if it cannot be read, is no JSON, or is nested too deeply.
    """
    return parse_json(read_text(path, what, most), f"{what} {shown(str(path))}", finite)


def parse_json(text: str, what: str, finite: bool = True) -> Any:
    """Return what a JSON text holds.

    Args:
        text: the text.
        what: the text's origin, for messages, such as "the config 'a.json'".
        finite: whether NaN and infinities are an error, because JSON has none; other programs write them into their files.

    Raises:
        InputError: if it is no JSON, holds a number of too many digits or a name twice, or is nested too deeply.
    """

    def constant(name: str) -> float:
        if finite:
            raise ValueError(f"it holds {name}, and JSON has no such number")
        return float(name)

    def number(digits: str) -> float:
        value = float(digits)
        if finite and value in (float("inf"), float("-inf")):
            raise ValueError(f"it holds {digits[:40]}, which is too large for a number")
        return value

    try:
        found = json.loads(
            text, parse_constant=constant, parse_float=number, parse_int=whole, object_pairs_hook=_without_twins
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{what} is not JSON ({words_of(error)}): check the file") from None
    check_depth(found, what)
    return found


def whole(digits: str) -> int:
    """Return the integer that a text in a document is; `ValueError` if it has more digits than `MOST_DIGITS`."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits, and at most {MOST_DIGITS} are read")
    return int(digits)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twin = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it holds {shown(twin)[:60]} twice, and nobody can tell which one counts")
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


def check_writable(path: str | os.PathLike[str], flag: str, example: str) -> None:
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


def make_folder(path: Path | str, what: str) -> Path:
    """Make a folder and those above it, if they do not exist, and return its path.

    Raises:
        InputError: if it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the folder {shown(str(path))} of {what} cannot be made ({words_of(error)}): choose another place"
        ) from None
    return Path(path)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], what: str) -> Iterator[Path]:
    """Give a temporary path in the same folder, and move the file that the body writes there to `path`, whole or not at all.

    If the body raises, `path` keeps what it held before. A device or pipe, such as /dev/stdout, is not replaced: it receives the
    bytes.

    Args:
        path: the file to write.
        what: what it holds, for messages, such as "the config".

    Raises:
        InputError: if it cannot be written, for instance because the disk is full.
    """
    try:
        target, direct = _target(path)
        with tempfile.TemporaryDirectory(prefix=".tokenmerge-", dir=None if direct else target.parent) as folder:
            beside = Path(folder, target.name or "file")
            yield beside
            if not beside.is_file():
                raise InputError(f"{what} {shown(str(path))} was not written, and nobody said why: report this")
            if direct:
                _pour(beside, target)
                return
            if target.exists():
                shutil.copymode(target, beside)
            for part in sorted(Path(folder).iterdir()):  # a large model may come with a separate file of weights
                sync(part)
            for part in sorted(Path(folder).iterdir(), key=lambda one: one == beside):  # the named file last
                os.replace(part, target.parent / part.name)
            with contextlib.suppress(OSError):  # not every file system can synchronize a folder
                _sync(target.parent)
    except OSError as error:
        raise InputError(
            f"{what} {shown(_text(path))} cannot be written ({words_of(error)}): make room, or choose another place"
        ) from None


def _target(path: str | os.PathLike[str]) -> tuple[Path, bool]:
    """Return where the bytes go, and whether they are written there directly, as to devices, pipes and open files."""
    try:
        path = Path(path)
        mode = path.stat().st_mode if path.exists() else stat.S_IFREG
        target = Path(os.path.realpath(path))  # a link stays a link
    except (ValueError, TypeError) as error:  # ValueError: a null byte in the name
        raise OSError(0, str(error)) from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    opened = str(path.absolute()).startswith(("/dev/std", "/dev/fd/", "/proc/"))  # may be links to what has no name
    if not stat.S_ISREG(mode) or opened:
        return path, True
    if target.exists() and not os.access(target, os.W_OK):  # replacing it would succeed
        raise PermissionError(errno.EACCES, "it is read-only")
    return target, False


def _pour(source: Path, target: Path) -> None:
    """Write the bytes of a file to a device, pipe or open file; a pipe that nobody reads is an error, not waited for."""
    # without a reader, opening a pipe would wait for ever; a file behind /dev/stdout keeps what was written to it before
    handle = os.open(target, os.O_WRONLY | os.O_APPEND | _AT_ONCE)
    os.set_blocking(handle, True)
    with os.fdopen(handle, "wb") as file:
        file.write(source.read_bytes())


def write(path: str | os.PathLike[str], data: bytes | str, what: str) -> None:
    """Write a file whole or not at all; see `replacing`.

    Raises:
        InputError: if it cannot be written.
    """
    with replacing(path, what) as beside:
        beside.write_bytes(data.encode("utf-8", "replace") if isinstance(data, str) else data)


def write_json(path: str | os.PathLike[str], value: Any, what: str) -> None:
    """Write a value as indented JSON, whole or not at all.

    Raises:
        InputError: if it cannot be written, or holds NaN, an infinity or another thing that JSON has not.
    """
    write(path, to_json(value, what) + "\n", what)


def to_json(value: Any, what: str, indent: int | None = 2) -> str:
    """Return a value as JSON.

    Args:
        value: the value.
        what: what it is, for messages, such as "the config".
        indent: spaces of each level; `None` writes one line.

    Raises:
        InputError: if it holds NaN, an infinity or another thing that JSON has not.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{what} cannot be written as JSON ({words_of(error)}): look at its numbers") from None


def append(path: Path | str, text: str, what: str) -> None:
    """Append a text to a file, whole or not at all: if there is no room, the file keeps what it held.

    Raises:
        InputError: if it cannot be written, or is no regular file.
    """
    if os.path.lexists(path):
        plain_file(path, what)
    refuse_link(path, what)
    try:
        follow = getattr(os, "O_NOFOLLOW", 0)  # nothing may be put in its place in between
        with open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags | follow, 0o666)) as file:
            size = file.seek(0, os.SEEK_END)
            data = memoryview(text.encode("utf-8", "replace"))
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(size)
                raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"{what} {shown(str(path))} cannot be written ({words_of(error)}): make room, or choose another place"
        ) from None


def refuse_link(path: Path | str, what: str) -> None:
    """Raise `InputError` if a path is a symbolic link, because it would lead the writer to a file elsewhere."""
    if os.path.islink(path):
        raise InputError(
            f"{what} {shown(str(path))} is a link to {shown(os.readlink(path))}, but a file or folder of its own was expected: copy it"
        )


def sync(folder: Path) -> None:
    """Wait until the system has written the names in a folder to the disk, where it supports that."""
    with contextlib.suppress(OSError):
        _sync(folder)


def _sync(path: Path) -> None:
    """Wait until the disk has a file; some disks say only now that they are full."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot do it
            raise
    finally:
        os.close(handle)
