"""Signals that end a command: Ctrl-C (SIGINT), SIGTERM and SIGHUP, reliably and in one line.

Python raises the exception of a signal wherever the main thread is, and drops it in places such as destructors. Here a signal
is also recorded, so that `check` in a loop ends the command if the exception was dropped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "ended, because its terminal was closed"}
_NUMBERS = tuple(getattr(signal, name) for name in _WORDS if hasattr(signal, name))  # Windows has no SIGHUP


class Signalled(KeyboardInterrupt):
    """Exception that a signal raises; libraries know its base class, and clean up.

    Attributes:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Record:
    """The signal that arrived, and the process that handles signals."""

    owner: int | None = None
    arrived: int | None = None
    deferred: int = 0
    waits: bool = False


def ending(error: KeyboardInterrupt) -> tuple[str, int]:
    """Return the word for the way in which a command was ended, and its exit code (128 + the number of the signal)."""
    number = error.number if isinstance(error, Signalled) else signal.SIGINT
    return _WORDS[signal.Signals(number).name], 128 + number


def check() -> None:
    """Raise `Signalled` if a signal arrived whose exception was dropped; loops call it.

    Raises:
        Signalled: if a signal arrived.
    """
    if _Record.arrived is not None and _Record.owner == os.getpid():
        raise Signalled(_Record.arrived)


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Raise `Signalled` in the body when a signal arrives, and at its end if the exception was dropped.

    Signals that are ignored, as under nohup, stay so. Inside another `handled`, and in a thread other than the main one, it
    does nothing.
    """
    if _Record.owner == os.getpid() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    hook = sys.unraisablehook

    def quiet(unraisable: Any) -> None:
        """Print no traceback of a dropped signal."""
        if not issubclass(unraisable.exc_type, Signalled):
            hook(unraisable)

    _Record.owner, _Record.arrived, _Record.waits, sys.unraisablehook = os.getpid(), None, False, quiet
    try:
        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):  # `None`: installed by a library that is not Python
                signal.signal(number, _raise)
        yield
        check()
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        _Record.owner, _Record.arrived, sys.unraisablehook = None, None, hook


def _raise(number: int, _: Any) -> None:
    if os.getpid() != _Record.owner:  # a forked process: its parent decides
        if number == signal.SIGTERM:
            os._exit(128 + number)
        return
    _Record.arrived = number
    if _Record.deferred:
        _Record.waits = True
    else:
        raise Signalled(number)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Raise a signal's exception at the end of the body, which must be short, and which a signal would leave half done.

    Raises:
        Signalled: if a signal arrived in the body.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are raised in the main thread only
        yield
        return
    _Record.deferred += 1
    try:
        yield
    finally:
        _Record.deferred -= 1
        if _Record.waits and not _Record.deferred:
            _Record.waits = False
            check()


@contextlib.contextmanager
def on_sigterm(call: Callable[[], None]) -> Iterator[None]:
    """Call a function when SIGTERM arrives, instead of ending the command; in a thread other than the main one, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: call())
    try:
        yield
    finally:
        if before is not None:  # `None`: installed by a library that is not Python
            signal.signal(signal.SIGTERM, before)


def in_worker(_: int) -> None:
    """Leave signals of the whole process group to the main process; a `worker_init_fn` of data loaders.

    Ctrl-C and closed terminals reach every process of the group, and so does the SIGTERM of job schedulers and shells. A worker
    that ended on them would be taken for one that died. A main process that was interrupted while it fetched a batch hangs up in
    the middle, which is no error of the worker's: its thread that hands out memory then prints no traceback.
    """
    sys.excepthook = _unless_hung_up(sys.excepthook)
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":  # where a signal says who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _unless_hung_up(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `sys.excepthook` that says nothing of connections that the other side closed: that side has raised, or has ended.

    In a worker only the thread of `multiprocessing.resource_sharer` calls it; errors of the data set go to the main process.
    """

    def call(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        """Print the traceback of any other error."""
        if not isinstance(error, (ConnectionError, EOFError)):
            hook(kind, error, traceback)

    return call


def _wait_for_parent(parent: int) -> None:
    """End this process when its parent asks for it."""
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid in (parent, os.getpid()):
            os._exit(0)
