"""Matchers by name. A matcher is mathematics: metric, r, protected -> MergePlan; what can be checked is checked here.

The registry checks shapes, cuts r to what is possible, answers r = 0, and knows of every option which values mean something.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from tokenmerge.config import MergeConfig
from tokenmerge.errors import ConfigError, InputError, shown
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
    "backend": "MergeConfig.backend; such a matcher must also take keys [B, H, N, D] not averaged over heads yet",
}
"""What a matcher may ask for by naming a parameter so."""
INSIDE = frozenset({"attention", "values"})
"""Those of them that are seen inside attention."""


class Matcher(Protocol):
    """Decides which tokens become one.

    The number of tokens it leaves may depend on shapes and `r` alone, never on values, so that every image
    of a batch keeps the same length and a compiled model has static shapes (unless it is registered as adaptive).
    """

    def __call__(self, metric: Tensor, r: int, protected: int = 0) -> MergePlan:
        """Plan the merge of `r` of the N tokens in `metric [B, N, D]`; the first `protected` stay alone.

        `metric` is floating point, and 0 < r ≤ what is possible. Further parameters need a default. Those named in `OFFERED`
        are filled in by the block that merges; all others are options, given by `MergeConfig.options`, whose annotations say
        which values they may have.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered matcher.

    Attributes:
        name: by which `MergeConfig.matcher` finds it.
        matcher: the function, which trusts what it is given.
        checked: the same for whoever calls it directly.
        offered: which of `OFFERED` it takes.
        options: its other parameters, with their defaults.
        adaptive: whether the tokens it leaves depend on values.
        learned: whether it works with weights of its own, which must be trained first.
        most: how many tokens it can merge away.
    """

    name: str
    matcher: Any
    checked: Any
    offered: frozenset[str]
    options: Mapping[str, Any]
    adaptive: bool
    learned: bool
    most: Most

    @property
    def about(self) -> str:
        """The first line of the function's docstring."""
        own = inspect.unwrap(self.matcher)
        return (inspect.getdoc(plain_function(own) if isinstance(own, functools.partial) else own) or "").partition(
            "\n"
        )[0]

    @property
    def looks_inside(self) -> bool:
        """Whether Q, K and V must be noted as attention uses them."""
        return bool(self.offered & INSIDE)

    def __reduce__(self) -> tuple[Any, ...]:
        return get_entry, (self.name,)  # the function is found again by its name


_MATCHERS: dict[str, Entry] = {}
_M = TypeVar("_M", bound=Callable[..., MergePlan])


def register_matcher(
    name: str, adaptive: bool = False, learned: bool = False, most: Most = "half"
) -> Callable[[_M], _M]:
    """Make a function selectable as `patch(model, matcher=name)`.

    Args:
        name: what to select it by.
        adaptive: whether the number of tokens it leaves depends on values: such a model cannot be compiled or exported
            with static shapes, and `r` is what it merges on average.
        learned: whether it needs trained weights, and so cannot be compared off the shelf; while training it may leave
            more tokens than r says.
        most: how many of the unprotected tokens it can merge away: "half", or "all but one".

    Returns:
        A decorator. What it gives checks its arguments, cuts r, and answers r = 0 with the plan that merges nothing; blocks
        call the function itself, and look at its plan.

    Raises:
        ConfigError: if a function from elsewhere already has that name (the same one, defined again as in a notebook, takes
            its place), or a further parameter has no default.
    """

    flags = isinstance(adaptive, bool) and isinstance(learned, bool)
    if not isinstance(name, str) or not name or fault_of(most, Most) or not flags:
        raise ConfigError(
            f"a matcher was to be registered as {shown(name)} with most={shown(most)}, adaptive={shown(adaptive)} and learned={shown(learned)}, but "
            "its name must be text, most 'half' or 'all but one', and the others true or false: change them"
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
        _MATCHERS[name] = Entry(name, function, checked, offered, options, adaptive, learned, most)
        return cast("_M", checked)

    return add


def _watched(name: str, function: Any) -> Callable[..., MergePlan]:
    """A matcher from elsewhere, whose plans are looked at in every pass; the plans of ours are by the tests."""

    @functools.wraps(function)
    def matcher(metric: Tensor, r: int, protected: int = 0, *args: Any, **kwargs: Any) -> MergePlan:
        def own(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) else value

        # copies, because they are tokens, sizes and keys of the pass itself: a matcher may work in place
        given = {name: own(value) for name, value in kwargs.items()}
        plan: MergePlan = function(own(metric), r, protected, *map(own, args), **given)
        check_plan(plan, name, metric, protected)
        return plan

    return matcher


def _checked(name: str, function: Any, per_head: bool, most: Most) -> Callable[..., MergePlan]:
    """A matcher for whoever calls it directly."""
    signature = inspect.signature(function)
    further = [parameter.name for parameter in _further(function)]

    # what values may be is read off annotations, which Dynamo cannot do: it runs these two, and takes what they give
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
    """Whether its code is tokenmerge's, whatever a decorator has copied onto it."""
    return str(getattr(function, "__globals__", {}).get("__name__", "")).startswith("tokenmerge.")


def _parameters(matcher: Any) -> tuple[list[inspect.Parameter], int, bool]:
    """The parameters of a callable, how many of the first three are given by place, and whether any number more can be."""
    try:
        found = inspect.signature(matcher.forward if isinstance(matcher, nn.Module) else matcher)
    except (TypeError, ValueError):  # no callable, or one that shows no parameters
        return [], 0, False
    parameters = list(found.parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    by_place = 0
    while by_place < min(3, len(parameters)) and parameters[by_place].kind in kinds:
        by_place += 1
    return parameters, by_place, any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters[:3])


def _further(matcher: Any) -> list[inspect.Parameter]:
    """What a matcher takes besides metric, r and protected."""
    parameters, by_place, any_number = _parameters(matcher)
    further = parameters[by_place:]
    if any_number:  # a wrapper that hands on whatever it is given
        further = [p for p in further if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return further


def _check_callable(name: str, matcher: Any) -> None:
    """Raise `ConfigError` unless it can be called with a metric, r and protected."""
    parameters, by_place, any_number = _parameters(matcher)
    if inspect.isclass(matcher) or not (by_place == 3 or any_number):
        raise ConfigError(
            f"matcher {shown(name)} is a {type(matcher).__name__} that takes {', '.join(map(str, parameters[:3])) or 'nothing'}, but a function "
            "whose first three parameters are metric, r and protected was expected: write def matcher(metric, r, protected=0)"
        )


def get_entry(name: str) -> Entry:
    """What is registered under that name.

    Raises:
        ConfigError: if there is nothing.
    """
    try:
        return _MATCHERS[name]
    except (KeyError, TypeError):
        raise ConfigError(
            f"matcher={shown(name)} is not registered; known are {', '.join(sorted(_MATCHERS))}: choose one of them"
        ) from None


def entry_for(config: MergeConfig) -> Entry:
    """The matcher that a config names.

    Raises:
        ConfigError: if there is none of that name.
    """
    return get_entry(config.matcher)


def get_matcher(name: str) -> Matcher:
    """The matcher of that name, which checks what it is given.

    Raises:
        ConfigError: if there is none.
    """
    matcher: Matcher = get_entry(name).checked
    return matcher


def matcher_names() -> tuple[str, ...]:
    """Every registered matcher, in the order of registration."""
    return tuple(_MATCHERS)


def check_options(name: str, options: Mapping[str, Any], layers: int | None = None) -> None:
    """Raise `ConfigError` unless the matcher of that name has all of these options, and can do with their values.

    Args:
        name: of the matcher.
        options: values by name.
        layers: blocks of the model, where that is known: lists with an entry per block must be as long.
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
    """What a matcher asked for and cannot do without.

    Raises:
        InputError: if it was not given.
    """
    if value is None:
        raise InputError(f"matcher {shown(matcher)} needs {OFFERED[name]}, but none was given: give {name}=…")
    return value
