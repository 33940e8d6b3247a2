"""The settings of merging that are kept with a model.

A transformers model keeps them in its config, from where `save_pretrained` and `push_to_hub` write them; beside the weights of other
models they have a file of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from tokenmerge.config import MergeConfig
from tokenmerge.errors import ConfigError, InputError, UnknownFieldError, shown
from tokenmerge.files import read_json
from tokenmerge.patching.record import ModelRecord

SETTINGS = "tokenmerge.json"
"""Name of the file of settings in a saved folder: a config, as `MergeConfig.save` writes it."""
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


def settings_in(folder: Path) -> MergeConfig | None:
    """Return the settings that were saved with a model, without those of a device; `None` if there are none.

    Raises:
        InputError: if they cannot be read, or tokenmerge.json and the config of a transformers model contradict each other.
    """
    file = folder / SETTINGS
    beside = as_config(read_json(file, "the settings"), str(file)) if file.exists() else None
    if not (folder / "config.json").exists():
        return beside
    found = entry_of(read_json(folder / "config.json", "the model's config", finite=False))
    inside = None if found is None else as_config(found, str(folder / "config.json"))
    if inside is not None and beside is not None and inside != beside:
        raise InputError(
            f"{shown(str(folder))} keeps one merging in config.json and another in {SETTINGS}, and nobody can tell which one counts: "
            f"delete {SETTINGS}, or the entry {KEY} of config.json"
        )
    return beside if inside is None else inside


def holder_of(about: Any) -> dict[str, Any] | None:
    """Return the config with the entry of settings: the model's own, or one inside it (of a tower); `None` if there is none."""
    if not isinstance(about, dict) or KEY in about:
        return about if isinstance(about, dict) else None
    inside = [holder_of(value) for name, value in about.items() if str(name).endswith("config")]
    return next((one for one in inside if one is not None), None)


def entry_of(about: Any) -> Any:
    """Return the entry of settings in a config or in one of the configs inside it; `None` if there is none."""
    return (holder_of(about) or {}).get(KEY)


def as_config(found: Any, where: str) -> MergeConfig:
    """Return an entry of settings as a config; `where` is its place, for messages.

    Raises:
        InputError: if it cannot be used.
    """
    if isinstance(found, dict) and set(found) == {"error"}:
        raise InputError(f"{where} keeps no settings of merging, because {found['error']}")
    try:
        return lasting(MergeConfig.from_json(json.dumps(found)))
    except UnknownFieldError as error:
        raise InputError(
            f"the settings of merging in {shown(where)} cannot be used ({error}; a newer version of tokenmerge may have it)"
        ) from None
    except ConfigError as error:
        raise InputError(f"the settings of merging in {shown(where)} cannot be used ({error})") from None
