"""Merge schedules: the number of tokens that each block merges away. This module is plain Python, without torch.

A *schedule* is a tuple with one r per block. It is computed from one of the paper's forms of r (arXiv 2210.09461, section 3
and appendix): a constant, a pair `(r, inflect)`, or an explicit list; from the fraction of tokens that each block keeps;
or from a target for the model's total FLOPs (`tokenmerge.flops`). The last two depend on the number of tokens that
enter the model, so they are resolved anew for each number of tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Literal

from tokenmerge.errors import ConfigError, shown

Schedule = tuple[int, ...]
RForm = int | tuple[int, float] | list[int]
Most = Literal["half", "all but one"]
"""How many of the unprotected tokens a matcher can merge away; bipartite matching can merge half of them."""
_MOST = 10**9


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    """Return whether a value is an `int` (not a bool) of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: object) -> bool:
    """Return whether a value is an int or float (not a bool) that is finite and within the range of a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def validate_r(r: RForm) -> None:
    """Check a form of r.

    Raises:
        ConfigError: unless `r` is an int, a pair `(r, inflect)` or a list of ints, none of them negative.
    """
    if isinstance(r, tuple):
        if len(r) != 2 or not _is_int(r[0]) or isinstance(r[1], bool) or not isinstance(r[1], int | float):
            raise ConfigError(
                f"r={shown(r)} is a tuple, and a tuple must be a pair (r, inflect) such as (16, -1); "
                "write one r per block as a list, such as [8, 8, 0]"
            )
        if not -1 <= r[1] <= 1:
            raise ConfigError(
                f"r={shown(r)} has inflect {r[1]}, but it must lie between -1 (decreasing) and 1 (increasing); "
                "0 is a constant r"
            )
        values: Sequence[object] = (r[0],)
    else:
        values = r if isinstance(r, list) else (r,)
    for value in values:
        if not _is_int(value):
            raise ConfigError(
                f"r={shown(r)} holds {shown(value)} of type {type(value).__name__}, but r counts tokens: "
                "use a whole number, a pair (r, inflect), or a list with one whole number per block"
            )
        if value < 0:  # type: ignore[operator]  # checked to be an int just above
            raise ConfigError(f"r={shown(r)} is negative, but r counts the tokens merged in a block: use 0 or more")
        if value > _MOST:  # type: ignore[operator]
            raise ConfigError(f"r is larger than {_MOST:,}, but it counts the tokens merged in a block: use fewer")


def constant(r: int, layers: int) -> Schedule:
    """Return the schedule with the same r in each of `layers` blocks."""
    return (r,) * layers


def inflected(r: int, inflect: float, layers: int) -> Schedule:
    """Return the paper's linear schedule with mean r.

    With L blocks: `low = int(r·(1 − inflect))`, `high = 2r − low`, `r_i = int(low + (high − low)·i / (L − 1))`.

    Args:
        r: mean number of tokens merged per block.
        inflect: slope from −1 (decreasing to 0) over 0 (constant) to 1 (increasing from 0).
        layers: L, the number of blocks.

    Example:
        >>> from tokenmerge.schedule import inflected
        >>> inflected(8, -1, 5)
        (16, 12, 8, 4, 0)
    """
    if layers == 1:
        return (r,)
    low = int(r * (1 - inflect))
    high = 2 * r - low
    return tuple(int(low + (high - low) * i / (layers - 1)) for i in range(layers))


def expand(r: RForm, layers: int) -> Schedule:
    """Return the schedule for any form of r; short lists are padded with 0.

    Args:
        r: an int, a pair `(r, inflect)`, or a list with one int per block.
        layers: number of blocks.

    Raises:
        ConfigError: if `r` is malformed or a list has more entries than there are blocks.

    Example:
        >>> from tokenmerge.schedule import expand
        >>> expand(8, 3), expand([8, 4], 3)
        ((8, 8, 8), (8, 4, 0))
    """
    validate_r(r)
    if isinstance(r, tuple):
        return inflected(r[0], r[1], layers)
    if isinstance(r, list):
        if len(r) > layers:
            raise ConfigError(
                f"r lists {len(r)} blocks, but the model has {layers}: give at most {layers} entries "
                "(shorter lists are padded with 0)"
            )
        return (*r, *([0] * (layers - len(r))))
    return constant(r, layers)


def max_merges(tokens: int, protected: int, most: Most = "half") -> int:
    """Return how many of N = `tokens` tokens a block can merge away: half of the unprotected ones, or all but one."""
    free = tokens - protected
    return max(0, free // 2 if most == "half" else free - 1)


def cut(schedule: Schedule, tokens: int, protected: int, most: Most = "half") -> Schedule:
    """Return the schedule with each r cut to the most that its block can merge, if `tokens` tokens enter the first block.

    Args:
        schedule: one r per block.
        tokens: N₀, tokens per image that enter the first block.
        protected: leading tokens that never merge.
        most: how many unprotected tokens the matcher can merge away.

    Example:
        >>> from tokenmerge.schedule import cut
        >>> cut((8, 8, 8), tokens=17, protected=1)
        (8, 4, 2)
    """
    possible = []
    for r in schedule:
        r = min(r, max_merges(tokens, protected, most))
        possible.append(r)
        tokens -= r
    return tuple(possible)


def token_counts(schedule: Schedule, tokens: int, protected: int, most: Most = "half") -> tuple[int, ...]:
    """Return the tokens that enter each block, and last the tokens that leave the model; arguments as for `cut`.

    Example:
        >>> from tokenmerge.schedule import token_counts
        >>> token_counts((8, 8, 8), tokens=197, protected=1)
        (197, 189, 181, 173)
    """
    counts = [tokens]
    for r in cut(schedule, tokens, protected, most):
        counts.append(counts[-1] - r)
    return tuple(counts)


def keep_step(keep: float, tokens: int, protected: int, most: Most = "half") -> int:
    """Return the r of a block that keeps the fraction `keep` of its unprotected tokens (rounded up), cut to `max_merges`."""
    free = tokens - protected
    # floating-point error must not add a token: 0.07 * 100 is 7.000000000000001, whose ceiling is 8
    wanted = free - math.ceil(round(keep * free, 9))
    return min(max(wanted, 0), max_merges(tokens, protected, most))


def keep_ratio(
    keep: float | Sequence[float], layers: int, tokens: int, protected: int, most: Most = "half"
) -> Schedule:
    """Return the schedule in which each block keeps a fraction of its unprotected tokens.

    Args:
        keep: the fraction in (0, 1], or a sequence with one per block.
        layers: number of blocks.
        tokens: N₀, tokens per image that enter the first block.
        protected: leading tokens that never merge.
        most: how many unprotected tokens the matcher can merge away.

    Raises:
        ConfigError: if the number of fractions is not the number of blocks.

    Example:
        >>> from tokenmerge.schedule import keep_ratio
        >>> keep_ratio(0.7, layers=3, tokens=197, protected=1)
        (58, 41, 29)
    """
    fractions = [keep] * layers if isinstance(keep, int | float) else list(keep)
    if len(fractions) != layers:
        raise ConfigError(
            f"keep lists {len(fractions)} blocks, but the model has {layers}: give one fraction for each block"
        )
    schedule = []
    for fraction in fractions:
        r = keep_step(fraction, tokens, protected, most)
        schedule.append(r)
        tokens -= r
    return tuple(schedule)


def flops_target(target: float, layers: int, most: int, fraction: Callable[[Schedule], float]) -> Schedule:
    """Return the schedule with the smallest constant r that reaches a target of FLOPs.

    Args:
        target: FLOPs after merging ÷ FLOPs before, at most; in (0, 1].
        layers: number of blocks.
        most: the largest r that makes a difference.
        fraction: function from a schedule to its FLOPs ÷ those of the unmerged model; must not increase with r.

    Raises:
        ConfigError: if even r = `most` needs more FLOPs than the target.
    """
    if fraction(constant(most, layers)) > target:
        raise ConfigError(
            f"flops={target:g} is out of reach: the largest constant r for this model, {most}, still needs "
            f"{fraction(constant(most, layers)):.3f} of the FLOPs; ask for at least that"
        )
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if fraction(constant(middle, layers)) <= target:
            high = middle
        else:
            low = middle + 1
    return constant(low, layers)
