"""Stochastic depth for transformers models whose config has no rate of it."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from tokenmerge.errors import InputError, shown

_BRANCHES = {"VideoMAELayer": ("attention.output.dropout", "output.dropout")}
"""Last modules of the two residual branches, by class of the layer."""


def has_branches(config: Any) -> bool:
    """Return whether `add_stochastic_depth` knows the layers of models with this config."""
    return str(config.model_type) == "videomae"


def add_stochastic_depth(model: nn.Module, rate: Any) -> None:
    """Make a model skip each residual branch of a sample at random in training, as timm's `drop_path_rate` does.

    The rate grows linearly from 0 in the first layer to `rate` in the last one. Hooks do it, so that the model keeps its
    class, its weights and its config.

    Args:
        model: a model for whose config `has_branches` is true.
        rate: rate of the last layer, 0 to 1.

    Raises:
        InputError: if the rate is no number from 0 to 1.
    """
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise InputError(
            f"drop_path_rate={shown(str(rate))} was given, but a number from 0 to 1 was expected: give one with --drop-path"
        )
    layers = [module for module in model.modules() if type(module).__name__ in _BRANCHES]
    for place, layer in enumerate(layers):
        share = rate * place / max(1, len(layers) - 1)
        for name in _BRANCHES[type(layer).__name__] if share else ():
            layer.get_submodule(name).register_forward_hook(functools.partial(_skip, share))


def _skip(rate: float, module: nn.Module, _: Any, output: Tensor) -> Tensor:
    from timm.layers.drop import drop_path

    skipped: Tensor = drop_path(output, rate, module.training)
    return skipped
