"""What a patched model remembers: one record on the model and one on each block, made by `patch`, dropped by `remove`."""

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
"""The one attribute that patching gives to modules."""
_numbers = itertools.count()


def resolved_schedule(config: MergeConfig, cost: ModelCost) -> Schedule:
    """r per block for the number of tokens that `cost` is for.

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
    """A config resolved for one model. An update replaces it as a whole; a pass keeps the one that it began with.

    Attributes:
        config: what the user asked for.
        entry: the matcher.
        offered: what it is given that is the same in every block.
        tensors: whether it asks for tensors that each block must make.
        other_metric: whether it compares anything but the mean of the keys over heads.
        looks_inside: whether Q, K and V must be noted as attention uses them.
        cost: what the model costs; holds how many tokens a block can merge away.
        layers: blocks that run.
        protected: leading tokens that never merge.
        class_token: whether the first of them is a class token.
        prop_attn: whether sizes weigh in attention.
        full_output: whether unmerged tokens leave the last block.
        merged_states: whether hidden states that someone collects stay merged.
        keep_plans: whether plans travel with the tokens.
        traces: whether passes are to be looked at.
        looks: whether that goes for attention, too.
        schedule: r per block as asked for, where it is the same for any number of tokens.
        merges: whether any block may merge.
        number: names these settings where code is traced.
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
    traces: bool = dataclasses.field(init=False)
    looks: bool = dataclasses.field(init=False)
    schedule: Schedule | None = dataclasses.field(init=False)
    merges: bool = dataclasses.field(init=False)
    number: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        static = self.config.r is not None
        schedule = resolved_schedule(self.config, self.cost)[: self.layers] if static else None
        nothing = schedule is not None and not any(schedule)
        object.__setattr__(self, "traces", self.config.traces)
        object.__setattr__(self, "looks", self.config.looks)
        object.__setattr__(self, "schedule", schedule)
        object.__setattr__(self, "merges", not nothing)
        object.__setattr__(self, "number", next(_numbers))
        _living[self.number] = self

    def schedule_for(self, tokens: int | torch.SymInt) -> Schedule:
        """r per block, as asked for, when so many tokens enter the first one; static while code is traced."""
        if self.schedule is not None:
            return self.schedule
        if isinstance(tokens, torch.SymInt) and is_exporting():
            raise ConfigError(
                "keep, flops and speedup choose r by the number of tokens, but this export leaves the height or the width free: "
                "give r=…, a whole number or one for each block"
            )
        return cast("Schedule", _schedule_for(self.number, int(tokens)))[: self.layers]

    def __deepcopy__(self, memo: Any) -> Settings:
        return self  # nothing in it changes

    def __reduce__(self) -> tuple[Any, ...]:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        return _made_anew, (given,)


_living: weakref.WeakValueDictionary[int, Settings] = weakref.WeakValueDictionary()
_resolved: dict[tuple[int, int], Schedule] = {}


def _made_anew(given: dict[str, Any]) -> Settings:
    return Settings(**given)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _schedule_for(number: int, tokens: int) -> Schedule:
    """The schedule of some settings, kept per number of tokens; Dynamo runs it and takes what it gives."""
    if (number, tokens) not in _resolved:
        settings = _living[number]
        for key in [key for key in list(_resolved) if key[0] not in _living]:
            _resolved.pop(key, None)
        _resolved[number, tokens] = resolved_schedule(settings.config, settings.cost.at(tokens))
    return _resolved[number, tokens]


class ModelRecord:
    """The one record of a patched model; every handle of the model shares it, and a copied model has a copy.

    Attributes:
        family: seams of upstream's model.
        settings: those in force; a pass that runs keeps those that it began with.
        latest: the state that left the last block of the latest whole pass, when tracing; only for looking at.
        readers: why what reads the model's tokens would misread merged ones, in words.
        outer: the module that the user gave to `patch`.
        own_r: whether the model, and that module, had an attribute `r` of their own (the rank of an adapter, perhaps).
        embed: name of the module that makes the patches, once it was looked for.
        embeddings: those that have taken its place since, which `remove` must find also when they are gone from the model.
        root: the model itself, once it is known.
        ends: what tells whether the model's own parts were exchanged since its cost was counted.
        around: multiply-adds of the classifier that stood around the model when it was patched.
        number: tells it from other models' where code is traced.
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
        self.around: Ends = NO_ENDS
        self.number = next(_numbers)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has had no pass yet, and is not inside of what the original was in."""
        return {**vars(self), "latest": None, "outer": None, "root": None, "ends": None, "embeddings": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, number=next(_numbers))


@dataclasses.dataclass(frozen=True, eq=False)
class BlockRecord:
    """What is a block's own; all else is the model's.

    Attributes:
        model: the model's record.
        index: position of the block, from 0.
        family: seams of upstream's block.
        rotary: how this block's table of rotary positions is read and written, if it takes one.
    """

    model: ModelRecord
    index: int
    family: BlockFamily
    rotary: Rotary | None


def record_of(module: nn.Module) -> Any:
    """The record of a patched module, a `ModelRecord` or a `BlockRecord`; `None` if that very module has none."""
    return vars(module).get(RECORD)
