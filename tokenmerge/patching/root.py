"""Base classes of the mix-ins for a model's own class, which change behaviour that only methods can change."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from torch import Tensor, nn

from tokenmerge.patching.block import MergeBlock, OwnR
from tokenmerge.patching.entering import enter_root, leave_root
from tokenmerge.patching.hooks import full_outputs
from tokenmerge.patching.match import shortened
from tokenmerge.patching.record import ModelRecord
from tokenmerge.patching.settings import settings_for
from tokenmerge.patching.state import attach, state_of
from tokenmerge.patching.target import find_target


def merge_blocks(model: nn.Module) -> list[Any]:
    """Return the patched blocks inside a model, in order; searched anew on each call, because models may be pruned."""
    return [module for module in model.modules() if isinstance(module, MergeBlock)]


class MergeRoot(OwnR):
    """Base of the mix-ins in `ModelFamily.swap`."""

    _tokenmerge: ModelRecord

    def _refusal_of_r(self, value: Any) -> str:
        return f"r={value!r} was set on a patched model: write tokenmerge.handle_of(model).update(r={value!r})"

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Run timm's `forward_intermediates`; all maps have upstream's shape, with merged tokens spread over their patches.

        The final features that it returns beside the maps are the features that `forward_features` returns.
        """
        enter_root(self)
        try:
            with full_outputs(self._tokenmerge):
                result = super().forward_intermediates(*args, **kwargs)  # type: ignore[misc]
        finally:
            leave_root(self)
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor):
            return self._as_features(result[0]), result[1]
        if isinstance(result, dict) and isinstance(result.get("image_features"), Tensor):
            return {**result, "image_features": self._as_features(result["image_features"])}
        return result

    def _as_features(self, full: Tensor) -> Tensor:
        """Return the tokens after the last block in the form in which `forward_features` returns them."""
        state = state_of(full)
        if state is None or state.merged is None or state.run.settings.full_output:
            return full
        if len(state.steps) < state.run.settings.layers:  # stop_early: the features did not pass all blocks
            return full
        return attach(state.one_of_equals(full), dataclasses.replace(state, merged=None))

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        """Run timm's `prune_intermediate_layers`, and resolve the settings anew: another block is the last one now."""
        taken = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        record, model = self._tokenmerge, cast("nn.Module", self)
        config = shortened(record.settings.config, len(record.family.blocks(model)))
        record.settings = settings_for(find_target(model), config, record.readers)
        return taken


class MergeFeatures(MergeRoot):
    """Mix-in for models that have `forward_features`."""

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        """Run upstream's `forward_features`, after checking that the model has not changed since patching."""
        enter_root(self)
        try:
            return super().forward_features(*args, **kwargs)  # type: ignore[misc]
        finally:
            leave_root(self)
