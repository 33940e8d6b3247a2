"""`MergeConfig`: everything a user can choose, in one frozen dataclass with a JSON round trip."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from tokenmerge.attention.forms import FORMS, AttentionForm
from tokenmerge.errors import ConfigError, UnknownFieldError
from tokenmerge.matching.distances import DISTANCES, Distance
from tokenmerge.matching.partitions import PARTITIONS, Partition
from tokenmerge.ops import BACKENDS, Backend
from tokenmerge.ops.combine import REDUCTIONS
from tokenmerge.presets import PRESETS
from tokenmerge.schedule import RForm, validate_r

SCHEDULE_FIELDS = ("r", "keep", "flops", "speedup")
Metric = Literal["k", "q", "v", "kv", "x_pre", "x"]
Combine = Literal["mean", "average", "max", "keep", "norm", "max_norm", "tofu"]
CHOICES = {
    "metric": ("k", "q", "v", "kv", "x_pre", "x"),
    "distance": DISTANCES,
    "heads": ("mean", "concat"),
    "partition": PARTITIONS,
    "combine": (*(one for one in REDUCTIONS if one != "sum"), "tofu"),
    "place": ("before", "between", "after"),
    "order": ("partition", "keep"),
    "positions": ("mean", "destination"),
    "output": ("auto", "merged", "full"),
    "attention": FORMS,
    "backend": BACKENDS,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How a model merges its tokens.

    Exactly one of `r`, `keep`, `flops` and `speedup` says how many tokens each block merges; which one is only
    demanded when a model is patched, so that a config without any can be completed by `replace`.

    Attributes:
        r: tokens merged per block: an int; a pair `(r, inflect)`, linear from `r·(1 − inflect)` to
            `r·(1 + inflect)`; or a list with one int per block, padded with 0 when short.
        keep: fraction of the unprotected tokens that each block keeps, in [0.5, 1].
        flops: FLOPs after merging ÷ before, in (0, 1]: the constant r that comes closest from below.
        speedup: FLOPs before merging ÷ after, at least 1: `flops=1/speedup`, what the arithmetic allows. Measured
            speed-ups come close to it for large models and batches, and fall short for small ones.
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
        options: further arguments of the matcher, by name (`tokenmerge.matching.get_entry(name).options`).
        metric: what matching compares (paper, table 1a): "k", the keys; "q"; "v"; "kv", K and V side by side, each of
            length 1; "x_pre", the block's input; "x", the tokens after attention.
        heads: of K, Q and V: their "mean", or "concat", all of them side by side (table 1c).
        distance: "cosine", "dot", "euclidean" or "softmax" (table 1b).
        partition: the sides of bipartite matching (table 1e): "alternating", "sequential", "random", or "checkerboard"
            on the grid of patches in the first block and alternating after it.
        combine: what becomes of tokens that merge (table 1d): "mean", weighted by size (the paper's); "average"; "max";
            "keep" the one that is joined; "norm", the mean's direction with the mean of the lengths; "max_norm", with the
            largest length; "tofu", "keep" in the first half of the blocks and "max_norm" in the second.
        place: where tokens merge: "before" attention (by `metric="x_pre"`), "between" attention and MLP (the paper's),
            or "after" the MLP.
        backend: what matches and merges: "triton" kernels, plain "torch", or "auto", Triton on a GPU.
        trace: keep the plans of the latest forward pass for `Handle.trace`; "attention" keeps what the class token looked
            at in each block, too.

    Raises:
        ConfigError: for a value that means nothing.
    """

    r: RForm | None = None
    keep: float | None = None
    flops: float | None = None
    speedup: float | None = None
    prop_attn: bool | Literal["auto"] = "auto"
    attention: AttentionForm = "auto"
    order: Literal["partition", "keep"] = "partition"
    positions: Literal["mean", "destination"] = "mean"
    output: Literal["auto", "merged", "full"] = "auto"
    matcher: str = "bipartite"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metric: Metric = "k"
    heads: Literal["mean", "concat"] = "mean"
    distance: Distance = "cosine"
    partition: Partition = "alternating"
    combine: Combine = "mean"
    place: Literal["before", "between", "after"] = "between"
    backend: Backend = "auto"
    trace: bool | Literal["attention"] = False

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
        if self.speedup is not None and not (_is_number(self.speedup) and 1 <= self.speedup <= 1000):
            raise ConfigError(f"speedup={self.speedup!r}, but it says how many times fewer FLOPs: try speedup=2")
        if self.prop_attn not in (True, False, "auto") or not isinstance(self.prop_attn, bool | str):
            raise ConfigError(
                f"prop_attn={self.prop_attn!r}, but it must be True, False or 'auto': use 'auto' if unsure"
            )
        for name, choices in CHOICES.items():
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r}, but it must be one of {', '.join(choices)}")
        if not isinstance(self.matcher, str):
            raise ConfigError(
                f"matcher={self.matcher!r}, but it must be the name of a registered matcher: try 'bipartite'"
            )
        if not isinstance(self.options, Mapping) or not all(isinstance(key, str) for key in self.options):
            raise ConfigError(
                f"options={self.options!r}, but it must map names to values: try options={{'iterations': 5}}"
            )
        object.__setattr__(self, "options", dict(self.options))  # a copy, as of r
        if self.trace not in (True, False, "attention") or not isinstance(self.trace, bool | str):
            raise ConfigError(f"trace={self.trace!r}, but it must be True, False or 'attention'")

    @classmethod
    def create(cls, config: MergeConfig | None = None, preset: str | None = None, **fields: Any) -> MergeConfig:
        """`config` (or the defaults) with `fields` replaced.

        A new schedule field replaces the old one, whichever form that had; another matcher forgets the old one's options.

        Args:
            config: what to start from.
            preset: name of a set of fields (`tokenmerge.PRESETS`) to put in before `fields`.
            **fields: values by name.

        Raises:
            UnknownFieldError: (a TypeError) for a keyword that is no field.
            ConfigError: for a preset that there is not.
        """
        if preset is not None:
            if preset not in PRESETS:
                raise ConfigError(f"preset={preset!r}, but it must be one of {', '.join(PRESETS)}")
            fields = {**PRESETS[preset], **fields}
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
        if fields.get("matcher", config.matcher) != config.matcher:
            fields = {"options": {}, **fields}
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
