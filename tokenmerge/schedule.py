"""Every form of r -> one integer per block. Pure integers: nothing here knows torch.

A *schedule* is a tuple with one entry per block: how many tokens that block merges away. The forms are the
paper's (section 3 and appendix): a constant, `(r, inflect)`, an explicit list; and two that people ask for:
a fraction of the tokens that blocks keep, and a target for the model's total FLOPs (`tokenmerge.flops`). The last two
depend on how many tokens arrive, so they are resolved for each number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from tokenmerge.errors import ConfigError, shown

Schedule = tuple[int, ...]
RForm = int | tuple[int, float] | list[int]
Most = Literal["half", "all but one"]
"""How many unprotected tokens a matcher can merge away: bipartite ones half of them, others all but one."""
_MOST = 10**9


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    """Whether a value is a whole number, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def validate_r(r: RForm) -> None:
    """Raise `ConfigError` unless `r` is an int, a pair `(r, inflect)` or a list of ints, none negative."""
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
    """The same r in each of `layers` blocks."""
    return (r,) * layers


def inflected(r: int, inflect: float, layers: int) -> Schedule:
    """The paper's linear schedule around a mean of r; inflect -1 falls to 0, 0 is constant, 1 rises from 0.

    `lo = int(r·(1 − inflect))`, `hi = 2r − lo`, `r_i = int(lo + (hi − lo)·i / (L − 1))`.
    """
    if layers == 1:
        return (r,)
    low = int(r * (1 - inflect))
    high = 2 * r - low
    return tuple(int(low + (high - low) * i / (layers - 1)) for i in range(layers))


def expand(r: RForm, layers: int) -> Schedule:
    """Any form of r as one int per block; short lists are padded with 0.

    Raises:
        ConfigError: if `r` is malformed or a list has more entries than there are blocks.
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
    """The most tokens one block can merge away: half of those that are not protected, or all but one of them."""
    free = tokens - protected
    return max(0, free // 2 if most == "half" else free - 1)


def cut(schedule: Schedule, tokens: int, protected: int, most: Most = "half") -> Schedule:
    """What really happens when `tokens` tokens enter the first block: each r cut to what is possible there."""
    possible = []
    for r in schedule:
        r = min(r, max_merges(tokens, protected, most))
        possible.append(r)
        tokens -= r
    return tuple(possible)


def token_counts(schedule: Schedule, tokens: int, protected: int, most: Most = "half") -> tuple[int, ...]:
    """Tokens entering each block, and last the tokens leaving the final one: `len(schedule) + 1` numbers."""
    counts = [tokens]
    for r in cut(schedule, tokens, protected, most):
        counts.append(counts[-1] - r)
    return tuple(counts)


def keep_step(keep: float, tokens: int, protected: int, most: Most = "half") -> int:
    """r of a block that keeps the fraction `keep` of its unprotected tokens, rounded up, as far as it can."""
    free = tokens - protected
    # rounding hides binary fractions: 0.7 * 10 is 7.000000000000001, and 8 tokens would stay
    wanted = free - math.ceil(round(keep * free, 9))
    return min(max(wanted, 0), max_merges(tokens, protected, most))


def keep_ratio(
    keep: float | Sequence[float], layers: int, tokens: int, protected: int, most: Most = "half"
) -> Schedule:
    """`keep_step` in every block; a sequence holds one fraction per block.

    Raises:
        ConfigError: if there are more fractions than blocks, or fewer.
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
    """The constant r whose FLOPs come closest to `target` of the unmerged model's from below.

    Args:
        target: wanted FLOPs after merging ÷ FLOPs before it, in (0, 1].
        layers: number of blocks.
        most: the largest r that still changes anything.
        fraction: FLOPs of a schedule ÷ those of the unmerged model; must not rise with r.

    Raises:
        ConfigError: if even `most` leaves more FLOPs than the target.
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
