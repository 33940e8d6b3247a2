"""Merging that was saved with a model's weights, which commands use unless their options say otherwise."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from tokenmerge import files
from tokenmerge.config import FIELDS, MergeConfig
from tokenmerge.errors import ConfigError, InputError, UnknownFieldError, shown
from tokenmerge.patching.kept import KEY, SETTINGS, lasting, settings_in
from tokenmerge.tools.reading.weights import check_hub_format, read_metadata
from tokenmerge.tools.settings import Setting, in_words, label_of, parse_setting, remaining, without_schedule


def merging_of(
    options: Any, say: Callable[[str], Any], usual: Sequence[str] = ()
) -> tuple[list[Setting], dict[str, Any]]:
    """Return the schedules and the other fields of `MergeConfig` for a command, from its options and from the model's folder.

    What the options say overrides what was saved. A matcher or a preset of the options replaces the saved way of matching, and a
    config file given to `--r` replaces all that was saved.

    Args:
        options: options of model, weights and merging.
        say: function that prints a line; it is told what was taken from the model.
        usual: schedules if neither the options nor the model say any.

    Raises:
        InputError: if no schedule is known, or the saved settings are damaged.
        ConfigError: if an option is invalid.
    """
    saved = saved_with(options)
    given = options.merging(saved)
    settings = schedules_of(options.schedules(), saved, usual)
    return on_saved(settings, saved, given, say), given


def schedules_of(given: Sequence[Setting], saved: MergeConfig | None, usual: Sequence[str] = ()) -> list[Setting]:
    """Return the schedules that were given, otherwise the one saved with the model, otherwise the usual ones.

    Raises:
        InputError: if there are none.
    """
    settings = list(given)
    if not settings and saved is not None and saved.scheduled:
        settings = [Setting(label_of(saved), saved.changed("schedule"))]
    settings = settings or [parse_setting(text) for text in usual]
    if not settings and saved is None:
        raise InputError("nothing says how much to merge: give --r, such as --r 8 16")
    if not settings:
        raise InputError("nothing says how much to merge, and the model was saved without: give --r, such as --r 8")
    return settings


def on_saved(
    settings: Sequence[Setting], saved: MergeConfig | None, given: dict[str, Any], say: Callable[[str], Any]
) -> list[Setting]:
    """Return settings with the fields that were saved with the model and that `given` leaves; config files stay as they are.

    Args:
        settings: the schedules.
        saved: settings saved with the model, if any.
        given: fields that the options give.
        say: function that prints a line; it is told what was taken from the model.
    """
    if saved is None:
        return list(settings)
    kept = kept_of(saved, given)
    schedule = saved.changed("schedule")
    used = set() if all(setting.of_file for setting in settings) else set(kept)
    used |= {name for name, value in schedule.items() if any(one.fields.get(name) == value for one in settings)}
    say_used(saved, used, say)
    return [
        setting if setting.of_file else dataclasses.replace(setting, fields={**kept, **setting.fields})
        for setting in settings
    ]


def say_used(saved: MergeConfig, used: Collection[str], say: Callable[[str], Any]) -> None:
    """Say in one line which of the settings saved with a model are used, and which are not."""
    unused = [name for name in saved.changed() if name not in used]
    if unused and not used:
        say(f"the merging saved with the model ({in_words(saved)}) is not used, because the options give another")
        return
    but = f" (not its {', '.join(unused)}: the options give others)" if unused else ""
    say(f"merging as saved with the model: {in_words(saved, used)}{but}")


def apart_from_matching(saved: MergeConfig | None, given: dict[str, Any], say: Callable[[str], Any]) -> dict[str, Any]:
    """Return saved fields that commands keep that compare ways of matching, such as proportional attention, overridden by `given`."""
    if saved is None:
        return given
    kept = {
        name: value
        for name, value in without_schedule(saved.changed()).items()
        if FIELDS[name].metadata["group"] != "matching" and name not in given
    }
    if kept:
        say(f"as saved with the model: {', '.join(f'{name} {value}' for name, value in kept.items())}")
    return {**kept, **given}


def kept_of(saved: MergeConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields saved with a model, other than the schedule, that the given ones leave."""
    return remaining(without_schedule(saved.changed()), given)


def saved_with(options: Any) -> MergeConfig | None:
    """Return the settings that were saved with the weights that the options name; `None` for other weights.

    Raises:
        InputError: if the file that may hold them is damaged.
    """
    kind, _, place = options.model.partition(":")
    checkpoint = getattr(options, "checkpoint", None)  # inspect reads no weights
    if checkpoint is not None:
        return _of_weights(checkpoint)
    if kind == "local-dir":
        check_hub_format(Path(place))
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
    return settings_in(path.parent)


def _of_weights(path: Path) -> MergeConfig | None:
    """Return the settings in the metadata of a safetensors file."""
    if path.suffix != ".safetensors" or not os.path.exists(path):
        return None  # loading the weights reports the error
    found = read_metadata(path, KEY)
    if found is None:
        return None
    try:
        return lasting(MergeConfig.from_json(files.to_json(found, "the settings")))
    except (ConfigError, UnknownFieldError) as error:
        raise InputError(f"the settings of merging in {shown(str(path))} cannot be used ({error})") from None
