"""Schedules that merge as many tokens as another one, but in fewer blocks."""

from __future__ import annotations

from tokenmerge.errors import InputError
from tokenmerge.flops import ModelCost
from tokenmerge.patching.record import Settings
from tokenmerge.schedule import Schedule, cut

_SPACES = (2, 3, 4)
_ORDINALS = {2: "2nd", 3: "3rd", 4: "4th"}


def spaced(schedule: Schedule, every: int, late: bool) -> Schedule:
    """Return a schedule that merges in one of every few blocks the tokens of all of them.

    Args:
        schedule: r per block.
        every: number of blocks whose tokens one of them merges.
        late: whether that is the last of them, so that no block has fewer tokens than before; otherwise it is the first.

    Example:
        >>> spaced((8, 8, 8, 8), 2, late=True)
        (0, 16, 0, 16)
        >>> spaced((8, 8, 8), 2, late=False)
        (16, 0, 8)
    """
    found = [0] * len(schedule)
    for start in range(0, len(schedule), every):
        group = schedule[start : start + every]
        found[start + (len(group) - 1 if late else 0)] = sum(group)
    return tuple(found)


def check_movable(settings: Settings) -> None:
    """Raise `InputError` if the tokens that a matcher merges in a block cannot be merged in another one instead."""
    listed = any(isinstance(value, list) for value in settings.offered.values())
    if settings.entry.adaptive or settings.entry.learned or listed:
        raise InputError(
            f"matcher {settings.entry.name!r} merges by what it was trained or calibrated for, block by block, so its schedule cannot "
            "be moved: use schedule=False"
        )


def alternatives(schedule: Schedule, cost: ModelCost, early: bool) -> dict[str, Schedule]:
    """Return schedules that leave as many tokens as one that was asked for, by name; without it, and without r = 0.

    Args:
        schedule: r per block, as it is possible for this number of tokens.
        cost: the model, for this number of tokens.
        early: whether to include schedules that leave fewer tokens in some blocks.
    """
    found: dict[str, Schedule] = {}
    for late in (True, False) if early else (True,):
        for every in _SPACES:
            one = spaced(schedule, every, late)
            possible = cut(one, cost.tokens, cost.protected, cost.most) == one
            if possible and one != schedule and one not in found.values():
                found[f"every {_ORDINALS[every]} block, {'late' if late else 'early'}"] = one
    return found
