"""Measurement of alternatives in turns, and the rule by which one of them counts as faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tokenmerge.errors import InputError
from tokenmerge.flops import ModelCost
from tokenmerge.ops.timing import Call, Spread, take_turns
from tokenmerge.schedule import Schedule

GAIN = 1.02
"""Least median speed-up that counts."""
MOST_ROUNDS = 10_000


def pays(gain: Spread) -> bool:
    """Return whether speed-ups over paired rounds are more than noise: 2 % in the median, and faster in four rounds of five."""
    return gain.p50 >= GAIN and gain.p20 > 1.0


def check_rounds(rounds: Any) -> None:
    """Raise `InputError` unless `rounds` is a possible number of rounds."""
    if not isinstance(rounds, int) or isinstance(rounds, bool) or not 1 <= rounds <= MOST_ROUNDS:
        raise InputError(
            f"rounds={rounds!r:.60}, but from 1 to 10,000 passes of each alternative can be measured: use 5 or more"
        )


def in_turns(run: Call, use: Callable[[int], Any], count: int, device: torch.device, rounds: int) -> list[list[float]]:
    """Return the seconds of each of `count` alternatives in every round.

    Args:
        run: one pass.
        use: called with the number of an alternative before its pass, outside of the timed part.
        count: number of alternatives.
        device: device of the pass.
        rounds: rounds after one of warm-up.
    """
    return take_turns([run] * count, device, 1, rounds, before=use)


def fastest(times: Sequence[Sequence[float]], first: int) -> int:
    """Return the number of the fastest alternative; `first` stays if no other one is faster by more than noise."""
    gains = [Spread.of_ratios(times[first], mine) for mine in times]
    better = [which for which, gain in enumerate(gains) if which != first and pays(gain)]
    return max(better, key=lambda which: gains[which].p50, default=first)


NONE = "no merging"
ASKED = "as asked"


def confirmed(
    times: Mapping[str, Sequence[float]], again: Callable[[Sequence[str]], Sequence[Sequence[float]]]
) -> tuple[str, Spread]:
    """Return the fastest schedule that is faster than no merging in two measurements, and its speed-up in the second.

    The fastest of several is often just lucky, so it must prove itself in rounds of its own. The schedule that was asked for
    stays if no other one is faster by more than noise.

    Args:
        times: seconds per round by name of a schedule, with `NONE` and `ASKED` among them.
        again: function that measures two schedules, given by name, in new rounds.

    Returns:
        The name, which is `NONE` if none is faster, and the speed-up over no merging (then the best one that was measured).
    """
    names = list(times)
    gains = {name: Spread.of_ratios(times[NONE], mine) for name, mine in times.items()}
    first = names[fastest(list(times.values()), names.index(ASKED))]
    for name in dict.fromkeys([first, *sorted(names, key=lambda name: -gains[name].p50)]):
        if name == NONE or not pays(gains[name]):
            continue
        dense, mine = again([NONE, name])
        gain = Spread.of_ratios(dense, mine)
        if pays(gain):
            return name, gain
    return NONE, max((gains[name] for name in names if name != NONE), key=lambda gain: gain.p50)


def in_words(name: str, gain: Spread, schedule: Schedule, asked: Schedule, cost: ModelCost) -> str:
    """Return what was chosen as a phrase: speed-up and FLOPs of a schedule, or why none.

    Args:
        name: name of the schedule.
        gain: its speed-up over no merging, or the best one if there is no merging.
        schedule: its r per block.
        asked: r per block that was asked for.
        cost: the model, for this number of tokens.
    """
    if name == NONE:
        return f"no merging, because nothing was {GAIN:g}x as fast as that in two measurements (at most {gain.p50:.2f}x in the first)"
    speed = f"{gain.p50:.2f}x as fast as unmerged ({gain.p20:.2f} to {gain.p80:.2f})"
    ratio, before = (cost.total() / cost.total(one) for one in (schedule, asked))
    return f"merging {name}, {speed}, FLOPs ÷ {ratio:.2f}" + ("" if name == ASKED else f" instead of ÷ {before:.2f}")
