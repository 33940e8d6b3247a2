"""Schedules as people type them: `--r 0 8 16:-1 8,8,0 keep=0.9 flops=0.5`."""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenmerge.config import MergeConfig
from tokenmerge.errors import ConfigError

GRAMMAR = "8 (in every block), 16:-1 (r:inflect), 8,8,0 (a list per block), keep=0.9 or flops=0.5"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One entry of `--r`.

    Attributes:
        label: what tables and JSON rows show as `r`: the int, or the text as typed.
        fields: the schedule field of `MergeConfig` that it stands for.
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
        """The config with this schedule and other `fields`."""
        return MergeConfig.create(**self.fields, **fields)


def parse_setting(text: str) -> Setting:
    """One entry of `--r`.

    Raises:
        ConfigError: if the text is none of the forms, or a value in it means nothing.
    """
    try:
        fields = _fields(text)
    except ValueError:
        raise ConfigError(f"r={text!r} is not understood, but one of these was expected: {GRAMMAR}") from None
    MergeConfig.create(**fields)
    label = fields["r"] if isinstance(fields.get("r"), int) else text
    return Setting(label, fields)


def _fields(text: str) -> dict[str, Any]:
    name, equals, value = text.partition("=")
    if equals:
        if name not in ("keep", "flops"):
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
