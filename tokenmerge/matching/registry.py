"""Matchers by name. A matcher is one function: metric, r, protected -> MergePlan."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor

from tokenmerge.errors import ConfigError, InputError
from tokenmerge.ops import Backend
from tokenmerge.plan import MergePlan


class Matcher(Protocol):
    """Decides which tokens become one.

    The number of tokens it leaves may depend on shapes and `r` alone, never on values, so that every image
    of a batch keeps the same length and a compiled model has static shapes.
    """

    def __call__(self, metric: Tensor, r: int, protected: int = 0) -> MergePlan:
        """Plan the merge of `r` of the N tokens in `metric [B, N, D]`; the first `protected` stay alone.

        A matcher with kernels of its own may take a fourth argument, `backend`, and then must also take keys
        `[B, H, N, D]` that are not averaged over heads yet.
        """
        ...


_MATCHERS: dict[str, Matcher] = {}
_HAVE_BACKENDS: set[str] = set()
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
        if "backend" in inspect.signature(matcher).parameters:
            _HAVE_BACKENDS.add(name)
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


def has_backends(name: str) -> bool:
    """Whether the matcher of that name takes `backend`, and keys that are not averaged over heads."""
    return name in _HAVE_BACKENDS


def run_matcher(name: str, metric: Tensor, r: int, protected: int, backend: Backend) -> MergePlan:
    """What the matcher of that name plans, with the backend if it has a choice."""
    matcher: Any = get_matcher(name)
    plan: MergePlan = (
        matcher(metric, r, protected, backend=backend) if has_backends(name) else matcher(metric, r, protected)
    )
    return plan


def check_matching_input(metric: Tensor, r: int, protected: int, per_head: bool = False) -> None:
    """Raise `InputError` unless `metric` is `[B, N, D]` floating point and neither number is negative.

    With `per_head`, `[B, H, N, D]` will do as well.
    """
    if not (isinstance(r, int) and isinstance(protected, int)):
        raise InputError(f"r={r!r} and protected={protected!r} count tokens: use whole numbers")
    if metric.dim() not in ((3, 4) if per_head else (3,)) or not metric.is_floating_point():
        shapes = "[B, N, D] or [B, H, N, D]" if per_head else "[B, N, D]"
        raise InputError(
            f"metric is {tuple(metric.shape)} {metric.dtype}, but floating point of shape {shapes} was expected"
        )
    if r < 0 or protected < 0:
        raise InputError(f"r={r} and protected={protected} count tokens, but one of them is negative: use 0 or more")
