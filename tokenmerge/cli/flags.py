"""Names of options on the command line, and the flags that only the command line has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenmerge.cli.command import Command
from tokenmerge.tools.options import Flag, Options, flags_of

CONFIG = Flag(
    help="YAML file of values for these options",
    group="output",
    names=("-c",),
    metavar="FILE",
)
PLUGIN = Flag(
    help="Python file to run first, with your matchers",
    group="merging",
    metavar="FILE",
)


def names_of(field: str, flag: Flag) -> list[str]:
    """Return the names of an option on the command line, the long one first."""
    long = [name for name in flag.names if name.startswith("--")] or [f"--{field.replace('_', '-')}"]
    return [*long, *(name for name in flag.names if not name.startswith("--"))]


def all_flags(command: Command, options: type[Options]) -> dict[str, tuple[Any, Flag]]:
    """Return the type and description of every option of a command, with those that only the command line has."""
    found = {**flags_of(options), "config": (Path | None, CONFIG)}
    return {**found, "plugin": (Sequence[Path], PLUGIN)} if command.plugins else found
