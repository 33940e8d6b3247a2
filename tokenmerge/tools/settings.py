"""Parsing of schedules, such as `--r 0 8 16:-1 8,8,0 keep=0.9 flops=0.5 speedup=2`, and of the flags of matching."""

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
        label: the value of `r` in tables and JSON rows: the int, or the text that was given.
        fields: the schedule field of `MergeConfig`; for a config file, all fields that differ from the defaults.
    """

    label: int | str
    fields: dict[str, Any]

    @property
    def title(self) -> str:
        """Label for tables and pictures, such as "r=8" or "flops=0.5"."""
        return f"r={self.label}" if set(self.fields) == {"r"} else str(self.label)

    @property
    def is_baseline(self) -> bool:
        """Whether this is r=0, which means the unpatched model."""
        return self.label == 0

    def config(self, **fields: Any) -> MergeConfig:
        """Return the config with this schedule and `fields`, which override those of a config file unless they are "auto"."""
        given = {name: value for name, value in fields.items() if value != "auto" or name not in self.fields}
        return MergeConfig.create(**{**self.fields, **given})


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
    """Return the fields of `MergeConfig` that the flags of matching set, after checking them.

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
    except (
        ValueError,
        RecursionError,
    ) as error:  # Python refuses numbers of too many digits and brackets nested too deeply
        raise ConfigError(f"--option {text!r:.60} is not understood ({error!s:.80}): try iterations=5") from None
