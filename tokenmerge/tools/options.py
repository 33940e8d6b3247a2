"""Options of the commands: dataclass fields that know their help text, limits and choices.

One dataclass per command, such as `tokenmerge.tools.eval.EvalOptions`, is the only source of its flags, types, defaults, help texts,
keys of config files and settings in reports, and the argument of its Python function. Values are checked when it is made, wherever
they come from: the command line (tokenmerge/cli), a config file, or Python.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenmerge.errors import InputError, nearest, shown

GROUPS = {
    "model": "Model",
    "data": "Data",
    "merging": "Merging",
    "augmentation": "Augmentation",
    "optimisation": "Optimization",
    "measuring": "Measuring",
    "computing": "Computing",
    "output": "Output",
}
"""Titles of the groups of options, in the order of help pages."""
_MOST = 10**12
"""Largest whole number without a limit of its own; larger ones overflow somewhere below."""


_DATABASE = "sqlite:///"
"""Beginning of the URL of a database in a file."""


class OptionError(InputError):
    """Error for the value of one option.

    Attributes:
        option: name of the field.
        reason: what was found and expected, without the name.
    """

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(f"{option}={reason}")
        self.option, self.reason = option, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.option, self.reason)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """Description of one option, in the metadata of its field.

    Attributes:
        help: help text, a fragment without a full stop.
        group: key of `GROUPS`.
        names: further names on the command line, such as "-b"; the first long one replaces the name of the field.
        metavar: placeholder of the value in help texts; empty for one made from the type.
        choices: allowed values; empty for any.
        least, above, most: limits of numbers: at least, above, at most.
        positional: whether it is given without a name on the command line.
        rare: whether short help pages list only its name.
        negatable: whether `--no-NAME` turns it off.
        pairs: whether the value is a mapping, given as NAME=VALUE.
        empty: whether an empty text is a value.
    """

    help: str
    group: str
    names: tuple[str, ...] = ()
    metavar: str = ""
    choices: tuple[Any, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    positional: bool = False
    rare: bool = False
    negatable: bool = False
    pairs: bool = False
    empty: bool = False


def option(default: Any, help: str, group: str, *names: str, **more: Any) -> Any:
    """Return the dataclass field of one option.

    Args:
        default: its default; `dataclasses.MISSING` makes it required.
        help: help text, a fragment without a full stop.
        group: key of `GROUPS`.
        *names: further names on the command line; the first that begins with "--" replaces the field's own.
        **more: further attributes of `Flag`.
    """
    flag = Flag(help=help, group=group, names=names, **more)
    if flag.pairs:
        return dataclasses.field(default_factory=dict, metadata={"flag": flag})
    return dataclasses.field(default=default, metadata={"flag": flag})


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        hints = typing.get_type_hints(cls)
        _HINTS[cls] = {name: str if typing.get_origin(hint) is typing.Literal else hint for name, hint in hints.items()}
    return _HINTS[cls]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the options of a command; values are checked and brought to the types of the fields when it is made.

    Attributes:
        EXPLAINED: lists of values for help pages: for each title, the values with their meanings.

    Raises:
        InputError: if a value has another type, or lies outside its limits or choices.
    """

    EXPLAINED: ClassVar[Mapping[str, Mapping[str, str]]] = {}

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            flag: Flag = field.metadata["flag"]
            value = getattr(self, field.name)
            if value == "" and not flag.empty and value != field.default:  # as from an unset variable of a shell
                raise OptionError(field.name, "an empty text was given, but a value was expected: leave the option out")
            object.__setattr__(self, field.name, _checked(field.name, value, hints[field.name], flag))
        check_outputs(self)

    def as_json(self) -> dict[str, Any]:
        """Return all options as JSON values, for records and reports."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def check_outputs(options: Options, also: Sequence[tuple[str, Path]] = ()) -> None:
    """Raise `OptionError` if a file that is to be written is also read, or written twice.

    Args:
        options: the options.
        also: names and files that are read besides, such as the config file of the command line.
    """
    read = list(also)
    written: list[tuple[str, Path]] = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, str) and value.startswith(_DATABASE):
            value = Path(value.removeprefix(_DATABASE))
        if field.metadata["flag"].group != "output":
            read += [
                (field.name, one) for one in (value if isinstance(value, tuple) else [value]) if isinstance(one, Path)
            ]
        elif isinstance(value, Path) or (field.name in ("json", "html") and isinstance(value, str) and value != "-"):
            written.append((field.name, Path(value)))
    read += [("model", path) for path in _files_of_model(getattr(options, "model", None))]
    for number, (name, path) in enumerate(written):
        twin = next((other for other, one in [*read, *written[:number]] if _same(path, one)), None)
        if twin is not None:
            raise OptionError(
                name, f"{shown(str(path))} was given, but {twin} names this file, too: choose another name"
            )


def _files_of_model(model: Any) -> list[Path]:
    """Return the files in a model's folder that loading it reads; none for other models."""
    kind, _, place = str(model).partition(":")
    if kind not in ("local-dir", "hf") or not place or not os.path.isdir(place):
        return []
    ends = (".safetensors", ".bin", ".pth", ".pt", "config.json", ".index.json")
    return [path for path in Path(place).iterdir() if path.name.endswith(ends)]


def _same(first: Path, second: Path) -> bool:
    """Return whether two paths are the same file; devices such as /dev/null, and folders, are none."""
    try:
        if first.exists() and second.exists():
            return first.is_file() and second.is_file() and first.samefile(second)
        return not first.exists() and not second.exists() and os.path.realpath(first) == os.path.realpath(second)
    except (OSError, ValueError):  # a name that is not possible; whoever opens it says so
        return False


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of an option; `dataclasses.MISSING` if it is required."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def flags_of(options: type[Options]) -> dict[str, tuple[Any, Flag]]:
    """Return the type and the description of every option of a command by name, in the order of the groups."""
    hints = _hints(options)
    fields = sorted(dataclasses.fields(options), key=lambda field: list(GROUPS).index(field.metadata["flag"].group))
    return {field.name: (hints[field.name], field.metadata["flag"]) for field in fields}


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: paths become text, tuples lists."""
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def without_none(hint: Any) -> tuple[Any, bool]:
    """Return a type without `None`, and whether it had it."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint, False
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    left = parts[0]
    for part in parts[1:]:
        left = left | part
    return left, len(parts) < len(typing.get_args(hint))


def _checked(name: str, value: Any, hint: Any, flag: Flag) -> Any:
    hint, optional = without_none(hint)
    if value is None and optional:
        return None
    if flag.pairs:
        return _pairs(name, value, flag.metavar)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (tuple, Sequence):
        listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        wanted = [inner[0]] * len(listed) if origin is Sequence or inner[-1] is Ellipsis else list(inner)
        if len(listed) != len(wanted):
            raise OptionError(name, f"{shown(value)} has {len(listed)} values, but {len(wanted)} were expected")
        return tuple(_scalar(name, one, kind, flag) for one, kind in zip(listed, wanted, strict=True))
    return _scalar(name, value, hint, flag)


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def _scalar(name: str, value: Any, hint: Any, flag: Flag) -> Any:
    kinds = typing.get_args(hint) or (hint,)
    if str in kinds and int in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if Path in kinds and isinstance(value, str):
        value = Path(value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
        value = float(value)
    fits = type(value) in kinds or (Path in kinds and isinstance(value, Path))
    if not fits:
        expected = " or ".join(_KINDS[kind] for kind in kinds)
        raise OptionError(name, f"{shown(value):.80} was given, but {expected} was expected")
    if flag.choices and value not in flag.choices:
        near = nearest(str(value), [str(choice) for choice in flag.choices])
        hint_text = f": did you mean {near}?" if near else ""
        words = ", ".join(map(str, flag.choices))
        raise OptionError(name, f"{shown(value):.80} was given, but one of {words} was expected{hint_text}")
    if isinstance(value, str | Path) and "\0" in str(value):
        raise OptionError(name, f"{shown(str(value)):.80} holds a null byte, which no name can")
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_number(name, value, flag)
    return value


def _check_number(name: str, value: float, flag: Flag) -> None:
    whole = isinstance(value, int)
    finite = whole or math.isfinite(value)  # (a whole number of many digits is no float)
    high = flag.most if flag.most is not None else (_MOST if whole else math.inf)
    above = flag.above is None or value > flag.above
    if finite and (flag.least is None or value >= flag.least) and above and value <= high:
        return
    limits = [f"of at least {_short(flag.least)}"] if flag.least is not None else []
    limits += [f"above {_short(flag.above)}"] if flag.above is not None else []
    limits += [f"of at most {_short(high)}"] if flag.most is not None or value > high else []
    kind = "a whole number" if whole else "a number" if finite else "a finite number"
    text = f"{value}" if not finite or abs(value) < 10**18 else "a huge number"
    raise OptionError(name, f"{text} was given, but {' '.join([kind, ' and '.join(limits)]).strip()} was expected")


def _short(limit: float) -> str:
    return f"{limit:g}" if abs(limit) < 1e6 else f"{limit:.0f}"


def _pairs(name: str, value: Any, form: str) -> dict[str, Any]:
    """Return a mapping, also from a list of NAME=VALUE."""
    if isinstance(value, Mapping):
        odd = next((key for key in value if not isinstance(key, str | int)), None)
        if odd is not None:
            raise OptionError(name, f"{shown(value):.80} has the key {shown(odd):.40}, but names were expected")
        return {str(key): one for key, one in value.items()}
    if not isinstance(value, str | Sequence):
        raise OptionError(name, f"{shown(value):.80} was given, but {form or 'NAME=VALUE'} was expected")
    found: dict[str, Any] = {}
    for text in [value] if isinstance(value, str) else value:
        key, equals, rest = str(text).partition("=")
        if not equals or not key:
            raise OptionError(name, f"{shown(text):.80} was given, but {form or 'NAME=VALUE'} was expected")
        found[key] = value_of(name, rest)
    return found


def value_of(name: str, text: str) -> Any:
    """Return the number, truth value, list or text that a text spells: 5, 0.5, true, [1, 2], or any other words.

    Raises:
        InputError: if it is a number of too many digits, or nested too deeply.
    """
    import json

    if text in ("True", "False", "None"):  # as Python spells them
        return {"True": True, "False": False, "None": None}[text]
    try:
        found = json.loads(text, parse_constant=str)
    except json.JSONDecodeError:
        return text
    except (ValueError, RecursionError) as error:
        raise OptionError(name, f"{text[:40]!r} is not understood ({error!s:.60}): give a number or a word") from None
    return found


def only_one(first: str, second: str, both: bool) -> None:
    """Raise `InputError` if two options that exclude each other were both given."""
    if both:
        raise InputError(f"--{first} and --{second} were both given, but they exclude each other: give one of them")
