"""Schedules as people type them: `--r 0 8 16:-1 8,8,0 keep=0.9 flops=0.5 speedup=2`; and matching, from flags."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tokenmerge.config import FIELDS, MergeConfig
from tokenmerge.errors import ConfigError, UnknownFieldError
from tokenmerge.patching.match import check_matching

GRAMMAR = "8 (in every block), 16:-1 (r:inflect), 8,8,0 (a list per block), keep=0.9, flops=0.5, speedup=2, or a config file ending in .json"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One entry of `--r`.

    Attributes:
        label: what tables and JSON rows show as `r`: the int, or the text as typed.
        fields: the schedule field of `MergeConfig` that it stands for; all that differ from the defaults for a config file.
    """

    label: int | str
    fields: dict[str, Any]

    @property
    def title(self) -> str:
        """The label as people read it: "r=8", "flops=0.5"."""
        return f"r={self.label}" if set(self.fields) == {"r"} else str(self.label)

    @property
    def is_baseline(self) -> bool:
        """Whether this is r=0: the unpatched model."""
        return self.label == 0

    def config(self, **fields: Any) -> MergeConfig:
        """The config with this schedule and other `fields`, which win over those of a config file unless they are "auto"."""
        given = {name: value for name, value in fields.items() if value != "auto" or name not in self.fields}
        return MergeConfig.create(**{**self.fields, **given})


def parse_setting(text: str) -> Setting:
    """One entry of `--r`.

    Raises:
        ConfigError: if the text is none of the forms, or a value in it means nothing.
    """
    if text.endswith(".json"):
        return Setting(Path(text).name, _from_file(Path(text)))
    try:
        fields = _fields(text)
    except ValueError:
        raise ConfigError(f"r={text!r:.60} is not understood, but one of these was expected: {GRAMMAR}") from None
    MergeConfig.create(**fields)
    label = fields["r"] if isinstance(fields.get("r"), int) else text
    return Setting(label, fields)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        config = MergeConfig.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the config {str(path)!r} cannot be read ({error.strerror}): check the path") from None
    except (ConfigError, UnknownFieldError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} holds no config of tokenmerge: {error}") from None
    if not config.scheduled:
        raise ConfigError(f"{str(path)!r} says nothing of how much to merge: add r, keep, flops or speedup to it")
    return config.changed()


def _fields(text: str) -> dict[str, Any]:
    name, equals, value = text.partition("=")
    if equals:
        if name not in ("keep", "flops", "speedup"):
            raise ValueError(name)
        return {name: float(value)}
    if ":" in text:
        r, inflect = text.split(":")
        return {"r": (int(r), float(inflect))}
    if "," in text:
        listed = [int(part) for part in text.split(",") if part.strip()]
        if not listed:
            raise ValueError(text)
        return {"r": listed}
    return {"r": int(text)}


def matching_fields(args: Any) -> dict[str, Any]:
    """The fields of `MergeConfig` that flags gave, checked.

    Raises:
        ConfigError: if there is no such matcher, or it has no such option.
    """
    names = ["preset", *(name for name, field in FIELDS.items() if field.metadata["group"] == "matching")]
    fields = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    options = dict(_option(text) for text in getattr(args, "option", None) or ())
    if options:
        fields["options"] = options
    config = MergeConfig.create(**fields)
    check_matching(config)
    return fields


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--option {text!r} is not understood, but NAME=VALUE was expected: try iterations=5")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
    except (ValueError, RecursionError) as error:  # too many digits, too many brackets
        raise ConfigError(f"--option {text!r:.60} is not understood ({error!s:.80}): try iterations=5") from None
