"""Allowed values of a matcher's options, read from the annotations of its parameters.

Supported are `int`, `float`, `str`, `bool`, `Literal[…]`, lists and unions of them; numbers must be finite. `Annotated`
adds rules: `Annotated[int, AtLeast(1)]`, `Annotated[list[float], PerBlock()]`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from typing import Annotated, Any, Literal

from torch import nn

from tokenmerge.schedule import is_number

_WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}


def _numbers(value: Any) -> list[Any]:
    """Return the numbers in a value or in nested lists of values; other types are skipped."""
    if isinstance(value, list):
        return [number for entry in value for number in _numbers(entry)]
    return [value] if is_number(value) else []


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """Rule for a number: its least value.

    Attributes:
        low: the least value, inclusive.
    """

    low: float

    def fault(self, value: Any) -> str | None:
        """Return what a number should be, as text, if a number in the value violates the rule; else `None`."""
        return None if all(number >= self.low for number in _numbers(value)) else f"at least {self.low:g}"


@dataclasses.dataclass(frozen=True)
class Within:
    """Rule for a number: its least and its largest value.

    Attributes:
        low: the least value, inclusive.
        high: the largest value, inclusive.
    """

    low: float
    high: float

    def fault(self, value: Any) -> str | None:
        """Return what a number should be, as text, if a number in the value violates the rule; else `None`."""
        fits = all(self.low <= number <= self.high for number in _numbers(value))
        return None if fits else f"between {self.low:g} and {self.high:g}"


@dataclasses.dataclass(frozen=True)
class PerBlock:
    """Rule for a list: one entry for each block of the model."""

    def fault(self, value: Any) -> str | None:
        """Return `None`: the length is checked when a model is patched (`registry.check_options`)."""
        return None


def hints_of(function: Any) -> dict[str, Any]:
    """Return the supported annotations of a function's parameters, as types by parameter name."""
    return _hints_of(plain_function(function))


@functools.cache
def _hints_of(function: Any) -> dict[str, Any]:
    found = {}
    for name, hint in getattr(function, "__annotations__", {}).items():
        try:
            if isinstance(hint, str):
                hint = eval(hint, function.__globals__)  # evaluates only source code of the function itself
            known = name != "return" and _known(hint)
        except Exception:  # imported for type checkers only, or not a type
            continue
        if known:
            found[name] = hint
    return found


def plain_function(function: Any) -> Any:
    """Return the innermost function behind wrappers, partials, methods, modules and objects with `__call__`."""
    while True:
        function = inspect.unwrap(function)
        if isinstance(function, functools.partial):
            function = function.func
        elif inspect.ismethod(function):
            function = function.__func__
        elif isinstance(function, nn.Module):
            function = type(function).forward
        elif not inspect.isroutine(function) and not inspect.isclass(function):
            function = type(function).__call__
        else:
            return function


def _known(hint: Any) -> bool:
    """Return whether `fault_of` supports an annotation."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _known(parts[0])
    if origin in (typing.Union, types.UnionType, list):
        return all(_known(part) for part in parts)
    return origin is Literal or hint in _WORDS or hint is type(None)


def per_block(hint: Any) -> bool:
    """Return whether an annotation states that a list has one entry per block."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        return any(isinstance(part, PerBlock) for part in parts[1:])
    return any(per_block(part) for part in parts)


def fault_of(value: Any, hint: Any) -> str | None:
    """Return what a value should be, as text, if it does not match an annotation; `None` if it does.

    Example:
        >>> from tokenmerge.matching.values import AtLeast, fault_of
        >>> fault_of(0, Annotated[int, AtLeast(1)])
        'at least 1'
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        fault = fault_of(value, parts[0])
        rules = [rule for rule in parts[1:] if isinstance(rule, AtLeast | Within | PerBlock)]  # others are ignored
        return fault or next((found for rule in rules if (found := rule.fault(value))), None)
    if origin in (typing.Union, types.UnionType):
        faults = [fault_of(value, part) for part in parts]
        return None if None in faults else " or ".join(str(fault) for fault in faults)
    if origin is Literal:
        known = any(
            isinstance(value, type(part)) and isinstance(value, bool) == isinstance(part, bool) and value == part
            for part in parts
        )  # types are compared first, because `==` of an array is an array
        return None if known else f"one of {', '.join(map(str, parts))}"
    if origin is list:
        if not isinstance(value, list):
            return "a list"
        return next((f"a list, each entry {fault}" for entry in value if (fault := fault_of(entry, parts[0]))), None)
    if hint is type(None):
        return None if value is None else "none"
    number = is_number(value)
    fits = {
        int: number and isinstance(value, int),
        float: number,
        str: isinstance(value, str),
        bool: isinstance(value, bool),
    }
    return None if fits[hint] else _WORDS[hint]
