"""`MergeConfig`: everything a user can choose, in one frozen dataclass with a JSON round trip."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

from tokenmerge.attention_forms import FORMS, AttentionForm
from tokenmerge.errors import ConfigError, UnknownFieldError
from tokenmerge.ops import BACKENDS, Backend
from tokenmerge.schedule import RForm, validate_r

SCHEDULE_FIELDS = ("r", "keep", "flops")
_CHOICES = {
    "order": ("partition", "keep"),
    "positions": ("mean", "destination"),
    "output": ("auto", "merged", "full"),
    "attention": FORMS,
    "backend": BACKENDS,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How a model merges its tokens.

    Exactly one of `r`, `keep` and `flops` says how many tokens each block merges; which one is only
    demanded when a model is patched, so that a config without any can be completed by `replace`.

    Attributes:
        r: tokens merged per block: an int; a pair `(r, inflect)`, linear from `r·(1 − inflect)` to
            `r·(1 + inflect)`; or a list with one int per block, padded with 0 when short.
        keep: fraction of the unprotected tokens that each block keeps, in [0.5, 1].
        flops: FLOPs after merging ÷ before, in (0, 1]: the constant r that comes closest from below.
        prop_attn: proportional attention, `softmax(QKᵀ/√d + log size)` (paper, section 3). "auto" is off for
            weights pretrained by MAE and used off the shelf, where the family can tell, and on otherwise.
        attention: how sizes reach the attention kernel: as a "mask" that PyTorch finds a kernel for; on the "cudnn",
            "efficient" or "math" kernel; by "flex" attention; or without a mask, as a "key_channel" or
            "value_channel" more. "auto" goes by the device. All compute the same.
        order: how the tokens that are left are ordered: "partition" is the paper's (those that could have
            merged, then those that could have been joined), "keep" leaves them in ascending position.
        positions: where a merged token stands for attention that knows positions (rotary, relative bias):
            "mean" of the patches it stands for, weighted by size, or "destination", that of the token joined.
        output: what leaves the last block: "merged" tokens; "full", spread back over the patches, so that
            whatever reads them needs to know nothing of sizes; "auto" lets the family choose.
        matcher: name of a registered matching algorithm; "bipartite" is the paper's.
        backend: what matches and merges: "triton" kernels, plain "torch", or "auto", Triton on a GPU.
        trace: keep the plans of the latest forward pass for `Handle.trace`.

    Raises:
        ConfigError: for a value that means nothing.
    """

    r: RForm | None = None
    keep: float | None = None
    flops: float | None = None
    prop_attn: bool | Literal["auto"] = "auto"
    attention: AttentionForm = "auto"
    order: Literal["partition", "keep"] = "partition"
    positions: Literal["mean", "destination"] = "mean"
    output: Literal["auto", "merged", "full"] = "auto"
    matcher: str = "bipartite"
    backend: Backend = "auto"
    trace: bool = False

    def __post_init__(self) -> None:
        given = [name for name in SCHEDULE_FIELDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} were all given, but they contradict each other: choose one")
        if self.r is not None:
            validate_r(self.r)
            if isinstance(self.r, list):  # a copy, so that the caller's list cannot change a frozen config
                object.__setattr__(self, "r", list(self.r))
        for name, low in (("keep", 0.5), ("flops", 0.0)):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and low <= value <= 1 and value > 0):
                interval = "[0.5, 1]" if low else "(0, 1]"
                raise ConfigError(f"{name}={value!r}, but it is a fraction and must lie in {interval}: try {name}=0.7")
        if self.prop_attn not in (True, False, "auto") or not isinstance(self.prop_attn, bool | str):
            raise ConfigError(
                f"prop_attn={self.prop_attn!r}, but it must be True, False or 'auto': use 'auto' if unsure"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r}, but it must be one of {', '.join(choices)}")
        if not isinstance(self.matcher, str):
            raise ConfigError(
                f"matcher={self.matcher!r}, but it must be the name of a registered matcher: try 'bipartite'"
            )
        if not isinstance(self.trace, bool):
            raise ConfigError(f"trace={self.trace!r}, but it must be True or False")

    @classmethod
    def create(cls, config: MergeConfig | None = None, **fields: Any) -> MergeConfig:
        """`config` (or the defaults) with `fields` replaced.

        A new schedule field replaces the old one, whichever form that had.

        Raises:
            UnknownFieldError: (a TypeError) for a keyword that is no field.
        """
        config = cls() if config is None else config
        if not isinstance(config, MergeConfig):
            raise ConfigError(
                f"config is {config!r} of type {type(config).__name__}, but it must be a MergeConfig: "
                "write patch(model, r=8) or patch(model, MergeConfig(r=8))"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise UnknownFieldError(
                    f"{name!r} is no field of MergeConfig, which has {', '.join(known)}: check the spelling"
                )
        if any(fields.get(name) is not None for name in SCHEDULE_FIELDS):
            fields = {**dict.fromkeys(SCHEDULE_FIELDS), **fields}
        return dataclasses.replace(config, **fields)

    def to_json(self) -> str:
        """This config as one JSON object; a pair `(r, inflect)` becomes `{"r": …, "inflect": …}`."""
        fields = dataclasses.asdict(self)
        if isinstance(self.r, tuple):
            fields["r"] = {"r": self.r[0], "inflect": self.r[1]}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> MergeConfig:
        """The config that `to_json` wrote.

        Raises:
            ConfigError: if the text is no JSON object or holds a bad value.
            UnknownFieldError: (a TypeError) for a key that is no field.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"the config is not JSON ({error}), but a JSON object was expected: check the file"
            ) from None
        if not isinstance(fields, dict):
            raise ConfigError(
                f'the config is a JSON {type(fields).__name__}, but an object was expected: write {{"r": 8}}'
            )
        if isinstance(fields.get("r"), dict):
            pair = fields["r"]
            if set(pair) != {"r", "inflect"}:
                raise ConfigError(f"r={pair!r}, but as an object it must hold exactly 'r' and 'inflect'")
            fields["r"] = (pair["r"], pair["inflect"])
        return cls.create(**fields)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
