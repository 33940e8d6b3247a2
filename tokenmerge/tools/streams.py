"""The streams that commands print to: closed pipes, full disks, and terminals that two of them share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from tokenmerge.errors import InputError
from tokenmerge.files import words_of


@contextlib.contextmanager
def writing(to_stderr: bool = False) -> Iterator[None]:
    """Turn the error of a stream that cannot be written, such as /dev/full, into an `InputError`; closed pipes pass."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        name = "error" if to_stderr else "output"
        if not to_stderr:
            to_nowhere(sys.stdout)
        raise InputError(
            f"standard {name} cannot be written ({words_of(error)}): make room, or send it elsewhere"
        ) from None


def one_terminal(*files: Any) -> bool:
    """Return whether files are the same terminal."""
    try:
        return all(file.isatty() for file in files) and len({os.fstat(file.fileno()).st_rdev for file in files}) == 1
    except (AttributeError, OSError, ValueError):  # no real files
        return False


def to_nowhere(stream: Any) -> None:
    """Send to nowhere what a stream that cannot be written still holds: Python would try it again at exit, and complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # streams of tests have no number
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
