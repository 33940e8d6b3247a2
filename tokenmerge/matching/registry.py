"""Registry of matchers: functions `(metric, r, protected) -> MergePlan`, selected by name.

The registry checks shapes and options, cuts r to the most that can merge, and returns the identity plan for r = 0, so
that a matcher contains its mathematics alone.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from tokenmerge.config import MergeConfig
from tokenmerge.errors import ConfigError, InputError, one_of, shown
from tokenmerge.matching.checks import check_matching_input, check_offered, check_plan
from tokenmerge.matching.values import fault_of, hints_of, per_block, plain_function
from tokenmerge.plan import MergePlan
from tokenmerge.schedule import Most, max_merges

OFFERED = {
    "size": "patches per token, [B, N] float32",
    "attention": "attention of the class token to each token, mean over heads, [B, N] float32; it sums to 1. In models "
    "without a class token the mean attention of all tokens",
    "tokens": "the tokens that will be merged, [B, N, C]",
    "values": "V, [B, H, N, D]",
    "anchor": "the original token at whose position each token stands, [B, N] int64",
    "grid": "patches along each axis in this pass, (h, w) or (t, h, w); None if unknown",
    "layer": "number of the block, from 0",
    "layers": "how many blocks there are",
    "distance": "MergeConfig.distance",
    "partition": "MergeConfig.partition",
    "predictor": "the block's trained predictor (tokenmerge.matching.learned), or None",
    "carried": "what the plan of the block before carried (MergePlan.carried), or None; for learned matchers",
    "backend": "MergeConfig.backend; such a matcher must also take keys [B, H, N, D] not averaged over heads yet",
}
"""Parameters that a block fills in if a matcher has them, with a description of each."""
Requirement = Literal["sizes", "class token", "after", "every block"]
"""What a matcher can require of a model and its settings: proportional attention, because its masks are sizes; a head
that reads the class token alone; `place="after"`; and r above 0 in every block.
"""
INSIDE = frozenset({"attention", "values"})
"""The entries of `OFFERED` that come from inside attention."""


class Matcher(Protocol):
    """Matching algorithm, which decides which tokens merge.

    The number of tokens that it leaves may depend on shapes and `r` alone and not on values, so that all images of a
    batch keep the same number of tokens and a compiled model has static shapes. Matchers registered as adaptive are
    exempt.
    """

    def __call__(self, metric: Tensor, r: int, protected: int = 0) -> MergePlan:
        """Match tokens and return the plan of their merge.

        A matcher may have further parameters. The block fills in the ones named in `OFFERED`; all others are
        options (`MergeConfig.options`), which need a default and whose annotations state the allowed values.

        Args:
            metric: `[B, N, D]`, floating: the features compared.
            r: tokens to merge away, at least 1 and at most `schedule.max_merges` of N.
            protected: leading tokens that neither merge nor are merged into.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered matcher.

    Attributes:
        name: the value of `MergeConfig.matcher` that selects it.
        matcher: the function without checks of its arguments, as blocks call it.
        checked: the function with checks, as users call it.
        offered: its parameters among `OFFERED`.
        options: its other parameters, with their defaults.
        adaptive: whether the number of tokens it leaves depends on values.
        learned: whether it needs trained weights.
        most: how many of the unprotected tokens it can merge away.
        requires: what it requires of a model and its settings.
    """

    name: str
    matcher: Any
    checked: Any
    offered: frozenset[str]
    options: Mapping[str, Any]
    adaptive: bool
    learned: bool
    most: Most
    requires: tuple[Requirement, ...] = ()

    @property
    def about(self) -> str:
        """The first line of the matcher's docstring."""
        own = inspect.unwrap(self.matcher)
        return (inspect.getdoc(plain_function(own) if isinstance(own, functools.partial) else own) or "").partition(
            "\n"
        )[0]

    @property
    def looks_inside(self) -> bool:
        """Whether the matcher needs Q, K or V as attention uses them."""
        return bool(self.offered & INSIDE)

    def __reduce__(self) -> tuple[Any, ...]:
        return get_entry, (self.name,)  # pickled by name: the function may be a local one


_MATCHERS: dict[str, Entry] = {}
_M = TypeVar("_M", bound=Callable[..., MergePlan])


def register_matcher(
    name: str,
    adaptive: bool = False,
    learned: bool = False,
    most: Most = "half",
    requires: tuple[Requirement, ...] = (),
) -> Callable[[_M], _M]:
    """Register a matching function as a matcher, so that `patch(model, matcher=name)` selects it.

    Args:
        name: name of the matcher.
        adaptive: whether the number of tokens it leaves depends on values. A model with such a matcher cannot be
            compiled or exported with static shapes, and merges r tokens on average.
        learned: whether it needs trained weights and so cannot work on a pretrained model without training; in training
            it may leave more than N − r tokens, and it gets its tokens with their gradient.
        most: how many of the unprotected tokens it can merge away: "half" or "all but one".
        requires: what it requires of a model and its settings, checked when a model is patched: "sizes" (proportional
            attention, because its masks are sizes), "class token" (a head that reads this token alone), "after"
            (`place="after"`) and "every block" (r above 0 in each block).

    Returns:
        A decorator, which returns the function with checks of its arguments. These cut r to `schedule.max_merges`, and r = 0
        returns the identity plan. Blocks call the function without these checks and verify its plans instead.

    Raises:
        ConfigError: if another function is registered under that name (defining the same function again replaces it),
            if the function does not take metric, r and protected, or if an option has no default.

    Example:
        >>> import torch, tokenmerge
        >>> from tokenmerge.matching.joining import drop, lowest
        >>> @tokenmerge.register_matcher("drop_shortest", most="all but one")
        ... def drop_shortest(metric, r, protected=0):
        ...     return drop(lowest(metric.norm(dim=2), r, protected), metric.shape[1])
        >>> drop_shortest(torch.randn(1, 9, 4), r=20, protected=1).tokens_out  # r is cut to 7
        2
    """

    flags = isinstance(adaptive, bool) and isinstance(learned, bool)
    if not isinstance(name, str) or not name or fault_of(most, Most) or not flags:
        raise ConfigError(
            f"a matcher was to be registered as {shown(name)} with most={shown(most)}, adaptive={shown(adaptive)} and learned={shown(learned)}, but "
            "its name must be text, most 'half' or 'all but one', and the others true or false: change them"
        )
    odd = [one for one in requires if one not in get_args(Requirement)]
    if odd:
        raise ConfigError(
            f"matcher {shown(name)} requires {shown(odd[0])}, but one of {', '.join(get_args(Requirement))} was expected: change it"
        )

    def add(matcher: _M) -> _M:
        _check_callable(name, matcher)
        if name in _MATCHERS and _home(_MATCHERS[name].matcher) != _home(matcher):
            raise ConfigError(f"a matcher named {shown(name)} is registered already: choose another name")
        further = _further(matcher)
        for parameter in further:
            if parameter.default is parameter.empty and parameter.name not in OFFERED:
                raise ConfigError(
                    f"matcher {shown(name)} has a parameter {parameter.name!r} without a default, but only metric, r, protected "
                    f"and {', '.join(OFFERED)} are filled in: give it a default, and it becomes an option"
                )
        offered = frozenset(parameter.name for parameter in further if parameter.name in OFFERED)
        options = {parameter.name: parameter.default for parameter in further if parameter.name not in OFFERED}
        function = matcher if _is_own(matcher) else _watched(name, matcher)
        checked = _checked(name, function, "backend" in offered, most)
        _MATCHERS[name] = Entry(name, function, checked, offered, options, adaptive, learned, most, requires)
        return cast("_M", checked)

    return add


def _watched(name: str, function: Any) -> Callable[..., MergePlan]:
    """Return a third-party matcher with checks of its plan in every pass; tests verify the plans of tokenmerge's own."""

    @functools.wraps(function)
    def matcher(metric: Tensor, r: int, protected: int = 0, *args: Any, **kwargs: Any) -> MergePlan:
        def own(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) else value

        # copies, because these are the tokens, sizes and keys of the pass, and a matcher may modify its arguments
        given = {name: own(value) for name, value in kwargs.items()}
        plan: MergePlan = function(own(metric), r, protected, *map(own, args), **given)
        check_plan(plan, name, metric, protected)
        return plan

    return matcher


def _checked(name: str, function: Any, per_head: bool, most: Most) -> Callable[..., MergePlan]:
    """Return a matcher with checks of its arguments, for direct calls."""
    signature = inspect.signature(function)
    further = [parameter.name for parameter in _further(function)]

    # these two read annotations, which Dynamo cannot trace; it calls them and treats their results as constants
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def known() -> tuple[str, ...]:
        return tuple(given for given in hints_of(function) if given in further)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def fault(given: str, value: Any) -> str | None:
        return fault_of(value, hints_of(function)[given])

    @functools.wraps(function)
    def matcher(*args: Any, **kwargs: Any) -> MergePlan:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        metric, r, protected = (*bound.args[:3], 0)[:3]
        check_matching_input(metric, r, protected, per_head)
        check_offered(metric, {given: bound.arguments.get(given) for given in OFFERED})
        for given in known():
            value = bound.arguments[given]
            if wanted := fault(given, value):
                raise ConfigError(
                    f"{given}={shown(value)} of matcher {shown(name)}, but it must be {wanted}: change it"
                )
        tokens = metric.shape[-2]
        r = min(r, max_merges(tokens, protected, most))
        if r == 0:
            return MergePlan.identity(metric.shape[0], tokens, metric.device)
        plan: MergePlan = function(metric, r, *bound.args[2:], **bound.kwargs)
        return plan

    return matcher


def _home(function: Any) -> tuple[str, ...]:
    function = inspect.unwrap(function)
    given = (str(function.args), str(function.keywords)) if isinstance(function, functools.partial) else ()
    function = plain_function(function)
    return function.__module__, function.__qualname__, *given


def _is_own(function: Any) -> bool:
    """Return whether a function's code is tokenmerge's; `__module__` does not tell, because decorators copy it."""
    return str(getattr(function, "__globals__", {}).get("__name__", "")).startswith("tokenmerge.")


def _parameters(matcher: Any) -> tuple[list[inspect.Parameter], int, bool]:
    """Return the parameters of a callable, how many of the first three are positional, and whether it takes `*args`."""
    try:
        found = inspect.signature(matcher.forward if isinstance(matcher, nn.Module) else matcher)
    except (TypeError, ValueError):  # not callable, or without a signature
        return [], 0, False
    parameters = list(found.parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    by_place = 0
    while by_place < min(3, len(parameters)) and parameters[by_place].kind in kinds:
        by_place += 1
    return parameters, by_place, any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters[:3])


def _further(matcher: Any) -> list[inspect.Parameter]:
    """Return the parameters of a matcher after metric, r and protected."""
    parameters, by_place, any_number = _parameters(matcher)
    further = parameters[by_place:]
    if any_number:  # a wrapper with *args and **kwargs
        further = [p for p in further if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return further


def _check_callable(name: str, matcher: Any) -> None:
    """Raise `ConfigError` unless a matcher can be called as `matcher(metric, r, protected)`."""
    parameters, by_place, any_number = _parameters(matcher)
    if inspect.isclass(matcher) or not (by_place == 3 or any_number):
        raise ConfigError(
            f"matcher {shown(name)} is a {type(matcher).__name__} that takes {', '.join(map(str, parameters[:3])) or 'nothing'}, but a function "
            "whose first three parameters are metric, r and protected was expected: write def matcher(metric, r, protected=0)"
        )


def get_entry(name: str) -> Entry:
    """Return the entry of a registered matcher.

    Raises:
        ConfigError: if no matcher has that name.
    """
    try:
        return _MATCHERS[name]
    except (KeyError, TypeError):
        raise ConfigError(
            f"matcher={shown(name)} is not registered; known are {', '.join(sorted(_MATCHERS))}: {one_of(name, _MATCHERS)}"
        ) from None


def entry_for(config: MergeConfig) -> Entry:
    """Return the entry of the matcher that a config selects.

    Raises:
        ConfigError: if no matcher has that name.
    """
    return get_entry(config.matcher)


def get_matcher(name: str) -> Matcher:
    """Return a registered matcher with checks of its arguments, for direct calls.

    Raises:
        ConfigError: if no matcher has that name.
    """
    matcher: Matcher = get_entry(name).checked
    return matcher


def matcher_names() -> tuple[str, ...]:
    """Return the names of all registered matchers, in the order of registration."""
    return tuple(_MATCHERS)


def check_options(name: str, options: Mapping[str, Any], layers: int | None = None) -> None:
    """Check options of a matcher against its parameters and their annotations.

    Args:
        name: name of the matcher.
        options: values by option name.
        layers: number of blocks of the model, or `None` if unknown; lists with one entry per block must have this length.

    Raises:
        ConfigError: if the matcher does not exist or lacks an option, or a value is not allowed.
    """
    entry = get_entry(name)
    if not isinstance(options, Mapping):
        raise ConfigError(f"options={shown(options)}, but names and values were expected: give a dict")
    hints = hints_of(entry.matcher)
    for option, value in options.items():
        if option not in entry.options:
            raise ConfigError(
                f"matcher {shown(name)} has no option {option!r}; it has {', '.join(entry.options) or 'none'}: check the spelling"
            )
        hint = hints.get(option)
        if hint is None:
            continue
        if fault := fault_of(value, hint):
            raise ConfigError(
                f"option {option}={shown(value)} of matcher {shown(name)}, but it must be {fault}: change it"
            )
        if layers is not None and isinstance(value, list) and per_block(hint) and len(value) != layers:
            raise ConfigError(
                f"option {option} of matcher {shown(name)} lists {len(value)} blocks, but the model has {layers}: give one value for "
                "each block"
            )


def needed(value: Any, name: str, matcher: str) -> Any:
    """Return an argument that a matcher requires.

    Args:
        value: the argument, or `None` if the caller left it out.
        name: its name in `OFFERED`.
        matcher: name of the matcher, for the message.

    Raises:
        InputError: if `value` is `None`.
    """
    if value is None:
        raise InputError(f"matcher {shown(matcher)} needs {OFFERED[name]}, but none was given: give {name}=…")
    return value


def needed_grid(grid: tuple[int, ...] | None, tokens: int, matcher: str) -> tuple[int, ...]:
    """Return the grid of patches that a matcher requires.

    Args:
        grid: patches along each axis, or `None` if the caller left it out.
        tokens: unprotected tokens.
        matcher: name of the matcher, for the message.

    Raises:
        InputError: if there is no grid, or it has one axis alone, or does not hold all tokens.
    """
    found: tuple[int, ...] = needed(grid, "grid", matcher)
    if len(found) < 2 or math.prod(found) < tokens:
        raise InputError(
            f"matcher {shown(matcher)} was given a grid of {tuple(found)} for {tokens} tokens, but one of two axes or more was expected that "
            "holds them all: give the grid of these very tokens"
        )
    return found
