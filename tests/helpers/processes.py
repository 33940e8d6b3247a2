"""Commands in separate processes without repeated imports, for tests that kill them or run several at once.

Python's fork server imports the libraries once, and each process is forked from it and runs like `python -m tokenmerge`.
Otherwise imports would take most of the time of these tests. Tests of the launcher itself start the launcher.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PRELOADED = [
    "tests.helpers.processes",
    "tokenmerge.cli",
    "timm",
    "torchvision",
    "accelerate",
    # what `train` imports when it gets there, which is half of the time of a short run
    "cyclopts",
    "jinja2",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "timm.optim",
    "tokenmerge.tools.train.logbook",
    "tokenmerge.tools.train.loop",
    "tokenmerge.tools.train.main",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
]


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def as_in_a_shell() -> None:
    """Handle signals as a program does that a shell starts: scripts start theirs in the background without Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _run(words: Sequence[str], out: Path, environment: Mapping[str, str], group: bool) -> None:
    """Redirect the output to files and run the command, in the new process."""
    if group:
        os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    as_in_a_shell()
    os.environ.update(environment)
    gc.freeze()  # what was imported is not looked through again
    # workers of data loaders start as in the command itself: those of a fork server would outlive a command that is killed
    multiprocessing.set_start_method("fork", force=True)
    import torch

    from tokenmerge.cli import main

    torch.set_num_threads(1)
    with open(1, "w", closefd=False) as sys.stdout, open(2, "w", closefd=False) as sys.stderr:
        sys.exit(main(list(words)))


class Command:
    """A running `tokenmerge` command, whose output goes to files next to `out`; it may lead a group of its own."""

    def __init__(
        self, words: Sequence[str], out: Path, environment: Mapping[str, str] | None = None, *, group: bool = False
    ) -> None:
        self.path = out
        self.process = _context().Process(target=_run, args=(words, out, environment or {}, group))
        self.process.start()

    @property
    def running(self) -> bool:
        """Return whether the process is running."""
        return bool(self.process.is_alive())

    def send(self, number: int) -> None:
        """Send a signal, if the process is running."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self, seconds: float = 180) -> int:
        """Wait for the process, and return its exit code, negative for a signal.

        Raises:
            TimeoutError: if it takes too long; the process is then killed.
        """
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"the command still runs after {seconds} s:\n{self.out}{self.err}")
        return int(self.process.exitcode)

    @property
    def out(self) -> str:
        """Return the standard output so far."""
        return _text(f"{self.path}.out")

    @property
    def err(self) -> str:
        """Return the standard error so far."""
        return _text(f"{self.path}.err")


def _text(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def call(words: Sequence[str], out: Path) -> str:
    """Run a command that must succeed, and return its standard output."""
    command = Command(words, out)
    assert command.wait() == 0, command.err
    return command.out


def call_on_two(words: Sequence[str], out: Path) -> str:
    """Run a command that must succeed on two processes, and return the first standard output."""
    codes, said = codes_on_two(words, out)
    assert codes == [0, 0], said
    return _text(f"{out.with_name(f'{out.name}0')}.out")


def codes_on_two(words: Sequence[str], out: Path) -> tuple[list[int], str]:
    """Run a command on two processes, with the variables of torchrun, and return their exit codes and standard errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = []
    for rank in ("0", "1"):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        commands.append(Command(words, out.with_name(f"{out.name}{rank}"), variables))
    end = time.monotonic() + 180
    codes = [command.wait(max(1, end - time.monotonic())) for command in commands]
    return codes, "".join(command.err for command in commands)
