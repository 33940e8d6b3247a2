"""Variants of a comparison: a method at a setting, on a copy that shares the model's weights."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenmerge.config import MergeConfig
from tokenmerge.errors import ConfigError, TokenMergeError
from tokenmerge.matching import entry_for
from tokenmerge.methods import Method
from tokenmerge.ops.timing import Spread, take_turns
from tokenmerge.patching import Handle, model_cost, patch
from tokenmerge.patching.predictors import KINDS, kind_of
from tokenmerge.schedule import constant
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.variants import share_weights, sliced

_AROUND = 5
"""Number of neighbouring r that are measured together."""


@dataclasses.dataclass
class Variant:
    """One line of the comparison.

    Attributes:
        label: name of the method in tables.
        setting: title of the schedule.
        config: config of the patched copy.
        model: the patched copy.
        handle: handle of the patched copy.
        group: variants with the same r or the same speed-up, which are compared with each other.
        kind: kind of the method.
        note: remark for the tables.
    """

    label: str
    setting: str
    config: MergeConfig
    model: Any
    handle: Handle
    group: str
    kind: str = "matching"
    note: str = ""

    @property
    def adaptive(self) -> bool:
        """Whether the number of remaining tokens depends on the images."""
        return entry_for(self.config).adaptive

    @property
    def gflops(self) -> float:
        """Multiply-adds per image in 1e9."""
        return self.handle.summary().flops_after / 1e9

    def key(self, context: str) -> str:
        """Return the key of stored results, a hash of the config and of `context` (model and data)."""
        return key_of(self.config, context)


def key_of(config: MergeConfig, context: str) -> str:
    """Return the key of stored results of a config, a hash of it and of `context` (model and data)."""
    return hashlib.sha256(f"{context}\n{config.to_json()}".encode()).hexdigest()[:16]


def make_variant(
    model: Any, label: str, setting: Setting, fields: dict[str, Any], method: Method | None = None
) -> Variant:
    """Patch a copy of an unpatched model, and return it as a variant.

    Raises:
        TokenMergeError: if the method cannot run on this model; the message names the method.
    """
    copy = share_weights(model)
    try:
        handle = patch(copy, setting.config(**fields))
    except TokenMergeError as error:
        raise ConfigError(f"method {label!r} cannot run on this model: {error}") from None
    entry = entry_for(handle.config)
    if entry.learned and kind_of(copy) is not KINDS.get(entry.name, kind_of(copy)):
        have = kind_of(copy)
        raise ConfigError(
            f"method {label!r} cannot run on this model: it {'was not trained for it' if have is None else f'was trained for {have.matcher!r}'}, "
            f"so give a model that tokenmerge train --matcher {entry.name} wrote"
        )
    kind = "matching" if method is None else method.kind
    return Variant(
        label, setting.title, handle.config, copy, handle, setting.title, kind, method.note if method else ""
    )


def r_for_speedup(
    model: Any,
    images: Tensor,
    fields: dict[str, Any],
    target: float | MergeConfig,
    rounds: int,
) -> tuple[int, float]:
    """Find the smallest constant r that reaches a speed-up, and return it with its speed-up over the unmerged model.

    Several neighbouring r take turns with the reference, and a regression line through their speed-ups decides, because a
    single measurement is too noisy for a search.

    Args:
        model: the unmerged model.
        images: batch to measure on.
        fields: fields of the config without a schedule field.
        target: a speed-up, or a config whose measured speed-up is the target.
        rounds: rounds of each measurement.

    Raises:
        ConfigError: if the largest r does not reach it.
    """
    copies = [share_weights(model) for _ in range(_AROUND)]
    handles = [patch(copy, MergeConfig.create(r=1, **fields)) for copy in copies]
    cost, layers = model_cost(model), len(handles[0].schedule)
    most = max(1, (cost.tokens - cost.protected) // 2)
    timed, wanted = [model, *copies], target
    if isinstance(target, MergeConfig):
        timed.append(share_weights(model))
        wanted = patch(timed[-1], target).summary().flops_ratio
    assert isinstance(wanted, float)
    # start at the r that would reach the speed-up by FLOPs alone
    centre = next((r for r in range(1, most + 1) if 1 / cost.fraction(constant(r, layers)) >= wanted), most)
    for _ in range(6):
        first = max(1, min(centre - _AROUND // 2, most - _AROUND + 1))
        values = [min(most, first + i) for i in range(_AROUND)]
        for handle, r in zip(handles, values, strict=True):
            handle.update(r=r)
        with torch.inference_mode():
            calls = [lambda candidate=candidate: candidate(images) for candidate in timed]
            times = take_turns(calls, images.device, 1, rounds)
        medians = [Spread.of_ratios(times[0], mine).p50 for mine in times[1:]]
        speeds, aim = medians[:_AROUND], medians[-1] if isinstance(target, MergeConfig) else wanted
        slope, start = statistics.linear_regression(values, speeds) if len(set(values)) > 1 else (0.0, speeds[0])
        found = next((r for r in values if start + slope * r >= aim), None)
        if found is not None and (found > values[0] or found == 1):
            return found, start + slope * found
        if found is None and values[-1] == most:
            raise ConfigError(
                f"a speed-up of {aim:g} is out of reach here: with r={most} in every block it is {speeds[-1]:.2f}; ask for less, "
                "or for a larger --batch-size"
            )
        centre = values[0] if found is not None else values[-1]
    return values[0], speeds[0]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Speeds of variants, measured in turns.

    Attributes:
        speedups: speed-up of each variant over the unmerged model.
        overheads: time of each variant divided by the time of the sliced model; `None` for models that cannot be sliced.
        images_per_second: median rate of the unmerged model, then of each variant.
    """

    speedups: list[Spread]
    overheads: list[float | None]
    images_per_second: list[float]


@torch.inference_mode()
def time_variants(model: Any, variants: Sequence[Variant], images: Tensor, rounds: int) -> Timing:
    """Return the speeds of the unmerged model and of each variant; all models take turns in every round."""
    slices: dict[tuple[int, ...], Any] = {}
    for variant in variants:
        schedule = variant.handle.schedule
        if schedule not in slices:
            slices[schedule] = sliced(model, schedule)
    models = [
        model,
        *(variant.model for variant in variants),
        *(sliced_model for sliced_model in slices.values() if sliced_model is not None),
    ]
    calls = [functools.partial(candidate, images) for candidate in models]
    times = take_turns(calls, images.device, 1, rounds)
    of_slices = iter(times[1 + len(variants) :])
    by_schedule = {schedule: None if model is None else next(of_slices) for schedule, model in slices.items()}
    speed, overhead = [], []
    for variant, mine in zip(variants, times[1:], strict=False):
        speed.append(Spread.of_ratios(times[0], mine))
        bound = by_schedule[variant.handle.schedule]
        overhead.append(None if bound is None else Spread.of_ratios(mine, bound).p50)
    rates = [len(images) / statistics.median(mine) for mine in times[: 1 + len(variants)]]
    return Timing(speed, overhead, rates)


def fingerprint(parts: dict[str, Any]) -> str:
    """Return a text of all inputs, except the config, that results depend on."""
    return json.dumps(parts, sort_keys=True, default=str)
