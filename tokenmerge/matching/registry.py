"""Matchers by name. A matcher is one function: metric, r, protected -> MergePlan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

from tokenmerge.errors import ConfigError, InputError
from tokenmerge.plan import MergePlan


class Matcher(Protocol):
    """Decides which tokens become one.

    The number of tokens it leaves may depend on shapes and `r` alone, never on values, so that every image
    of a batch keeps the same length and a compiled model has static shapes.
    """

    def __call__(self, metric: Tensor, r: int, protected: int = 0) -> MergePlan:
        """Plan the merge of `r` of the N tokens in `metric [B, N, D]`; the first `protected` stay alone."""
        ...


_MATCHERS: dict[str, Matcher] = {}
_M = TypeVar("_M", bound=Matcher)


def register_matcher(name: str) -> Callable[[_M], _M]:
    """Make a function selectable as `patch(model, matcher=name)`.

    Raises:
        ConfigError: if another function already has that name.
    """

    def add(matcher: _M) -> _M:
        if name in _MATCHERS and _MATCHERS[name] is not matcher:
            raise ConfigError(f"a matcher named {name!r} is registered already: choose another name")
        _MATCHERS[name] = matcher
        return matcher

    return add


def get_matcher(name: str) -> Matcher:
    """The matcher of that name.

    Raises:
        ConfigError: if there is none.
    """
    try:
        return _MATCHERS[name]
    except KeyError:
        raise ConfigError(f"matcher={name!r} is not registered; known are {', '.join(sorted(_MATCHERS))}") from None


def check_matching_input(metric: Tensor, r: int, protected: int) -> None:
    """Raise `InputError` unless `metric` is `[B, N, D]` floating point and neither number is negative."""
    if not (isinstance(r, int) and isinstance(protected, int)):
        raise InputError(f"r={r!r} and protected={protected!r} count tokens: use whole numbers")
    if metric.dim() != 3 or not metric.is_floating_point():
        raise InputError(
            f"metric is {tuple(metric.shape)} {metric.dtype}, but floating point of shape [B, N, D] was expected"
        )
    if r < 0 or protected < 0:
        raise InputError(f"r={r} and protected={protected} count tokens, but one of them is negative: use 0 or more")
