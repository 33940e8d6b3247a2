"""Measuring on machines that are noisy and drift: what is compared takes turns within one run.

Every round runs everything once, in an order of its own: memory and caches are as the one before left them, and a fixed
order would charge that to always the same one.
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
    """Wait until the device has done what it was given."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def keep_memory() -> bool:
    """Tell the C library to keep freed memory, for the life of the process; whether it did.

    Otherwise glibc gives the top of its heap back after some passes and not after others, whatever lies there: with the page faults
    of taking it again a model is up to a fifth slower, for minutes, and then is not. What is measured minutes apart, as by a
    search, could not be compared.
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
    """Seconds of each measured call, for each of `calls`; the k-th entries belong to the same round.

    Args:
        calls: what to measure.
        device: where they run; waited for around each call.
        warmup: rounds that are not measured.
        rounds: rounds that are.
        advance: called after each call, for a progress bar.
        before: called with the number of each call ahead of it, outside of what is measured.
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
    """20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """That of some values, at least one."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
        return cls(low, statistics.median(values), high)

    @classmethod
    def of_ratios(cls, above: Sequence[float], below: Sequence[float]) -> Spread:
        """That of the ratios within each round; steadier than the ratio of two medians."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])


def ratio(above: Sequence[float], below: Sequence[float], statistic: str) -> float:
    """How much longer `above` takes: the median over paired rounds, or with "min" the ratio of the minima."""
    return min(above) / min(below) if statistic == "min" else Spread.of_ratios(above, below).p50


def peak_memory(call: Call, device: torch.device) -> int:
    """Bytes that one call allocates at its peak, above what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own notes would run through the progress bar
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events: Any = profile.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
