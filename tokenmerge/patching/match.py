"""Metrics other than the paper's keys, tensors that matchers ask for, and checks that settings of matching fit together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenmerge.attention.tap import Tap, class_attention
from tokenmerge.config import FIELDS, SCHEDULE_FIELDS, MergeConfig
from tokenmerge.errors import ConfigError, PatchError
from tokenmerge.flops import ModelCost
from tokenmerge.matching import check_options, entry_for
from tokenmerge.matching.learned import PREDICTOR
from tokenmerge.matching.registry import Requirement
from tokenmerge.matching.values import hints_of, per_block
from tokenmerge.ops.basics import counting, unit
from tokenmerge.patching.begin import apart_from_padding
from tokenmerge.patching.record import BlockRecord
from tokenmerge.patching.state import TokenState
from tokenmerge.patching.target import Target

TENSORS = frozenset({"size", "tokens", "predictor", "carried", "values", "attention", "anchor"})
"""Parameters of matchers for which each block must compute a tensor."""
_FROM_ATTENTION = ("q", "v", "kv")


def offered_by(config: MergeConfig, layers: int) -> dict[str, Any]:
    """Return the arguments of the matcher that are the same in every block: options, config fields, and number of blocks."""
    wanted = entry_for(config).offered
    fields = {name for name, field in FIELDS.items() if field.metadata["by_matcher"]} & wanted
    given: dict[str, Any] = {**config.options, **{name: getattr(config, name) for name in fields}}
    return {**given, "layers": layers} if "layers" in wanted else given


def looks_inside(config: MergeConfig) -> bool:
    """Return whether Q, K and V must be recorded as attention uses them."""
    from_attention = config.metric in _FROM_ATTENTION or (config.heads == "concat" and config.metric == "k")
    return from_attention or entry_for(config).looks_inside


def check_matching(config: MergeConfig, layers: int | None = None) -> None:
    """Raise unless the matcher supports the config's settings of matching.

    Args:
        config: the settings.
        layers: number of blocks, if the model is known.

    Raises:
        ConfigError: if an option or a field does not fit the matcher, or the schedule merges more than it can.
    """
    entry = entry_for(config)
    check_options(entry.name, config.options, layers)
    for name, field in FIELDS.items():
        value, usual = getattr(config, name), field.default
        if field.metadata["by_matcher"] and name not in entry.offered and value != usual and name != "backend":
            raise ConfigError(f"{name}={value!r} means nothing to matcher {entry.name!r}: leave it at {usual!r}")
    if entry.most == "half":
        keep = config.keep if isinstance(config.keep, list) else [config.keep or 1]
        if min(keep, default=1) < 0.5:
            raise ConfigError(
                f"keep={config.keep!r}, but matcher {entry.name!r} merges at most half of the tokens of a block: keep 0.5 or "
                "more"
            )
    if config.place == "before" and entry.looks_inside:
        raise ConfigError(
            f"place='before' merges before attention runs, but matcher {entry.name!r} looks at it: use place='between'"
        )


def check_requirements(target: Target, config: MergeConfig, every_block: bool, proportional: bool) -> None:
    """Raise unless a model and its settings are as the matcher requires them.

    Args:
        target: the model.
        config: the settings.
        every_block: whether r is above 0 in each block.
        proportional: whether attention is proportional to sizes.

    Raises:
        ConfigError: if one of the matcher's requirements is not met; the message names all of them.
    """
    entry, pooling = entry_for(config), target.family.pooling(target.model)
    met: dict[Requirement, tuple[bool, str]] = {
        "sizes": (proportional, "its masks are token sizes, so use prop_attn=True"),
        "class token": (
            pooling == "class token",
            f"its result is the class token, but this model's head reads {pooling}, so use one that reads the class token alone",
        ),
        "after": (config.place == "after", "it looks at the output of each block, so use place='after'"),
        "every block": (every_block, "it adds up a score in every block, so give an r above 0 for each block"),
    }
    faults = [words for one in entry.requires for fine, words in [met[one]] if not fine]
    if faults:
        raise ConfigError(f"matcher {entry.name!r} cannot run with these settings: {'; '.join(faults)}")


def shortened(config: MergeConfig, layers: int) -> MergeConfig:
    """Return the config for the first `layers` blocks of a model alone: lists with one entry per block are cut to them."""
    entry = entry_for(config)
    hints = hints_of(entry.matcher)
    cut = {
        name: value[:layers] if isinstance(value, list) and name in hints and per_block(hints[name]) else value
        for name, value in config.options.items()
    }
    lists: dict[str, Any] = {"options": cut}
    for name in SCHEDULE_FIELDS:
        value = getattr(config, name)
        if isinstance(value, list):
            lists[name] = value[:layers]
    return MergeConfig.create(config, **lists)


def other_metric(config: MergeConfig) -> bool:
    """Return whether the metric differs from the paper's, K averaged over heads."""
    return config.metric != "k" or config.heads == "concat"


def cost_of(target: Target, config: MergeConfig, full_output: bool = False) -> ModelCost:
    """Return the cost of a model for one image at its own input size, with the place of merging that a config chooses.

    Args:
        target: the model.
        config: the settings.
        full_output: whether unmerged tokens leave the last block.
    """
    cost = target.cost(config.place, entry_for(config).most)
    return cost.with_full_output() if full_output else cost


def metric_from(block: Any, x: Tensor, x_pre: Tensor | None, tap: Tap, state: TokenState) -> Tensor:
    """Return the config's metric without gradient, with padding kept apart from tokens.

    Args:
        block: the patched block.
        x: tokens `[B, N, C]` at the place of merging, or the metric itself if it is the paper's.
        x_pre: tokens `[B, N, C]` that entered the block, if the metric is "x_pre".
        tap: the tap with the Q, K and V that attention used.
        state: state of the tokens.

    Returns:
        Metric `[B, N, M]`, M channels by the kind of metric (see `metric_channels`), and one more for padded inputs.
    """
    config = state.run.settings.config
    if not state.run.settings.other_metric:
        metric = x
    elif config.metric in ("x", "x_pre"):
        metric = x if config.metric == "x" or x_pre is None else x_pre
        metric = metric.detach()
    else:
        per_head = [_inside(block, tap, part) for part in config.metric]
        concat = config.heads == "concat"
        parts = [part.transpose(1, 2).flatten(2) if concat else part.float().mean(dim=1) for part in per_head]
        # normalised, so that each part of a combined metric has the same weight
        metric = parts[0] if len(parts) == 1 else torch.cat([unit(part) for part in parts], dim=2)
    if state.run.padded and state.size is not None:
        metric = apart_from_padding(metric, state.size)
    return metric


def metric_channels(config: MergeConfig, channels: int, heads: int, inside: tuple[int, int, int]) -> int:
    """Return the number of channels of a metric other than K averaged over heads.

    Args:
        config: the settings.
        channels: C, channels of a token.
        heads: H.
        inside: channels of a head of Q, K and V.
    """
    if config.metric in ("x", "x_pre"):
        return channels
    each = dict(zip("qkv", inside, strict=True))
    return sum(each[part] for part in config.metric) * (heads if config.heads == "concat" else 1)


def _inside(block: Any, tap: Tap, which: str) -> Tensor:
    """Return Q, K or V as `[B, H, N, D]`, without gradient.

    Raises:
        PatchError: if attention did not call `scaled_dot_product_attention`, whose arguments are recorded.
    """
    if tap.inside is None:
        record: BlockRecord = block._tokenmerge
        raise PatchError(
            f"block {record.index} should show {which.upper()}, but its attention did not call PyTorch's "
            "scaled_dot_product_attention: switch the model to fused ('sdpa') attention, or use metric='k' and a matcher that "
            "looks at keys alone"
        )
    query, key, value, _ = tap.inside
    return {"q": query, "k": key, "v": value}[which].detach()


def tensors_for(block: Any, x: Tensor, tap: Tap, state: TokenState) -> dict[str, Any]:
    """Return the tensors that the matcher takes, by parameter name."""
    settings = state.run.settings
    wanted = settings.entry.offered
    given: dict[str, Any] = {}
    if "size" in wanted:
        given["size"] = torch.ones(x.shape[:2], device=x.device) if state.size is None else state.size
    if "tokens" in wanted:
        given["tokens"] = x if settings.entry.learned else x.detach()  # what is learned needs the gradient
    if "predictor" in wanted:
        given["predictor"] = getattr(block, PREDICTOR, None)
    if "carried" in wanted:
        given["carried"] = state.carried
    if "values" in wanted:
        given["values"] = _inside(block, tap, "v")
    if "attention" in wanted:
        query, key = _inside(block, tap, "q"), _inside(block, tap, "k")
        scale = 1.0 if tap.inside is None else tap.inside[3]
        given["attention"] = class_attention(query, key, scale, state.size, settings.class_token)
    if "anchor" in wanted:
        anchor = state.anchor()
        start = counting(x.shape[1], x.device).expand(x.shape[0], -1)
        given["anchor"] = start if anchor is None else anchor
    return given
