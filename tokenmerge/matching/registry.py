"""Matchers by name. A matcher is one function: metric, r, protected -> MergePlan; it may ask for more by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor

from tokenmerge.errors import ConfigError, InputError
from tokenmerge.plan import MergePlan

OFFERED = {
    "size": "patches per token, [B, N] float32",
    "attention": "attention of the class token to each token, mean over heads, [B, N] float32; it sums to 1. In models "
    "without a class token the mean attention of all tokens",
    "tokens": "the tokens that will be merged, [B, N, C]",
    "values": "V, [B, H, N, D]",
    "anchor": "the original token at whose position each token stands, [B, N] int64",
    "grid": "patches along each axis, (h, w) or (t, h, w); None if unknown",
    "layer": "number of the block, from 0",
    "layers": "how many blocks there are",
    "distance": "MergeConfig.distance",
    "partition": "MergeConfig.partition",
    "predictor": "the block's trained predictor (tokenmerge.matching.predictors), or None",
    "backend": "MergeConfig.backend; such a matcher must also take keys [B, H, N, D] not averaged over heads yet",
}
"""What a matcher may ask for by naming a parameter so."""


class Matcher(Protocol):
    """Decides which tokens become one.

    The number of tokens it leaves may depend on shapes and `r` alone, never on values, so that every image
    of a batch keeps the same length and a compiled model has static shapes (unless it is registered as adaptive).
    """

    def __call__(self, metric: Tensor, r: int, protected: int = 0) -> MergePlan:
        """Plan the merge of `r` of the N tokens in `metric [B, N, D]`; the first `protected` stay alone.

        Further parameters need a default. Those named in `OFFERED` are filled in by the block that merges; all others
        are options, given by `MergeConfig.options`.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered matcher.

    Attributes:
        name: by which `MergeConfig.matcher` finds it.
        matcher: the function.
        offered: which of `OFFERED` it takes.
        options: its other parameters, with their defaults.
        adaptive: whether the tokens it leaves depend on values.
        learned: whether it works with weights of its own, which must be trained first.
    """

    name: str
    matcher: Any
    offered: frozenset[str]
    options: Mapping[str, Any]
    adaptive: bool
    learned: bool

    @property
    def about(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.matcher) or "").partition("\n")[0]


_MATCHERS: dict[str, Entry] = {}
_M = TypeVar("_M", bound=Callable[..., MergePlan])


def register_matcher(name: str, adaptive: bool = False, learned: bool = False) -> Callable[[_M], _M]:
    """Make a function selectable as `patch(model, matcher=name)`.

    Args:
        name: what to select it by.
        adaptive: whether the number of tokens it leaves depends on values: such a model cannot be compiled or exported
            with static shapes, and `r` is what it merges on average.
        learned: whether it needs trained weights, and so cannot be compared off the shelf; while training it may leave
            more tokens than r says.

    Raises:
        ConfigError: if a function from elsewhere already has that name (the same one, defined again as in a notebook, takes
            its place), or a further parameter has no default.
    """

    def add(matcher: _M) -> _M:
        if name in _MATCHERS and _place(_MATCHERS[name].matcher) != _place(matcher):
            raise ConfigError(f"a matcher named {name!r} is registered already: choose another name")
        further = list(inspect.signature(matcher).parameters.values())[3:]
        for parameter in further:
            if parameter.default is parameter.empty and parameter.name not in OFFERED:
                raise ConfigError(
                    f"matcher {name!r} has a parameter {parameter.name!r} without a default, but only metric, r, protected "
                    f"and {', '.join(OFFERED)} are filled in: give it a default, and it becomes an option"
                )
        offered = frozenset(parameter.name for parameter in further if parameter.name in OFFERED)
        options = {parameter.name: parameter.default for parameter in further if parameter.name not in OFFERED}
        _MATCHERS[name] = Entry(name, matcher, offered, options, adaptive, learned)
        return matcher

    return add


def _place(function: Any) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def get_entry(name: str) -> Entry:
    """What is registered under that name.

    Raises:
        ConfigError: if there is nothing.
    """
    try:
        return _MATCHERS[name]
    except KeyError:
        raise ConfigError(f"matcher={name!r} is not registered; known are {', '.join(sorted(_MATCHERS))}") from None


def get_matcher(name: str) -> Matcher:
    """The matcher of that name.

    Raises:
        ConfigError: if there is none.
    """
    matcher: Matcher = get_entry(name).matcher
    return matcher


def matcher_names() -> tuple[str, ...]:
    """Every registered matcher, in the order of registration."""
    return tuple(_MATCHERS)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless the matcher of that name has all of these options."""
    known = get_entry(name).options
    for option in options:
        if option not in known:
            raise ConfigError(
                f"matcher {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}: check the spelling"
            )


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
