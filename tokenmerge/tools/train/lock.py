"""The lock of a run folder, so that two runs never write to one folder.

The system holds the lock for an open file, and gives it up when the process ends in any way: a killed run leaves no stale lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenmerge.errors import InputError, shown
from tokenmerge.files import words_of

NAME = ".lock"
_held: set[int] = set()
"""Open lock files of this process."""
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)


@contextlib.contextmanager
def locked(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a run folder, which is made if it is missing, and removed again if it stayed empty.

    Args:
        folder: folder of the run.
        warn: function that is called with a sentence if the file system has no locks.

    Raises:
        InputError: if another process holds it, or the folder cannot be made.
    """
    made = [one for one in (folder, *folder.parents) if not os.path.lexists(one)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _open(folder, warn)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise InputError(
            f"--output {shown(str(folder))} cannot be used ({words_of(error)}): choose a folder that can be written"
        ) from None
    _held.add(handle)
    try:
        yield
    finally:
        _held.discard(handle)
        with contextlib.suppress(OSError):
            (folder / NAME).unlink()  # while it is locked; who has opened it sees that it is gone
        os.close(handle)
        with contextlib.suppress(OSError):
            for one in made:
                one.rmdir()


def _open(folder: Path, warn: Callable[[str], None]) -> int:
    """Return the open and locked file, with the process id in it."""
    path = folder / NAME
    while True:
        # neither through a link nor waiting for a pipe
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        handle = os.open(path, flags, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, f"{NAME} in it is no file")
            try:
                _lock(handle)
            except OSError as error:
                if error.errno in _BUSY:
                    raise InputError(
                        f"{shown(str(folder))} is in use by another run (process {_holder(handle)}): wait for it or stop it, or "
                        "give another --output"
                    ) from None
                warn(
                    f"the file system of {shown(str(folder))} has no locks ({words_of(error)}): start no second run in it"
                )
            if _is_at(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()}\n".encode(), 0) if sys.platform != "win32" else None
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed it in between: try again


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _holder(handle: int) -> str:
    """Return the process id in a lock file."""
    if sys.platform == "win32":  # a locked file cannot be read there
        return "unknown"
    text = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
    return text if text.isdecimal() else "unknown"


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _close_in_child() -> None:
        """Close the lock files in a forked process, such as a data loader's, which would hold the lock of a killed run."""
        for handle in _held:
            with contextlib.suppress(OSError):
                os.close(handle)
        _held.clear()

    os.register_at_fork(after_in_child=_close_in_child)
