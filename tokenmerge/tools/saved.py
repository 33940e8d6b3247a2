"""Merging that was saved with a model's weights, which commands use unless their options say otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenmerge import files
from tokenmerge.config import FIELDS, SCHEDULE_FIELDS, MergeConfig
from tokenmerge.errors import ConfigError, InputError, UnknownFieldError, shown
from tokenmerge.patching.kept import KEY
from tokenmerge.saving import SETTINGS, settings_in
from tokenmerge.tools.reading.weights import read_metadata
from tokenmerge.tools.settings import Setting, in_words, label_of, parse_setting


def merging_of(
    options: Any, say: Callable[[str], Any], usual: Sequence[str] = ()
) -> tuple[list[Setting], dict[str, Any]]:
    """Return the schedules and the other fields of `MergeConfig` for a command, from its options and from the model's folder.

    What the options say overrides what was saved. A matcher or a preset of the options replaces the saved way of matching.

    Args:
        options: options of model, weights and merging.
        say: function that prints a line; it is told what was taken from the model.
        usual: schedules if neither the options nor the model say any.

    Raises:
        InputError: if no schedule is known, or the saved settings are damaged.
        ConfigError: if an option is invalid.
    """
    schedules = options.schedules()
    saved, fields = fields_of(options, say)
    if not schedules and saved is not None and saved.scheduled:
        schedules = [Setting(label_of(saved), saved.changed("schedule"))]
    schedules = schedules or [parse_setting(text) for text in usual]
    if not schedules and saved is None:
        raise InputError("nothing says how much to merge: give --r, such as --r 8 16")
    if not schedules:
        raise InputError("nothing says how much to merge, and the model was saved without: give --r, such as --r 8")
    return schedules, fields


def fields_of(options: Any, say: Callable[[str], Any]) -> tuple[MergeConfig | None, dict[str, Any]]:
    """Return the settings that were saved with the model, if any, and its fields other than the schedule, overridden by the options.

    Args:
        options: options of model, weights and merging.
        say: function that prints a line; it is told what was taken from the model.
    """
    given = options.merging()
    saved = saved_with(options)
    if saved is None:
        return None, given
    say(f"merging as saved with the model: {in_words(saved)} (options override it)")
    return saved, combined(saved, given)


def apart_from_matching(options: Any, given: dict[str, Any], say: Callable[[str], Any]) -> dict[str, Any]:
    """Return saved fields that commands keep that compare ways of matching, such as proportional attention, overridden by `given`."""
    saved = saved_with(options)
    if saved is None:
        return given
    kept = _without_matching(_without_schedule(saved))
    if kept:
        say(f"as saved with the model: {', '.join(f'{name} {value}' for name, value in kept.items())}")
    return _overridden(kept, given)


def combined(saved: MergeConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a saved config, other than its schedule, overridden by fields that were given."""
    kept = _without_schedule(saved)
    matcher = FIELDS["matcher"].name
    if "preset" in given or given.get(matcher, saved.matcher) != saved.matcher:
        kept = _without_matching(kept)
    return _overridden(kept, given)


def _without_schedule(saved: MergeConfig) -> dict[str, Any]:
    return {name: value for name, value in saved.changed().items() if name not in SCHEDULE_FIELDS}


def _without_matching(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if FIELDS[name].metadata["group"] != "matching"}


def _overridden(kept: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return saved fields overridden by given ones; "auto" leaves a saved field as it is."""
    return {**kept, **{name: value for name, value in given.items() if value != "auto" or name not in kept}}


def saved_with(options: Any) -> MergeConfig | None:
    """Return the settings that were saved with the weights that the options name; `None` for other weights.

    Raises:
        InputError: if the file that may hold them is damaged.
    """
    kind, _, place = options.model.partition(":")
    checkpoint = getattr(options, "checkpoint", None)  # inspect reads no weights
    if checkpoint is not None:
        return _of_weights(checkpoint)
    if kind in ("local-dir", "hf") and place and os.path.isdir(place):
        return settings_in(Path(place))
    if kind in ("hf_hub", "hf-hub", "hf") and getattr(options, "pretrained", False):
        return _of_hub(place, "config.json" if kind == "hf" else SETTINGS)
    return None


def _of_hub(name: str, file: str) -> MergeConfig | None:
    """Return the settings in a repository on the hub; it is downloaded already, or loading its weights reports the error."""
    try:
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(name, file))
    except Exception:  # the client raises many types; a repository without the file holds no settings
        return None
    return MergeConfig.load(path) if file == SETTINGS else settings_in(path.parent)


def _of_weights(path: Path) -> MergeConfig | None:
    """Return the settings in the metadata of a safetensors file."""
    if path.suffix != ".safetensors" or not os.path.exists(path):
        return None  # loading the weights reports the error
    found = read_metadata(path, KEY)
    if found is None:
        return None
    try:
        return MergeConfig.from_json(files.to_json(found, "the settings"))
    except (ConfigError, UnknownFieldError) as error:
        raise InputError(f"the settings of merging in {shown(str(path))} cannot be used ({error})") from None
