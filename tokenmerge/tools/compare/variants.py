"""What is compared: a method at a setting, patched onto a copy that shares the model's weights."""

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
from tokenmerge.schedule import constant
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.variants import share_weights, sliced

_AROUND = 5
"""How many neighbouring r are measured at a time."""


@dataclasses.dataclass
class Variant:
    """One line of the comparison.

    Attributes:
        label: of the method, as people see it.
        setting: the schedule, as typed.
        config: what the copy was patched with.
        model: the copy.
        handle: of its patch.
        group: what it is compared with: the same r, or the same speed-up.
        kind: of the method.
        note: what is to be said of it.
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
        """Whether the tokens it leaves depend on the images."""
        return entry_for(self.config).adaptive

    def key(self, context: str) -> str:
        """Names its results: another config, model, or other data is another key."""
        return hashlib.sha256(f"{context}\n{self.config.to_json()}".encode()).hexdigest()[:16]


def make_variant(
    model: Any, label: str, setting: Setting, fields: dict[str, Any], method: Method | None = None
) -> Variant:
    """The variant of an unpatched model under these fields.

    Raises:
        TokenMergeError: if the model cannot be patched so; says of which method that is.
    """
    copy = share_weights(model)
    try:
        handle = patch(copy, setting.config(**fields))
    except TokenMergeError as error:
        raise ConfigError(f"method {label!r} cannot run on this model: {error}") from None
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
    """The smallest constant r that is as fast as wanted, and its speed-up over the unmerged model.

    Several r take turns with what they are compared with, and a line through all of them decides: a single measurement
    is too noisy to search by.

    Args:
        model: the unmerged model.
        images: what to time on.
        fields: of the config, without schedule.
        target: a measured speed-up, or a config that must be matched.
        rounds: of each measurement.

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
    # where FLOPs alone say it would be is where to look first
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


@torch.inference_mode()
def time_variants(
    model: Any, variants: Sequence[Variant], images: Tensor, rounds: int
) -> tuple[list[Spread], list[float | None]]:
    """Speed-up over the unmerged model, and overhead over merely slicing off as many tokens, of each variant.

    All take turns in every round. Overhead is `None` for models that cannot be sliced.
    """
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
    return speed, overhead


def fingerprint(parts: dict[str, Any]) -> str:
    """Everything but the config that results depend on, as one text."""
    return json.dumps(parts, sort_keys=True, default=str)
