"""Values of options from a YAML or JSON file.

A file sets numbers, words, lists and choices. It never names a class, a file of code or a plugin: its values are data of the
options that its keys name, whatever they look like.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenmerge.config import FIELDS
from tokenmerge.errors import InputError, nearest, shown
from tokenmerge.tools.options import Flag, OptionError, value_of, without_none
from tokenmerge.tools.reading.documents import read_yaml

_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
"""Words for truth values in YAML files that were written for version 1.1."""
Flags = Mapping[str, tuple[Any, Flag]]


def values_of(
    config: Path, recipes: Mapping[str, Path], flags: Flags, names_of: Callable[[str, Flag], list[str]]
) -> dict[str, Any]:
    """Return the values in a config file by the names of the options' fields.

    Args:
        config: the file, or the name of a recipe.
        recipes: files by name.
        flags: the options that it may set.
        names_of: function that returns the names of an option on the command line.

    Raises:
        InputError: if the file cannot be read, a key is no option, or a value is of a kind that no option takes.
    """
    file = recipes.get(str(config), config)
    if not file.exists() and recipes:
        near = nearest(str(config), list(recipes))
        hint = f"did you mean {near}?" if near else f"give a YAML file, or one of {', '.join(recipes)}"
        raise InputError(f"--config {shown(str(config))} is neither a file nor a recipe: {hint}")
    found = read_yaml(file, "the config")
    if not isinstance(found, dict):
        raise InputError(
            f"the config {shown(str(config))} holds no names and values: write lines such as 'epochs: 100'"
        )
    known = {field: field for field in flags}
    known |= {
        name.lstrip("-").replace("-", "_"): field
        for field, (_, flag) in flags.items()
        for name in names_of(field, flag)
    }
    values: dict[str, Any] = {}
    for name, value in found.items():
        field = known.get(str(name).replace("-", "_"))
        if field is None:
            raise InputError(
                f"the config {shown(str(config))} sets {shown(name):.60}, which {_why(str(name), list(known))}"
            )
        if field in values:
            raise InputError(f"the config {shown(str(config))} sets {field} twice: keep one of them")
        if value is None:
            continue
        try:
            values[field] = _value(field, value, *flags[field])
        except OptionError as error:
            raise InputError(f"the config {shown(str(config))} sets {name}: {error.reason}") from None
    return values


def _why(name: str, known: Sequence[str]) -> str:
    bare = name.replace("-", "_")
    if bare in ("plugin", "config"):
        return "is taken from the command line alone, because it runs or reads further files: leave it out"
    if bare in FIELDS or bare == "option":
        return f"is a setting: write 'set: {{{bare}: VALUE}}'"
    near = nearest(bare, known)
    return "is no option of this command" + (f": did you mean {near}?" if near else ": see --help")


def _value(field: str, value: Any, hint: Any, flag: Flag) -> Any:
    """Return a value with numbers that YAML reads as text, such as 1e-4, as numbers; refuse nested values."""
    if flag.pairs and isinstance(value, dict):
        return {str(name): _flat(field, one) for name, one in value.items()}
    value = _flat(field, value)
    hint, _ = without_none(hint)
    kinds = typing.get_args(hint) or (hint,)
    wants_text = str in kinds or Path in kinds or flag.pairs

    def one(part: Any) -> Any:
        if wants_text:  # a word that looks like a number, such as the name of a class
            return str(part) if isinstance(part, int | float) and not isinstance(part, bool) else part
        if bool in kinds:
            return _SWITCHES.get(part.lower(), part) if isinstance(part, str) else part
        return value_of(field, part) if isinstance(part, str) else part

    return [one(part) for part in value] if isinstance(value, list) else one(value)


def _flat(field: str, value: Any) -> Any:
    parts = value if isinstance(value, list) else [value]
    odd = next((part for part in parts if not isinstance(part, str | int | float | bool)), None)
    if odd is not None:
        raise OptionError(field, f"{shown(odd):.80} was given, but a number, a word, or a list of them was expected")
    return value
