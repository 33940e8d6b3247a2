"""From words to options: cyclopts reads the command line by the types of the options' fields."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.exceptions import (
    CoercionError,
    MissingArgumentError,
    RepeatArgumentError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from tokenmerge.cli.command import Command
from tokenmerge.cli.config_file import values_of
from tokenmerge.cli.flags import all_flags, names_of
from tokenmerge.config import FIELDS
from tokenmerge.errors import InputError, nearest
from tokenmerge.tools.options import Flag, OptionError, Options, check_outputs, default_of, flags_of, without_none


def parse(
    command: Command, options: type[Options], words: Sequence[str], recipes: Mapping[str, Path]
) -> tuple[Any, list[Path]]:
    """Return the options of a command line, and its plugins.

    Args:
        command: the command.
        options: class of its options.
        words: the words after the command's name.
        recipes: files that `--config` knows by name.

    Raises:
        InputError: in one sentence, if a word is not understood, or a value is not valid.
    """
    flags = all_flags(command, options)
    given = _read(command, flags, list(words))
    plugins = [Path(one) for one in given.pop("plugin", [])]
    config = given.pop("config", None)
    values = {} if config is None else values_of(config, recipes, flags_of(options), names_of)
    values |= given
    required = [field for field in flags_of(options) if _is_required(options, field)]
    absent = next((field for field in required if field not in values), None)
    if absent is not None:
        flag = flags[absent][1]
        name = flag.metavar if flag.positional else names_of(absent, flag)[0]
        raise InputError(f"{name} is missing: {flag.help}; for example: {command.example}")
    read = [*(("--config", path) for path in [config] if path is not None), *(("--plugin", path) for path in plugins)]
    try:
        made = options(**values)
        check_outputs(made, read)
        return made, plugins
    except OptionError as error:
        name = _shown_name(error.option, flags[error.option][1])
        raise InputError(f"{name}: {error.reason}") from None


def _is_required(options: type[Options], field: str) -> bool:
    return default_of(options.__dataclass_fields__[field]) is dataclasses.MISSING


def _shown_name(field: str, flag: Flag) -> str:
    return (flag.metavar or field.upper()) if flag.positional else names_of(field, flag)[0]


def _read(command: Command, flags: Mapping[str, tuple[Any, Flag]], words: list[str]) -> dict[str, Any]:
    """Return the values of the options that were given, by the names of the fields."""
    app = App(name="tokenmerge", help_flags=[], version_flags=[], exit_on_error=False, print_error=False)
    app.default(_function(flags))
    try:
        _, bound, _ = app.parse_args(_joined(words))
    except CycloptsError as error:
        raise InputError(_sentence(error, flags, words)) from None
    return dict(zip(bound.signature.parameters, bound.args, strict=False)) | bound.kwargs


def _joined(words: Sequence[str]) -> list[str]:
    """Return the words with a lone "-" joined to the flag before it, because cyclopts takes it for another flag."""
    found: list[str] = []
    for word in words:
        if word == "-" and found and found[-1].startswith("--") and "=" not in found[-1]:
            found[-1] += "=-"
        else:
            found.append(word)
    return found


def _function(flags: Mapping[str, tuple[Any, Flag]]) -> Any:
    """Return a function whose parameters are the options, for cyclopts."""

    def run(*args: Any, **given: Any) -> None: ...

    kinds = inspect.Parameter
    positional = [field for field, (_, flag) in flags.items() if flag.positional]
    ordered = [*positional, *(field for field in flags if field not in positional)]
    parameters = [
        kinds(
            field,
            kinds.POSITIONAL_OR_KEYWORD if field in positional else kinds.KEYWORD_ONLY,
            default=None,
            annotation=_annotation(field, *flags[field]),
        )
        for field in ordered
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _annotation(field: str, hint: Any, flag: Flag) -> Any:
    hint, _ = without_none(hint)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    more: dict[str, Any] = {"negative": (), "json_list": False, "json_dict": False}
    if flag.pairs or origin is Sequence:
        kind = next((one for one in (Path, float) if one in inner and str not in inner), str)
        hint = list[kind]  # type: ignore[valid-type]
        more["consume_multiple"] = (1, None)
    else:
        more["allow_repeating"] = True  # the last one counts, so that a script can append what overrides
        if hint is int:
            more["converter"] = _whole
    if hint is bool and flag.negatable:
        more["negative"] = f"--no-{names_of(field, flag)[0][2:]}"
    if field == "plugin":
        more["consume_multiple"] = (1, 1)
    return Annotated[hint | None, Parameter(name=names_of(field, flag), **more)]


def _whole(kind: Any, tokens: Sequence[Any]) -> int:
    return int(tokens[0].value)  # cyclopts would round 1.5


def _sentence(error: CycloptsError, flags: Mapping[str, tuple[Any, Flag]], words: Sequence[str]) -> str:
    """Return an error of cyclopts as one sentence."""
    names = [name for field, (_, flag) in flags.items() for name in names_of(field, flag)]
    if isinstance(error, UnknownOptionError):
        return unknown(str(error.token.keyword or error.token.value), names)
    if isinstance(error, UnusedCliTokensError):
        odd = (error.unused_tokens or ["?"])[0]
        return f"{odd!r:.80} stands alone, but no further argument was expected: did you forget a flag before it?"
    if isinstance(error, RepeatArgumentError):
        return f"{error.token.keyword} was given twice, but it holds one value: give it once"
    argument = getattr(error, "argument", None)
    field = "" if argument is None else str(argument.field_info.name)
    name = _shown_name(field, flags[field][1]) if field in flags else "an argument"
    if isinstance(error, MissingArgumentError):
        if field not in flags:
            return f"{name} is missing: see --help"
        inner = typing.get_args(without_none(flags[field][0])[0])
        many = f"{len(inner)} values" if len(inner) > 1 and float in inner else "a value"
        return f"{name} needs {many}: {flags[field][1].help}"
    if isinstance(error, CoercionError):
        token = getattr(error, "token", None)
        found = "" if token is None else f"{token.value!r:.60} was given, but "
        hint, _ = without_none(flags[field][0]) if field in flags else (str, False)
        if hint is bool:
            return f"{name} is a switch, and takes no value: write {name} alone"
        kind = {int: "a whole number", float: "a number"}.get(next(iter(typing.get_args(hint)), hint), "a value")
        return f"{name}: {found}{kind} was expected"
    return " ".join(str(error).split())[:300]


def unknown(word: str, names: Sequence[str]) -> str:
    """Return the sentence for an option that does not exist, with what it may have meant, or its successor."""
    bare = word.lstrip("-").replace("-", "_")
    if word in names:
        return f"{word} stands after --, where only names of files and models can: put it before"
    if bare in FIELDS:
        return f"{word} is a setting: give it as --set {bare}=VALUE (tokenmerge help settings lists all)"
    if bare == "option":
        return "--option has become --set: give --set NAME=VALUE, such as --set iterations=5"
    near = nearest(word, names, 0.6)
    return f"there is no option {word!r:.80}" + (f": did you mean {near}?" if near else ": see --help")
