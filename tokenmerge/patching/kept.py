"""The settings of merging that a transformers model keeps in its config, from where `save_pretrained` and `push_to_hub` write them."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from tokenmerge.config import MergeConfig
from tokenmerge.errors import ConfigError
from tokenmerge.patching.record import ModelRecord

KEY = "tokenmerge"
"""Name of the attribute of a config, and of the entry in config.json and in the metadata of weights."""


def lasting(config: MergeConfig) -> MergeConfig:
    """Return a config without the settings that belong to a device or a process: attention, backend, trace."""
    here = {name: getattr(MergeConfig(), name) for name in config.changed("running")}
    return MergeConfig.create(config, trace=False, **here)


def keep(model: nn.Module, record: ModelRecord) -> None:
    """Store the settings of a patched model in its transformers config, if it has one."""
    place = config_of(model, record)
    if place is None:
        return
    try:
        kept = json.loads(lasting(record.settings.config).to_json())
    except ConfigError as error:  # an option that JSON cannot hold: whoever reads the config must learn of it
        kept = {"error": str(error)}
    setattr(place, KEY, kept)


def forget(model: nn.Module, record: ModelRecord) -> None:
    """Remove the settings from the config again."""
    place = config_of(model, record)
    if place is not None:
        vars(place).pop(KEY, None)


def config_of(model: nn.Module, record: ModelRecord | None = None) -> Any:
    """Return the transformers config of a model or of the module around it; `None` for models of other libraries."""
    outer = None if record is None or record.outer is None else record.outer()
    for module in (model, outer):
        found = getattr(module, "config", None)
        if hasattr(found, "model_type") and hasattr(found, "to_dict"):
            return found
    return None
