"""Help pages, as plain text of at most 80 columns."""

from __future__ import annotations

import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenmerge.cli.command import Command
from tokenmerge.cli.flags import all_flags, names_of
from tokenmerge.config import FIELDS, PRESETS, choices_of, help_of
from tokenmerge.matching import matcher_names
from tokenmerge.tools.options import GROUPS, Flag, Options, without_none

_WIDTH, _COLUMN = 80, 26


def overview(commands: Sequence[Command]) -> str:
    """Return the help page of the whole command."""
    lines = [
        "Usage: tokenmerge COMMAND …",
        "",
        "Vision Transformers made faster by merging similar tokens.",
        "",
        "Commands",
    ]
    lines += [line for command in commands for line in _entry(command.name, command.summary, 13)]
    lines += ["", "Help"]
    lines += _entry("COMMAND -h", "the common options of a command", 17)
    lines += _entry("help COMMAND", "all options of a command", 17)
    lines += _entry("help settings", "schedules (--r) and settings (--set)", 17)
    lines += _entry("--version", "the version", 17)
    lines += ["", "Try: tokenmerge demo"]
    return "\n".join(lines)


def page(command: Command, options: type[Options], full: bool) -> str:
    """Return the help page of a command: the common options, or all of them."""
    flags = all_flags(command, options)
    words = [flag.metavar for _, flag in flags.values() if flag.positional]
    lines = [" ".join(["Usage: tokenmerge", command.name, *words, "[OPTIONS]"]), ""]
    lines += textwrap.wrap(command.summary[0].upper() + command.summary[1:] + ".", _WIDTH)
    rare: list[str] = []
    for group, title in GROUPS.items():
        mine = {field: pair for field, pair in flags.items() if pair[1].group == group}
        shown = {field: pair for field, pair in mine.items() if full or not pair[1].rare}
        rare += [names_of(field, flag)[0] for field, (_, flag) in mine.items() if field not in shown]
        if shown:
            lines += ["", title]
        for field, (hint, flag) in shown.items():
            default = options.__dataclass_fields__[field].default if field in options.__dataclass_fields__ else None
            lines += _entry(usage(field, hint, flag), help_text(flag, default), _COLUMN)
    for title, entries in options.EXPLAINED.items():
        lines += ["", title]
        lines += [line for name, text in entries.items() for line in _entry(name, text, 16)]
    if rare:
        lines += textwrap.wrap(
            f"More (tokenmerge help {command.name}): {', '.join(rare)}", _WIDTH, break_on_hyphens=False
        )
    lines += ["", "Example:", f"  {command.example}"]
    return "\n".join(lines)


def _entry(name: str, text: str, column: int) -> list[str]:
    """Return the lines of one entry: the name, then the text in a column of its own."""
    wrapped = textwrap.wrap(text, _WIDTH - column, break_on_hyphens=False) or [""]
    if len(name) + 4 > column:
        return [f"  {name}", *(" " * column + line for line in wrapped)]
    return [f"  {name}".ljust(column) + wrapped[0], *(" " * column + line for line in wrapped[1:])]


def usage(field: str, hint: Any, flag: Flag) -> str:
    """Return the names of an option with the placeholder of its value, such as "--batch-size, -b N"."""
    if flag.positional:
        return flag.metavar
    hint, _ = without_none(hint)
    value = "" if hint is bool else " " + placeholder(hint, flag)
    names = names_of(field, flag)
    if flag.negatable and not names[0].startswith("--no-"):
        names = [f"--[no-]{names[0][2:]}", *names[1:]]
    return ", ".join(names) + value


def placeholder(hint: Any, flag: Flag) -> str:
    """Return the placeholder of an option's value."""
    kinds = {int: "N", float: "X", str: "NAME", Path: "FILE"}
    if flag.choices and not flag.metavar:
        words = "|".join(map(str, flag.choices))
        return words if len(words) <= 12 else "CHOICE"
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    one = flag.metavar or kinds.get(next(iter(inner), hint), "VALUE")
    if flag.pairs or origin not in (None, tuple, types.UnionType):
        return f"{one} …"
    return " ".join([one] * len(inner)) if origin is tuple else one


def help_text(flag: Flag, default: Any) -> str:
    """Return the help text of an option with its choices and its default."""
    words = "|".join(map(str, flag.choices))
    text = flag.help + (f": {words}" if len(words) > 12 and not flag.metavar else "")
    if default in (None, False, (), "") or not isinstance(default, str | int | float | tuple | Path):
        return text
    return f"{text} ({' '.join(map(str, default)) if isinstance(default, tuple) else default})"


def settings() -> str:
    """Return the help page of schedules and settings."""
    lines = ["Schedules (--r): how many tokens merge. Several may be given.", ""]
    for form, text in _SCHEDULES.items():
        lines += _entry(form, text, 18)
    lines += ["", "Presets (--preset): sets of the settings below.", ""]
    for name, fields in PRESETS.items():
        lines += _entry(name, _pairs(fields), 18)
    lines += [
        "",
        "Matchers (--matcher NAME)",
        "",
        *textwrap.wrap(", ".join(matcher_names()), _WIDTH - 2, initial_indent="  ", subsequent_indent="  "),
    ]
    lines += ["", "Settings (--set NAME=VALUE …); any other name is an argument of the matcher.", ""]
    for name, field in FIELDS.items():
        if field.metadata["group"] == "schedule" or name in ("matcher", "options", "trace"):
            continue
        text = f"{help_of(name)}: {'|'.join(map(str, choices_of(name)))} ({field.default})"
        lines += _entry(name, text, 18)
    return "\n".join(lines)


def _pairs(fields: Mapping[str, Any]) -> str:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    return " ".join(f"{name}={value}" for name, value in flat.items())


_SCHEDULES = {
    "8": "8 tokens in every block; 0 is the unmerged model",
    "16:-1": "r:inflect, from 32 in the first block linearly to 0 in the last",
    "8,8,0": "one number per block, padded with zeros",
    "keep=0.9": "each block keeps this fraction of its tokens",
    "flops=0.5": "the smallest r that leaves this fraction of the FLOPs",
    "speedup=2": "the same as flops=0.5",
    "FILE.json": "a config, as search and MergeConfig.save write it",
}
