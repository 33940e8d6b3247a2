"""The one error of decoders: whatever they raise becomes a `DamagedFileError` that names the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tokenmerge import files
from tokenmerge.errors import DamagedFileError, TokenMergeError, shown


def damaged(path: Path | str, reason: str, expected: str = "a whole file") -> DamagedFileError:
    """Return the error for a file that cannot be decoded.

    Args:
        path: the file.
        reason: why, in words that follow the name of the file, such as "it is empty".
        expected: what to give instead.
    """
    reason = " ".join(reason.replace(str(path), os.path.basename(path)).split())
    return DamagedFileError(f"{shown(str(path))} cannot be read ({reason}): give {expected}", reason)


@contextlib.contextmanager
def decoding(path: Path | str, expected: str = "a whole file") -> Iterator[None]:
    """Turn any exception of the body, which decodes a file, into a `DamagedFileError`.

    Decoders raise dozens of types for damaged data, `RuntimeError`, `struct.error` and `MemoryError` among them: a damaged size
    asks for more memory than there is. Other errors of this library pass.
    """
    try:
        yield
    except TokenMergeError:
        raise
    except MemoryError:
        raise damaged(path, "it asks for more memory than there is", expected) from None
    except Exception as error:  # every decoder raises its own types
        words = getattr(error, "strerror", None) or files.words_of(error)  # FFmpeg's have one, and are no OSError
        raise damaged(path, f"it is damaged: {words}", expected) from None


def bytes_of(path: Path | str, most: int, expected: str = "a whole file") -> bytes:
    """Return the bytes of a regular, non-empty file.

    Raises:
        DamagedFileError: if it is missing, empty, no regular file, or larger than `most`.
    """
    check_file(path, most, expected)
    try:
        data = files.read_bytes(path, "the file", most)
    except TokenMergeError as error:
        raise damaged(path, str(error), expected) from None
    if not data:
        raise damaged(path, "it is empty", expected)
    return data


def check_file(path: Path | str, most: int, expected: str = "a whole file") -> None:
    """Raise `DamagedFileError` if a file is missing, empty, no regular file, or larger than `most` bytes."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise damaged(path, files.words_of(error), expected) from None
    if not files.is_plain(found.st_mode):
        raise damaged(path, f"it is {files.kind_of(found.st_mode)}", expected)
    if found.st_size > most:
        raise damaged(path, f"it has {found.st_size:,} bytes, and at most {most:,} are read", expected)
    if not found.st_size:
        raise damaged(path, "it is empty", expected)
