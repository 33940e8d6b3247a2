"""`MergeConfig`: all settings of merging, in one frozen dataclass with a JSON round trip.

Each setting is defined in this file alone: its type, whose `Literal` lists the choices; its help text, which flags,
summaries and documentation quote; and its checks against other fields (`MergeConfig.__post_init__`).
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tokenmerge.errors import ConfigError, InputError, UnknownFieldError, one_of, shown
from tokenmerge.files import parse_json, read_text, write_json
from tokenmerge.frozen import FrozenDict, check_keys, frozen, thawed
from tokenmerge.schedule import RForm, is_number, validate_r

Metric = Literal["k", "q", "v", "kv", "x_pre", "x"]
Heads = Literal["mean", "concat"]
Distance = Literal["cosine", "dot", "euclidean", "softmax"]
Partition = Literal["alternating", "sequential", "random", "checkerboard"]
Combine = Literal["mean", "average", "max", "destination", "norm", "max_norm", "tofu"]
Place = Literal["before", "between", "after"]
AttentionForm = Literal["auto", "mask", "triton", "cudnn", "efficient", "math", "flex", "key_channel", "value_channel"]
Backend = Literal["auto", "torch", "triton", "c"]


PRESETS: Mapping[str, Mapping[str, Any]] = frozen(
    {
        # the paper's design choices, which are also the defaults
        "paper": {
            "matcher": "bipartite",
            "metric": "k",
            "heads": "mean",
            "distance": "cosine",
            "partition": "alternating",
            "combine": "mean",
            "place": "between",
        },
        # selected for the smallest change in predictions on training images and photos, then confirmed on validation
        # images (docs/compare.md): the cost of a merge is half cosine of the keys and half distance of the tokens, scaled
        # by class attention, and merged tokens keep the mean length of their members
        "accurate": {
            "matcher": "informed",
            "options": {"attention_power": 0.5, "token_weight": 0.5},
            "partition": "checkerboard",
            "combine": "norm",
        },
    }
)
"""Named sets of fields, for `patch(model, speedup=2, preset="accurate")`."""


def setting(default: Any, text: str, group: str = "", by_matcher: bool = False) -> Any:
    """Return the dataclass field of one setting of `MergeConfig`.

    Args:
        default: its default value.
        text: its help text, one sentence that does not list the choices.
        group: "schedule" for the mutually exclusive fields that set how many tokens merge; "matching" for fields that
            set which tokens merge and how; "running" for fields that do not change results; "" for all others.
        by_matcher: whether the matcher implements the setting, through a parameter of the same name.
    """
    metadata = {"help": text, "group": group, "by_matcher": by_matcher}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: FrozenDict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Settings of merging for one model.

    At most one of `r`, `keep`, `flops` and `speedup` sets how many tokens each block merges away; patching requires one
    of them. `keep`, `flops` and `speedup` are resolved for the number of tokens that enters the model in each pass.
    docs/settings.md lists all fields; `tokenmerge.config.help_of(name)` and `choices_of(name)` return the same texts.

    Raises:
        ConfigError: if a field has an invalid value, or fields contradict each other.

    Example:
        >>> import tokenmerge
        >>> config = tokenmerge.MergeConfig(r=8, combine="norm")
        >>> config.changed()
        {'r': 8, 'combine': 'norm'}
        >>> tokenmerge.MergeConfig.create(config, keep=0.7).r is None  # a new schedule field replaces the old one
        True
    """

    r: RForm | None = setting(
        None,
        "tokens merged per block: an int; a pair (r, inflect), which varies linearly from r·(1 − inflect) to r·(1 + inflect) "
        "over the blocks; or a list with one int per block, padded with zeros",
        "schedule",
    )
    keep: float | list[float] | None = setting(
        None,
        "fraction of the unprotected tokens that each block keeps, in (0, 1]: a number, or a list with one number per block",
        "schedule",
    )
    flops: float | None = setting(
        None,
        "FLOPs after merging divided by FLOPs before, in (0, 1]; selects the smallest constant r that does not exceed it",
        "schedule",
    )
    speedup: float | None = setting(
        None,
        "theoretical speed-up, at least 1: FLOPs before merging divided by FLOPs after, so flops=1/speedup; the measured "
        "speed-up comes close for large models and batches, and is lower for small ones",
        "schedule",
    )
    prop_attn: bool | Literal["auto"] = setting(
        "auto",
        "proportional attention, softmax(QKᵀ/√d + log size) (paper, section 3); auto is off for MAE pretrained weights without "
        "fine-tuning, where they can be recognized, and on for all others",
    )
    attention: AttentionForm = setting(
        "auto",
        "implementation of proportional attention: an additive mask (mask, cudnn, efficient and math differ in the kernel that "
        "PyTorch runs), this package's Triton kernel, FlexAttention, or extra channels of K or V without a mask; auto selects "
        "by device; all compute the same function",
        "running",
    )
    order: Literal["partition", "spatial"] = setting(
        "partition",
        "order of the remaining tokens: by partition as in the paper (unmerged tokens of set A, then set B), or spatial, "
        "in ascending position",
    )
    positions: Literal["mean", "destination"] = setting(
        "mean",
        "position of a merged token in attention with positions (rotary, relative bias): the mean position of its patches, "
        "or the position of the token that the others merged into",
    )
    output: Literal["auto", "merged", "full"] = setting(
        "auto",
        "output of the last block: merged tokens, or full, which unmerges them to one token per patch for a head that does not "
        "know token sizes; auto is the default of the model family",
    )
    matcher: str = setting(
        "bipartite", "name of a registered matching algorithm; bipartite is the one in the paper", "matching"
    )
    options: Mapping[str, Any] = setting({}, "additional arguments of the matcher, by name", "matching")
    metric: Metric = setting(
        "k",
        "features compared by matching (paper, table 1a): keys; queries; values; K and V concatenated, each with unit length; "
        "x_pre, the input of the block; or x, the tokens after attention",
        "matching",
    )
    heads: Heads = setting(
        "mean",
        "reduction of the heads of K, Q and V before matching: mean or concatenation (paper, table 1c)",
        "matching",
    )
    distance: Distance = setting(
        "cosine", "similarity measure of matching (paper, table 1b)", "matching", by_matcher=True
    )
    partition: Partition = setting(
        "alternating",
        "division of the tokens into the sets A and B of bipartite matching (paper, table 1e); checkerboard applies to the "
        "patch grid of the first block, and later blocks alternate",
        "matching",
        by_matcher=True,
    )
    combine: Combine = setting(
        "mean",
        "reduction of tokens that merge (paper, table 1d): mean weighted by size; unweighted average; elementwise maximum; "
        "destination, the token in set B unchanged; norm or max_norm, the mean rescaled to the mean or the largest length; tofu, "
        "destination in the first half of the blocks and max_norm in the second",
        "matching",
    )
    place: Place = setting(
        "between",
        "position of the merge in the block: before attention (needs metric x_pre), between attention and MLP, or after the MLP",
        "matching",
    )
    backend: Backend = setting(
        "auto",
        "implementation of matching and merging; auto uses Triton kernels on a GPU and functions in C on a CPU",
        "running",
        by_matcher=True,
    )
    trace: bool | Literal["attention", "rollout"] = setting(
        False,
        "record the merge plans of each pass: they travel with the features, and `Handle.trace` holds those of the latest "
        "complete pass; attention also records the class token's attention in each block, and rollout the attention rollout",
    )

    def __post_init__(self) -> None:
        given = [name for name in SCHEDULE_FIELDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} were all given, but they contradict each other: choose one")
        if self.r is not None:
            validate_r(self.r)
        if not isinstance(self.options, Mapping) or not all(isinstance(key, str) for key in self.options):
            raise ConfigError(
                f"options={shown(self.options)}, but it must map names to values: try options={{'iterations': 5}}"
            )
        for name in ("r", "keep", "options"):  # immutable copies: the caller may still hold the lists
            object.__setattr__(self, name, frozen(getattr(self, name)))
        self._check_fractions()
        if not isinstance(self.matcher, str):
            raise ConfigError(
                f"matcher={shown(self.matcher)}, but it must be the name of a registered matcher: try 'bipartite'"
            )
        for name in CHOICES:
            value = getattr(self, name)
            if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices_of(name)):
                words = ", ".join(map(str, choices_of(name)))
                raise ConfigError(
                    f"{name}={shown(value)}, but it must be one of {words}: {one_of(value, choices_of(name))}"
                )

        if self.place == "before" and self.metric != "x_pre":
            raise ConfigError(
                f"place='before' merges before attention has made {shown(self.metric)}: give metric='x_pre' as well"
            )

    def _check_fractions(self) -> None:
        keep = self.keep if isinstance(self.keep, list) else [] if self.keep is None else [self.keep]
        for value in keep:
            if not (is_number(value) and 0 < value <= 1):
                raise ConfigError(f"keep={shown(self.keep)}, but a fraction must lie in (0, 1]: try keep=0.7")
        if self.flops is not None and not (is_number(self.flops) and 0 < self.flops <= 1):
            raise ConfigError(f"flops={shown(self.flops)}, but it is a fraction and must lie in (0, 1]: try flops=0.7")
        if self.speedup is not None and not (is_number(self.speedup) and 1 <= self.speedup <= 1000):
            raise ConfigError(f"speedup={shown(self.speedup)}, but it says how many times fewer FLOPs: try speedup=2")

    @classmethod
    def create(cls, config: MergeConfig | None = None, preset: str | None = None, **fields: Any) -> MergeConfig:
        """Return a copy of `config` with some fields replaced.

        A new schedule field (`r`, `keep`, `flops`, `speedup`) replaces any of the four that was set; a new matcher
        resets the options of the old one.

        Args:
            config: the config to start from; `None` starts from the defaults.
            preset: name of a set of fields in `tokenmerge.PRESETS`, applied before `fields`.
            **fields: new values by field name.

        Raises:
            UnknownFieldError: (a TypeError) if a keyword is not a field.
            ConfigError: if the preset does not exist, a value is invalid, or fields contradict each other.
        """
        if preset is not None:
            if not isinstance(preset, str) or preset not in PRESETS:
                raise ConfigError(f"preset={shown(preset)}, but it must be one of {', '.join(PRESETS)}")
            fields = {**_preset_for(preset, fields), **fields}
        config = cls() if config is None else config
        if not isinstance(config, MergeConfig):
            raise ConfigError(
                f"config is {shown(config)} of type {type(config).__name__}, but it must be a MergeConfig: "
                "write patch(model, r=8) or patch(model, MergeConfig(r=8))"
            )
        for name in fields:
            _check_field(name)
        matcher = fields.get("matcher", config.matcher)
        if not isinstance(matcher, str) or matcher != config.matcher:  # (== of an array is an array)
            fields = {"options": {}, **fields}
        if any(fields.get(name) is not None for name in SCHEDULE_FIELDS):
            fields = {**dict.fromkeys(SCHEDULE_FIELDS), **fields}
        return dataclasses.replace(config, **fields)

    @property
    def traces(self) -> bool:
        """Whether merges are recorded in a trace."""
        return self.trace is not False

    @property
    def looks(self) -> bool:
        """Whether a trace includes attention."""
        return self.trace in ("attention", "rollout")

    @property
    def rolls_out(self) -> bool:
        """Whether a trace includes attention rollout."""
        return self.trace == "rollout"

    @property
    def scheduled(self) -> bool:
        """Whether a schedule field (`r`, `keep`, `flops` or `speedup`) is set."""
        return any(getattr(self, name) is not None for name in SCHEDULE_FIELDS)

    def changed(self, group: str | None = None) -> dict[str, Any]:
        """Return the fields that differ from their defaults, by name; only those of `group` if one is given."""
        usual = MergeConfig()
        names = [name for name in FIELDS if group is None or FIELDS[name].metadata["group"] == group]
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(usual, name)}

    def to_json(self) -> str:
        """Return this config as the text of one JSON object; a pair `(r, inflect)` becomes `{"r": …, "inflect": …}`, other tuples lists.

        Raises:
            ConfigError: if the value of an option cannot be written as JSON.
        """
        fields = {name: thawed(getattr(self, name)) for name in FIELDS}
        if isinstance(self.r, tuple):
            fields["r"] = {"r": self.r[0], "inflect": self.r[1]}
        try:
            check_keys(fields["options"])
            return json.dumps(fields, allow_nan=False)
        except (TypeError, ValueError) as error:  # ValueError: NaN or an infinity
            raise ConfigError(
                f"options={shown(self.options)} cannot be written as JSON ({error}): use numbers, text and lists"
            ) from None

    def save(self, path: Path | str) -> None:
        """Write this config to a JSON file, whole or not at all; raise `InputError` if it cannot be written."""
        write_json(path, json.loads(self.to_json()), "the config")

    @classmethod
    def load(cls, path: Path | str) -> MergeConfig:
        """Return the config in a JSON file, as `save`, `tokenmerge search` and `tokenmerge.save` write it; see `from_json`."""
        return cls.from_json(read_text(path, "the config"))

    @classmethod
    def from_json(cls, text: str | Path) -> MergeConfig:
        """Return the config that `to_json` or `save` wrote; fields that are absent get their defaults.

        Args:
            text: the JSON text, or the path of a file (a `Path`, or a name that ends in .json).

        Raises:
            ConfigError: if the text is not a JSON object or contains an invalid value.
            InputError: if the file cannot be read.
            UnknownFieldError: (a TypeError) if a key is not a field.
        """
        if isinstance(text, Path) or (isinstance(text, str) and text.endswith(".json")):
            return cls.load(text)
        try:
            fields = parse_json(text, "the config")
        except InputError as error:
            raise ConfigError(f"{error}, where a JSON object was expected") from None
        if not isinstance(fields, dict):
            raise ConfigError(
                f'the config is a JSON {type(fields).__name__}, but an object was expected: write {{"r": 8}}'
            )
        if isinstance(fields.get("r"), dict):
            pair = fields["r"]
            if set(pair) != {"r", "inflect"}:
                raise ConfigError(f"r={shown(pair)}, but as an object it must hold exactly 'r' and 'inflect'")
            fields["r"] = (pair["r"], pair["inflect"])
        for name in fields:
            _check_field(name)
        return cls.create(**fields)


def _check_field(name: Any) -> None:
    if name not in FIELDS:
        raise UnknownFieldError(
            f"{shown(name)} is no field of MergeConfig, which has {', '.join(FIELDS)}: {one_of(name, FIELDS)}"
        )


def _preset_for(preset: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a preset, without those of the preset's matcher if `fields` selects another matcher."""
    found = dict(PRESETS[preset])
    usual = found.get("matcher", FIELDS["matcher"].default)
    if fields.get("matcher", usual) is not usual and fields.get("matcher") != usual:
        found = {
            name: value
            for name, value in found.items()
            if name != "options" and not FIELDS[name].metadata["by_matcher"]
        }
    return found


FIELDS = {field.name: field for field in dataclasses.fields(MergeConfig)}
SCHEDULE_FIELDS = tuple(name for name, field in FIELDS.items() if field.metadata["group"] == "schedule")
_TYPES = typing.get_type_hints(MergeConfig)


def choices_of(name: str) -> tuple[Any, ...]:
    """Return the allowed values of a field, such as `("cosine", "dot", …)`; empty if the field is no choice from a list.

    Raises:
        UnknownFieldError: (a TypeError) if there is no such field.
    """
    _check_field(name)
    return _choices(_TYPES[name])


def _choices(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    parts = typing.get_args(hint)
    if not any(typing.get_origin(part) is Literal for part in parts):
        return ()
    return tuple(choice for part in parts for choice in ((True, False) if part is bool else _choices(part)))


def help_of(name: str) -> str:
    """Return the help text of a field, one sentence."""
    return str(FIELDS[name].metadata["help"])


CHOICES = tuple(name for name in FIELDS if choices_of(name))
"""Names of the fields whose value is a choice from a list."""
