"""Entry of the `tokenmerge` command, outside of the package, whose import takes seconds: a signal ends it in one line from the start."""

import atexit
import os
import signal
import sys
from types import FrameType

_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "ended, because its terminal was closed"}


def _end(number: int, _: FrameType | None) -> None:
    """Print the line and end at once; nothing has begun yet that could be left half done."""
    os.write(2, f"tokenmerge: {_WORDS[signal.Signals(number).name]}\n".encode())
    os._exit(128 + number)


def _ignore() -> None:
    """Ignore signals while the interpreter is taken down, when no handler runs any more; the command has done its work."""
    for name in _WORDS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def entry() -> None:
    """Run the command and exit with its code."""
    atexit.register(_ignore)  # first, and therefore run last
    for name in _WORDS:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    from tokenmerge.cli import main  # main handles signals by itself (tokenmerge/tools/signals.py)

    sys.exit(main())
