"""Variants of a model that share its weights: unmerged, merged, and with tokens sliced off."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import Tensor, nn

from tokenmerge.patching.families.family import BlockFamily
from tokenmerge.patching.swap import swap_class
from tokenmerge.patching.target import find_target
from tokenmerge.schedule import Schedule, max_merges


def share_weights(model: nn.Module) -> Any:
    """Return a deep copy of `model` that shares its parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@dataclasses.dataclass(frozen=True)
class SliceSpec:
    """Options of a block that slices tokens off.

    Attributes:
        family: row of the block's class.
        r: number of trailing tokens to drop.
        protected: number of leading tokens that are never dropped.
    """

    family: BlockFamily
    r: int
    protected: int


class SliceBlock:
    """Upstream's block that drops the last `r` tokens after attention, the paper's baseline for speed.

    It runs plain attention without matching and sizes. Its outputs are meaningless, and its speed is an upper bound for any
    method with this schedule.
    """

    _slice_spec: SliceSpec

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the block on `x [B, N, C]`, and return `[B, N − r, C]`."""
        spec = self._slice_spec
        family = spec.family
        given = {**dict(zip(family.arguments, args, strict=False)), **kwargs}
        given.pop(family.mask or "", None)
        rope = given.pop(family.rope or "", None)
        if not family.passes:
            given = {}
        if rope is not None:
            given[str(family.rope)] = _first_rows(rope, x.shape[1] - spec.protected)
        x = family.attention(self, x, None, **given)
        r = min(spec.r, max_merges(x.shape[1], spec.protected))
        if r:
            x = x[:, : x.shape[1] - r]
        x = x if family.mlp is None else family.mlp(self, x)
        return x if family.wrap is None else family.wrap(x)


def _first_rows(table: Any, rows: int) -> Any:
    if isinstance(table, tuple | list):
        return type(table)(_first_rows(part, rows) for part in table)
    return table[..., :rows, :]


def sliced(model: nn.Module, schedule: Schedule) -> Any | None:
    """Return a copy of an unpatched model that shares its weights and slices tokens off by `schedule`.

    Returns:
        The copy, or `None` for models whose attention needs the full grid of patches (relative positions, V-JEPA 2).
    """
    target = find_target(model)
    if any(row.needs_source or row.positions is not None for _, row in target.blocks):
        return None
    model = share_weights(model)
    target = find_target(model)
    for (block, family), r in zip(target.blocks, schedule, strict=True):
        block._slice_spec = SliceSpec(family, r, target.family.protected(target.model))
        swap_class(block, SliceBlock)
    return model
