"""The entry of the command: choose a command, read its options, run it, and end with one sentence if it fails."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import tokenmerge
from tokenmerge.cli import bench, compare, demo, eval, explore, export, inspect, search, train, visualize
from tokenmerge.cli.command import Command, missing
from tokenmerge.errors import InputError, TokenMergeError, nearest
from tokenmerge.tools.signals import ending, handled
from tokenmerge.tools.streams import to_nowhere

COMMANDS: dict[str, Command] = {
    module.COMMAND.name: module.COMMAND
    for module in (demo, inspect, bench, eval, compare, search, train, visualize, explore, export)
}
"""All commands by name, in the order of the help page."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; `None` reads them from `sys.argv`.

    Returns:
        The exit code: 0; 1 for `eval --strict` with skipped files; 2 for invalid input, an unsupported model, a file that
        cannot be written or too little memory; 70 for a fault of this package; 129, 130 or 143 after SIGHUP, SIGINT or SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(words[0]) if words else None
    try:
        with handled():
            _check_streams()
            code = _help(words) if command is None else _run(command, words[1:])
            sys.stdout.flush()  # now, so that a broken pipe raises inside this try
            return code
    except BrokenPipeError:  # the reader of a pipe closed it (`| head`), which is no error
        to_nowhere(sys.stdout)
        return 0
    except KeyboardInterrupt as error:
        return _end(*ending(error))
    except BaseException as error:
        if isinstance(error, SystemExit | GeneratorExit):
            raise
        return _failed(error, command, words)


def entry() -> None:
    """Run the command and exit with its code; the console script of the package."""
    sys.exit(main())


def _run(command: Command, words: Sequence[str]) -> int:
    if any(word in ("-h", "--help") for word in words):
        return _help(["help", command.name], full=False)
    options_class, run = command.load(words)
    from tokenmerge.cli.parsing import parse
    from tokenmerge.tools.plugins import load_plugins

    options, plugins = parse(command, options_class, words, _recipes(command))
    load_plugins(plugins)
    return command.code(options, run(options))


def _recipes(command: Command) -> Any:
    if command.name != "train":
        return {}
    from tokenmerge.tools.train.options import recipes

    return recipes()


def _help(words: Sequence[str], full: bool = True) -> int:
    """Print the version or a help page; a word that is no command is an error."""
    if words[:1] == ["--version"]:
        print(f"tokenmerge {tokenmerge.__version__}")
        return 0
    topic = words[1] if words[:1] == ["help"] and len(words) > 1 else None
    if topic is None and (not words or words[0] in ("help", "-h", "--help")):
        from tokenmerge.cli.help import overview

        print(overview(list(COMMANDS.values())))
        return 0
    name = topic if topic is not None else words[0]
    if topic == "settings":
        from tokenmerge.cli.help import settings

        print(settings())
        return 0
    if topic is None or name not in COMMANDS:
        raise InputError(_unknown(name, topic is not None))
    from tokenmerge.cli.help import page

    print(page(COMMANDS[name], COMMANDS[name].load()[0], full))
    return 0


def _unknown(word: str, topic: bool) -> str:
    near = nearest(word, [*COMMANDS, "help", "--help", "--version", *(["settings"] if topic else [])], 0.6)
    kind = "option" if word.startswith("-") else "command"
    hint = f"did you mean {near}?" if near else f"choose one of {', '.join(COMMANDS)}"
    return f"there is no {kind} {word!r:.80}: {hint}"


def _check_streams() -> None:
    """Refuse a closed standard output, where results would vanish; a closed standard error loses messages only."""
    if sys.stdout is None:
        raise InputError("standard output is closed, but results are printed there: redirect it to a file or /dev/null")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 for the rest of the process
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without our characters


def _failed(error: BaseException, command: Command | None, words: Sequence[str]) -> int:
    """Print an error as one sentence, and return the exit code."""
    if os.environ.get("TOKENMERGE_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, ModuleNotFoundError) and command is not None:
        with contextlib.suppress(ModuleNotFoundError):  # a module of this package: a fault of ours
            error = missing(error, command, words)
    if isinstance(error, TokenMergeError):
        return _end(str(error), 2)
    if _is_out_of_memory(error):
        return _end("memory ran out: use a smaller --batch-size, --img-size or model", 2)
    if isinstance(error, OSError):  # from standard output: files are written through tokenmerge/files.py
        to_nowhere(sys.stdout)
        where = f" ({error.filename})" if error.filename else ""
        return _end(f"the output{where} cannot be written ({error.strerror or error}): make room, or redirect it", 2)
    reason = " ".join(str(error).split())[:300]
    return _end(
        f"a fault of tokenmerge itself ({type(error).__name__}: {reason}): set TOKENMERGE_TRACEBACK=1 to see where, and report it",
        70,
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out; on a CPU torch raises a plain RuntimeError for that."""
    import torch

    words = ("can't allocate memory", "Storage size calculation overflowed", "not enough memory", "bad allocation")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _end(text: str, code: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        line = f"tokenmerge: {' '.join(text.split())}\n"
        sys.stderr.write(line.encode("utf-8", "replace").decode("utf-8"))
        sys.stderr.flush()
    return code
