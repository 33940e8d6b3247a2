"""Parsing of schedules, such as `--r 0 8 16:-1 8,8,0 keep=0.9 flops=0.5 speedup=2`, and of the flags of matching."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenmerge.config import FIELDS, SCHEDULE_FIELDS, MergeConfig
from tokenmerge.errors import ConfigError, UnknownFieldError, nearest
from tokenmerge.patching.match import check_matching

GRAMMAR = "8 (in every block), 16:-1 (r:inflect), 8,8,0 (a list per block), keep=0.9, flops=0.5, speedup=2, or a config file ending in .json"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One entry of `--r`.

    Attributes:
        label: the value of `r` in tables and JSON rows: the int, or the text that was given.
        fields: the schedule field of `MergeConfig`; for a config file, all fields that differ from the defaults.
    """

    label: int | str
    fields: dict[str, Any]

    @property
    def of_file(self) -> bool:
        """Whether this is a whole config from a file, and not a schedule alone."""
        return str(self.label).endswith(".json")

    @property
    def title(self) -> str:
        """Label for tables and pictures, such as "r=8" or "flops=0.5"."""
        return f"r={self.label}" if "r" in self.fields and not self.of_file else str(self.label)

    @property
    def is_baseline(self) -> bool:
        """Whether this is r=0, which means the unpatched model."""
        return self.label == 0

    def config(self, **fields: Any) -> MergeConfig:
        """Return the config with this schedule and `fields`, which override those of a config file."""
        return MergeConfig.create(**overridden(self.fields, fields))


def title_of_label(label: int | str) -> str:
    """Return the title of the setting with this label in a row, such as "r=8" or "flops=0.5"."""
    return str(label) if "=" in str(label) or str(label).endswith(".json") else f"r={label}"


def overridden(fields: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a whole config, overridden by others; another matcher or a preset replaces its way of matching."""
    left = remaining(fields, given)
    options = {**left.get("options", {}), **given.get("options", {})}
    return {**left, **given, **({"options": options} if options else {})}


def remaining(fields: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a whole config that others leave as they are, with arguments of its matcher; see `overridden`."""
    usual = FIELDS["matcher"].default
    own = fields.get("matcher", usual)
    anew = "preset" in given or given.get("matcher", own) != own
    gone = {name for name in fields if anew and FIELDS[name].metadata["group"] == "matching"}
    return {
        name: value for name, value in fields.items() if name not in gone and (name not in given or name == "options")
    }


def without_schedule(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config that do not say how many tokens merge."""
    return {name: value for name, value in fields.items() if name not in SCHEDULE_FIELDS}


def parse_setting(text: str) -> Setting:
    """Parse one entry of `--r`.

    Raises:
        ConfigError: if the text has none of the accepted forms, or a value in it is invalid.
    """
    if text.endswith(".json"):
        return Setting(Path(text).name, _from_file(Path(text)))
    try:
        fields = _fields(text)
    except ValueError:
        near = nearest(text.partition("=")[0], ("keep", "flops", "speedup")) if "=" in text else None
        hint = "" if near is None or text.startswith(f"{near}=") else f"; did you mean {near}=?"
        raise ConfigError(f"r={text!r:.60} is not understood, but one of these was expected: {GRAMMAR}{hint}") from None
    MergeConfig.create(**fields)
    label = fields["r"] if isinstance(fields.get("r"), int) else text
    return Setting(label, fields)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        config = MergeConfig.load(path)
    except (ConfigError, UnknownFieldError) as error:
        raise ConfigError(f"{str(path)!r} holds no config of tokenmerge: {error}") from None
    if not config.scheduled:
        raise ConfigError(f"{str(path)!r} says nothing of how much to merge: add r, keep, flops or speedup to it")
    return config.changed()


def _fields(text: str) -> dict[str, Any]:
    name, equals, value = text.partition("=")
    if equals:
        if name not in ("keep", "flops", "speedup"):
            raise ValueError(name)
        values = [float(part) for part in value.split(",")]
        if len(values) > 1 and name != "keep":
            raise ValueError(value)
        return {name: values[0] if len(values) == 1 else values}
    if ":" in text:
        r, inflect = text.split(":")
        return {"r": (int(r), float(inflect))}
    if "," in text:
        return {"r": [int(part) for part in text.removesuffix(",").split(",")]}  # "8," is a list of one
    return {"r": int(text)}


def label_of(config: MergeConfig) -> int | str:
    """Return the schedule of a config as `--r` takes it."""
    name, value = next(iter(config.changed("schedule").items()))
    if isinstance(value, tuple):
        return f"{value[0]}:{value[1]:g}"
    listed = ",".join(map(str, value)) + ("," if len(value) == 1 else "") if isinstance(value, list) else value
    return listed if name == SCHEDULE_FIELDS[0] else f"{name}={listed}"


def in_words(config: MergeConfig, names: Collection[str] = tuple(FIELDS)) -> str:
    """Return the settings of a config that differ from the defaults, of those named, such as "r=8, combine norm"."""
    scheduled = any(name in names for name in config.changed("schedule"))
    label = label_of(config) if scheduled else ""
    parts = [] if not scheduled else [f"r={label}" if "=" not in str(label) else str(label)]
    changed = {n: value for n, value in config.changed().items() if n in names and n not in SCHEDULE_FIELDS}
    for name, value in changed.items():
        parts.append(f"{name} {dict(value)}" if isinstance(value, Mapping) else f"{name} {value}")
    return ", ".join(parts) or "the paper's settings"


def merging_fields(
    given: Mapping[str, Any], bases: Sequence[Mapping[str, Any]] = (MappingProxyType({}),), **flags: Any
) -> dict[str, Any]:
    """Return the fields of `MergeConfig` other than the schedule, after checking them.

    Args:
        given: fields of `MergeConfig` (from `--set`); any other name is an argument of the matcher.
        bases: fields of the configs that they will override, such as one saved with the model.
        **flags: fields that have flags of their own, and the preset; `None` if not given.

    Raises:
        ConfigError: if a value is invalid, there is no such matcher, or it has no such argument.
    """
    fields = {name: value for name, value in flags.items() if value is not None}
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name not in FIELDS:
            options[name] = value
            continue
        if name in SCHEDULE_FIELDS or name in ("options", "trace"):
            hint = f"give it to --r, as {name}={value}" if name in SCHEDULE_FIELDS else "leave it out"
            raise ConfigError(f"--set {name} was given, but it does not say how tokens merge: {hint}")
        if name in fields:
            raise ConfigError(f"--set {name} and --{name.replace('_', '-')} were both given: give one of them")
        fields[name] = value
    if options:
        fields["options"] = options
    try:
        for base in bases:
            check_matching(MergeConfig.create(**overridden(base, fields)))
    except ConfigError as error:
        odd = next((name for name in options if repr(name) in str(error)), None)
        near = None if odd is None else nearest(odd, list(FIELDS))
        if near is None:
            raise
        raise ConfigError(f"--set {odd} is no setting, and no argument of the matcher: did you mean {near}?") from None
    return fields
