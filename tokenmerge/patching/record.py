"""Records of a patched model, one on the model and one on each block, which `patch` adds and `remove` deletes."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from tokenmerge.attention.rotary import Rotary
from tokenmerge.config import MergeConfig
from tokenmerge.errors import ConfigError
from tokenmerge.flops import NO_ENDS, Ends, ModelCost
from tokenmerge.matching import Entry
from tokenmerge.ops.basics import is_exporting
from tokenmerge.patching.families.family import BlockFamily, ModelFamily
from tokenmerge.schedule import Schedule, expand, flops_target, keep_ratio, max_merges

RECORD = "_tokenmerge"
"""Name of the only attribute that patching adds to modules."""
_numbers = itertools.count()


def resolved_schedule(config: MergeConfig, cost: ModelCost) -> Schedule:
    """Return r per block for the number of tokens in `cost`.

    Args:
        config: settings with r, keep, flops or speedup.
        cost: the model's cost for that number of tokens.

    Raises:
        ConfigError: if the config has no schedule, or one that does not fit the model.
    """
    layers = len(cost.blocks)
    if config.r is not None:
        return expand(config.r, layers)
    if config.keep is not None:
        return keep_ratio(config.keep, layers, cost.tokens, cost.protected, cost.most)
    flops = config.flops if config.speedup is None else 1 / config.speedup
    if flops is not None:
        most = max_merges(cost.tokens, cost.protected, cost.most)
        return flops_target(flops, layers, most, cost.fraction)
    raise ConfigError(
        "no schedule was given, but a patch needs one: pass r=8 (tokens merged per block), keep=0.9, flops=0.5 or speedup=2 "
        "(r=0 merges nothing)"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Settings:
    """Config resolved for one model. An update replaces it as a whole, and a pass keeps the settings that it began with.

    Attributes:
        config: the user's config.
        entry: the matcher.
        offered: arguments of the matcher that are the same in every block.
        tensors: whether the matcher takes tensors that each block must compute.
        other_metric: whether the metric differs from the paper's, K averaged over heads.
        looks_inside: whether Q, K and V must be recorded as attention uses them.
        cost: the model's cost, which also limits how many tokens a block can merge away.
        layers: number of blocks that run.
        protected: number of leading tokens that never merge.
        class_token: whether the first of them is a class token.
        prop_attn: whether attention is proportional.
        full_output: whether unmerged tokens leave the last block.
        merged_states: whether collected hidden states stay merged.
        keep_plans: whether plans travel with the tokens.
        one_call: whether the backend and the settings of matching let one function in C match and merge, where it can run.
        traces: whether forward passes are traced.
        looks: whether a trace includes attention.
        schedule: requested r per block; `None` if it depends on the number of tokens.
        merges: whether any block may merge tokens.
        idle: whether passes run upstream's code alone: nothing merges, and nothing is traced.
        number: identifier of these settings for traced code.
    """

    config: MergeConfig
    entry: Entry
    offered: Mapping[str, Any]
    tensors: bool
    other_metric: bool
    looks_inside: bool
    cost: ModelCost
    layers: int
    protected: int
    class_token: bool
    prop_attn: bool
    full_output: bool
    merged_states: bool
    keep_plans: bool
    one_call: bool
    traces: bool = dataclasses.field(init=False)
    looks: bool = dataclasses.field(init=False)
    schedule: Schedule | None = dataclasses.field(init=False)
    merges: bool = dataclasses.field(init=False)
    idle: bool = dataclasses.field(init=False)
    number: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        static = self.config.r is not None
        schedule = resolved_schedule(self.config, self.cost)[: self.layers] if static else None
        nothing = schedule is not None and not any(schedule)
        object.__setattr__(self, "traces", self.config.traces)
        object.__setattr__(self, "looks", self.config.looks)
        object.__setattr__(self, "schedule", schedule)
        object.__setattr__(self, "merges", not nothing)
        object.__setattr__(self, "idle", nothing and not self.config.traces)
        object.__setattr__(self, "number", next(_numbers))
        _living[self.number] = self

    def schedule_for(self, tokens: int | torch.SymInt) -> Schedule:
        """Return the requested r per block for the number of tokens that enter the first block; a constant in traced code.

        Raises:
            ConfigError: if the schedule depends on the number of tokens, which an export leaves free.
        """
        if self.schedule is not None:
            return self.schedule
        if isinstance(tokens, torch.SymInt) and is_exporting():
            raise ConfigError(
                "keep, flops and speedup choose r by the number of tokens, but this export leaves the height or the width free: "
                "give r=…, a whole number or one for each block"
            )
        return cast("Schedule", _schedule_for(self.number, int(tokens)))[: self.layers]

    def __deepcopy__(self, memo: Any) -> Settings:
        return self  # settings are immutable

    def __reduce__(self) -> tuple[Any, ...]:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        return _made_anew, (given,)


_living: weakref.WeakValueDictionary[int, Settings] = weakref.WeakValueDictionary()
_resolved: dict[tuple[int, int], Schedule] = {}


def _made_anew(given: dict[str, Any]) -> Settings:
    return Settings(**given)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _schedule_for(number: int, tokens: int) -> Schedule:
    """Return the schedule of some settings, cached per number of tokens; Dynamo calls it and embeds the result."""
    if (number, tokens) not in _resolved:
        settings = _living[number]
        for key in [key for key in list(_resolved) if key[0] not in _living]:
            _resolved.pop(key, None)
        _resolved[number, tokens] = resolved_schedule(settings.config, settings.cost.at(tokens))
    return _resolved[number, tokens]


class ModelRecord:
    """Record of a patched model, shared by all its handles; a copied model has a copy.

    Attributes:
        family: row of the model.
        settings: settings in force; a running pass keeps the settings that it began with.
        latest: state that left the last block in the latest complete pass, while tracing; used only for display.
        readers: reasons why modules around the model would misread merged tokens.
        outer: weak reference to the module that the user gave to `patch`.
        own_r: whether the model, and that module, had an attribute `r` of their own (perhaps the rank of an adapter).
        embed: name of the module that makes the patches, once it was looked up.
        embeddings: weak references to modules that replaced it since, because `remove` must reach them even after they left
            the model.
        root: weak reference to the model, once it is known.
        ends: fingerprint that shows whether the model's own parts were exchanged since its cost was counted.
        tuned: record of the tuning whose choice is in force, or `None`.
        around: multiply-adds of the classifier that surrounded the model when it was patched.
        number: identifier of the model for traced code.
    """

    def __init__(self, family: ModelFamily, settings: Settings, readers: tuple[str, ...], outer: nn.Module) -> None:
        self.family = family
        self.settings = settings
        self.readers = readers
        self.latest: Any = None
        self.outer: Any = weakref.ref(outer)
        self.own_r = (False, False)
        self.ends: Any = None
        self.embed: str | None = None
        self.embeddings: tuple[Any, ...] = ()
        self.root: Any = None
        self.tuned: Any = None
        self.around: Ends = NO_ENDS
        self.number = next(_numbers)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy, which has run no pass and is not inside the original's outer module."""
        return {**vars(self), "latest": None, "outer": None, "root": None, "ends": None, "embeddings": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, number=next(_numbers))


@dataclasses.dataclass(frozen=True, eq=False)
class BlockRecord:
    """Record of one patched block; everything that blocks share is on the model's record.

    Attributes:
        model: record of the model.
        index: position of the block, from 0.
        family: row of the block.
        rotary: reads and writes this block's table of rotary positions; `None` if it takes none.
    """

    model: ModelRecord
    index: int
    family: BlockFamily
    rotary: Rotary | None


def record_of(module: nn.Module) -> Any:
    """Return the `ModelRecord` or `BlockRecord` on this very module, or `None`."""
    return vars(module).get(RECORD)
