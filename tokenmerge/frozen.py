"""Immutable lists and dicts, for the values of settings and methods."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NoReturn

from tokenmerge.errors import ConfigError


def _immutable(self: Any, *_: Any, **__: Any) -> NoReturn:
    raise TypeError("a config cannot be changed: make another one with MergeConfig.create, or call handle.update(…)")


class FrozenList(list):  # type: ignore[type-arg]  # of anything
    """Immutable, hashable list that equals a list of the same entries."""

    __setitem__ = __delitem__ = __iadd__ = __imul__ = _immutable
    append = extend = insert = pop = remove = clear = sort = reverse = _immutable

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenList, (list(self),)


class FrozenDict(dict):  # type: ignore[type-arg]  # of anything
    """Immutable, hashable dict that equals a dict of the same entries."""

    __setitem__ = __delitem__ = __ior__ = _immutable
    pop = popitem = clear = update = setdefault = _immutable

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)


_DEEPEST = 20
"""Deepest allowed nesting of lists and mappings in an option."""


def frozen(value: Any, depth: int = 0) -> Any:
    """Return a value with all lists, tuples and mappings in it replaced by immutable copies.

    Args:
        value: the value of a setting.
        depth: current nesting depth, for the recursion.

    Raises:
        ConfigError: if the value contains something mutable or not comparable (arrays, tensors, sets), or is nested too
            deeply.
    """
    if depth > _DEEPEST:
        raise ConfigError(f"an option holds lists within lists, more than {_DEEPEST} deep: give a flatter value")
    if isinstance(value, Mapping):
        return FrozenDict({key: frozen(entry, depth + 1) for key, entry in value.items()})
    if isinstance(value, list | tuple):
        entries = [frozen(entry, depth + 1) for entry in value]
        if isinstance(value, list):
            return FrozenList(entries)
        same = all(one is other for one, other in zip(entries, value, strict=True))
        return value if same else type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
    if not isinstance(value, Hashable) or hasattr(value, "__setitem__"):
        raise ConfigError(
            f"an option holds a {type(value).__name__}, which can be changed from outside or cannot be compared: use numbers, text and "
            "lists of them"
        )
    return value


def thawed(value: Any) -> Any:
    """Return a frozen value with its lists and mappings replaced by plain lists and dicts."""
    if isinstance(value, Mapping):
        return {key: thawed(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [thawed(entry) for entry in value]
        return entries if isinstance(value, list) else tuple(entries)
    return value


def check_keys(value: Any) -> None:
    """Raise `TypeError` if a mapping in a value has a key that is no text, because JSON would give it back as text."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r:.40} is no text")
            check_keys(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            check_keys(entry)
