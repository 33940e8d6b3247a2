"""How one block decides what merges: which metric, which matcher, and what that matcher asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenmerge.attention.tap import Noted, class_attention
from tokenmerge.config import MergeConfig
from tokenmerge.errors import ConfigError, PatchError
from tokenmerge.matching import Entry, check_options, get_entry
from tokenmerge.matching.distances import unit
from tokenmerge.ops import Backend, counting
from tokenmerge.ops.exporting import is_exporting
from tokenmerge.patching.families.family import BlockFamily
from tokenmerge.patching.masks import apart_from_padding
from tokenmerge.patching.state import TokenState
from tokenmerge.plan import MergePlan, take_rows

_FROM_ATTENTION = ("q", "v", "kv")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the config says of matching, for one block.

    Attributes:
        family: seams of upstream's block.
        matcher: name of the matching algorithm.
        metric: what it compares (`MergeConfig.metric`).
        concat: whether heads are concatenated, not averaged.
        distance: how it compares.
        partition: sides of a bipartite matching.
        options: further arguments of the matcher.
        backend: what runs it.
        layer: position of the block in the model.
        layers: how many blocks there are.
        grid: patches along each axis at the model's own input size.
        class_token: whether the first prefix token is a class token.
        trace: whether the block notes how similar the tokens were that it merged.
    """

    family: BlockFamily
    matcher: str
    metric: str
    concat: bool
    distance: str
    partition: str
    options: Mapping[str, Any]
    backend: Backend
    layer: int
    layers: int
    grid: tuple[int, ...] | None
    class_token: bool
    trace: bool = False
    entry: Entry = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "entry", get_entry(self.matcher))

    @property
    def looks_inside(self) -> bool:
        """Whether Q, K and V must be noted as attention uses them."""
        wanted = self.entry.offered
        return self.metric in _FROM_ATTENTION or (self.concat and self.metric == "k") or bool(wanted & _INSIDE)

    @property
    def needs_plans(self) -> bool:
        """Whether the matcher wants to know where tokens came from."""
        return "anchor" in self.entry.offered

    def __reduce__(self) -> tuple[Any, ...]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        return _remade, (values,)  # the entry holds a function: found again by its name


PREDICTOR = "tokenmerge_predictor"
"""A block's attribute for what a learned matcher works with."""
_INSIDE = frozenset({"attention", "values"})


def _remade(values: dict[str, Any]) -> Rule:
    return Rule(**values)


def check_rule(config: MergeConfig) -> None:
    """Raise `ConfigError` unless the matcher can do what the config says of matching."""
    entry = get_entry(config.matcher)
    check_options(config.matcher, config.options)
    for name, usual in (("distance", "cosine"), ("partition", "alternating")):
        value = getattr(config, name)
        if value != usual and name not in entry.offered:
            raise ConfigError(f"{name}={value!r} means nothing to matcher {config.matcher!r}: leave it at {usual!r}")
    if config.place == "before":
        if config.metric != "x_pre":
            raise ConfigError(
                f"place='before' merges before attention has made {config.metric!r}: give metric='x_pre' as well"
            )
        if entry.offered & _INSIDE:
            raise ConfigError(
                f"place='before' merges before attention runs, but matcher {config.matcher!r} looks at it: use place='between'"
            )


def make_plan(
    block: Any,
    rule: Rule,
    noted: Noted,
    x_pre: Tensor | None,
    x: Tensor,
    r: int,
    protected: int,
    state: TokenState,
) -> MergePlan:
    """The matcher's plan, made sure to be what every shape after it relies on.

    Args:
        block: the block that merges.
        rule: how.
        noted: what was noted of its attention.
        x_pre: its input, if the metric is that.
        x: the tokens that will be merged.
        r: how many go.
        protected: leading tokens that never merge.
        state: where the tokens come from.

    Raises:
        PatchError: if keys were not noted, or the plan does not merge r tokens of these.
    """
    metric = _metric(block, rule, noted, x_pre, x, state)
    offered = _offered(block, rule, noted, x, state) if rule.entry.offered or rule.options else {}
    plan: MergePlan = rule.entry.matcher(metric, r, protected, **offered)
    fits = plan.keep.shape[0] == x.shape[0] and plan.tokens_in == x.shape[1]
    if not fits or (plan.r != r and not (rule.entry.adaptive or (rule.entry.learned and plan.r == 0))):
        raise PatchError(
            f"matcher {rule.matcher!r} merged {plan.r} of {plan.tokens_in} tokens in {plan.keep.shape[0]} images, but block "
            f"{rule.layer} asked for {r} of {x.shape[1]} in {x.shape[0]}: it must merge exactly r, or r must be smaller"
        )
    if rule.trace and not is_exporting():
        block._tokenmerge_similarity = _of_edges(metric, plan)
    return plan


def seen_by_class_token(rule: Rule, noted: Noted, size: Tensor | None) -> Tensor | None:
    """`[B, N]` float32, attention of the class token to each token; `None` where attention cannot be looked into.

    `size` is what weighs in it, `None` for all alike.
    """
    if noted.inside is None:
        return None
    query, key, _, scale = noted.inside
    return class_attention(query.detach(), key.detach(), scale, size, rule.class_token)


def _of_edges(metric: Tensor, plan: MergePlan) -> Tensor:
    """`[B, r]` float32: cosine of the metric of each token that merged and of the token it joined; NaN if it was dropped."""
    metric = metric.detach()
    units = unit(metric.sum(dim=1) if metric.dim() == 4 else metric)
    joined = plan.keep.gather(1, plan.target.clamp_min(0))
    similarity = (take_rows(units, plan.source) * take_rows(units, joined)).sum(dim=2)
    return similarity.masked_fill(plan.target < 0, torch.nan)


def _metric(block: Any, rule: Rule, noted: Noted, x_pre: Tensor | None, x: Tensor, state: TokenState) -> Tensor:
    family, metric = rule.family, None
    if rule.metric in ("x", "x_pre"):
        metric = x if rule.metric == "x" else x_pre
        assert metric is not None
        metric = metric.detach()
    elif rule.metric == "k" and not rule.concat:
        keys = noted.keys
        if family.keys_at_call and noted.inside is not None:
            keys = (noted.inside[1],)
        if not keys:
            raise PatchError(
                f"block {rule.layer} noted no keys, so the module that gives them was replaced since the model was patched: "
                "unpatch before changing modules, and patch again"
            )
        if "backend" in rule.entry.offered and not state.padded and family.per_head is not None:
            metric = family.per_head(block, keys)  # the matcher averages them
        if metric is None:
            metric = family.metric(block, keys)
    else:
        per_head = [_inside(rule, noted, part) for part in rule.metric]
        parts = [one.transpose(1, 2).flatten(2) if rule.concat else one.float().mean(dim=1) for one in per_head]
        metric = (
            parts[0] if len(parts) == 1 else torch.cat([unit(part) for part in parts], dim=2)
        )  # each counts for half
    if state.padded and state.size is not None:
        metric = apart_from_padding(metric, state.size)
    return metric


def _inside(rule: Rule, noted: Noted, which: str) -> Tensor:
    """Q, K or V as `[B, H, N, D]`, without gradient."""
    if noted.inside is None:
        raise PatchError(
            f"block {rule.layer} should show {which.upper()}, but its attention did not call PyTorch's "
            "scaled_dot_product_attention: switch the model to fused ('sdpa') attention, or use metric='k' and a matcher that "
            "looks at keys alone"
        )
    query, key, value, _ = noted.inside
    return {"q": query, "k": key, "v": value}[which].detach()


def _offered(block: Any, rule: Rule, noted: Noted, x: Tensor, state: TokenState) -> dict[str, Any]:
    """What the matcher asks for, by name, and its options."""
    wanted = rule.entry.offered
    given: dict[str, Any] = dict(rule.options)
    for name in wanted & {"layer", "layers", "grid", "distance", "partition", "backend"}:
        given[name] = getattr(rule, name)
    if "size" in wanted:
        given["size"] = torch.ones(x.shape[:2], device=x.device) if state.size is None else state.size
    if "tokens" in wanted:
        given["tokens"] = x.detach()
    if "predictor" in wanted:
        given["predictor"] = getattr(block, PREDICTOR, None)
    if "values" in wanted:
        given["values"] = _inside(rule, noted, "v")
    if "attention" in wanted:
        _inside(rule, noted, "q")  # or say why not
        given["attention"] = seen_by_class_token(rule, noted, state.size)
    if "anchor" in wanted:
        anchor = state.anchor()
        start = counting(x.shape[1], x.device).expand(x.shape[0], -1)
        given["anchor"] = start if anchor is None else anchor
    return given
