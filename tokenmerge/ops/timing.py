"""Timing on noisy machines: the calls under comparison take turns within one run.

Every round runs each call once, in random order. A call finds memory and caches as the previous call left them, and with
a fixed order that effect would always hit the same call.
"""

from __future__ import annotations

import dataclasses
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def keep_memory() -> bool:
    """Make the C library keep freed memory for the life of the process; return whether it accepted the setting.

    By default glibc returns the top of its heap to the system after some passes and not after others. Page faults then
    make a model up to a fifth slower for minutes at a time, so that measurements taken minutes apart, as in a search, could
    not be compared.
    """
    import ctypes

    trim_threshold, mmap_threshold = -1, -3  # glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_threshold, 2**25))


def take_turns(
    calls: Sequence[Call],
    device: torch.device,
    warmup: int,
    rounds: int,
    advance: Callable[[], Any] = lambda: None,
    before: Callable[[int], Any] = lambda which: None,
) -> list[list[float]]:
    """Time calls in interleaved rounds.

    Args:
        calls: the functions to time.
        device: the device they run on, synchronized before and after each call.
        warmup: number of rounds before timing starts.
        rounds: number of timed rounds.
        advance: called after each call, for a progress bar.
        before: called with the index of a call before it, outside of the timed part.

    Returns:
        Seconds per round for each of `calls`; the k-th entries of all lists belong to the same round.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    order, shuffled = list(range(len(calls))), random.Random(0)
    for turn in range(warmup + rounds):
        shuffled.shuffle(order)
        for which in order:
            before(which)
            synchronize(device)
            start = time.perf_counter()
            calls[which]()
            synchronize(device)
            if turn >= warmup:
                seconds[which].append(time.perf_counter() - start)
            advance()
    return seconds


@dataclasses.dataclass(frozen=True)
class Spread:
    """Percentiles of a set of measurements.

    Attributes:
        p20: 20th percentile.
        p50: median.
        p80: 80th percentile.
    """

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the percentiles of one or more values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
        return cls(low, statistics.median(values), high)

    @classmethod
    def of_ratios(cls, above: Sequence[float], below: Sequence[float]) -> Spread:
        """Return the percentiles of the ratios within each round, which vary less than the ratio of two medians."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])


def ratio(above: Sequence[float], below: Sequence[float], statistic: str) -> float:
    """Return how many times as long `above` takes: the median ratio of paired rounds, or with "min" the ratio of minima."""
    return min(above) / min(below) if statistic == "min" else Spread.of_ratios(above, below).p50


def peak_memory(call: Call, device: torch.device) -> int:
    """Return the peak memory of one call in bytes, beyond the memory allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's log would break the progress bar
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events: Any = profile.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
