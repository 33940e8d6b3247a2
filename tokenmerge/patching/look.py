"""What is kept of a traced pass for looking at; nothing is computed from it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from tokenmerge.attention.tap import Tap, attention_maps, class_attention
from tokenmerge.ops.basics import take_rows, unit
from tokenmerge.ops.combine import merge_rows
from tokenmerge.patching.state import TokenState, attach
from tokenmerge.plan import MergePlan


class Look(NamedTuple):
    """What one block's attention looked at.

    Attributes:
        attention: of the class token to the tokens in attention, `[B, N]` float32; without a class token, of all tokens.
        rollout: `[B, N, N0]` float32: of each token in attention to the original tokens, through all blocks so far.
    """

    attention: Tensor
    rollout: Tensor | None


def look_at(tap: Tap, state: TokenState) -> Look | None:
    """What the attention that a tap has seen looked at; `None` where attention cannot be looked into."""
    if tap.inside is None:
        return None
    settings = state.run.settings
    query, key, _, scale = tap.inside
    query, key = query.detach(), key.detach()
    size = state.size if settings.prop_attn or state.size is None else (state.size > 0).float()
    attention = class_attention(query, key, scale, size, settings.class_token)
    if not settings.config.rolls_out:
        return Look(attention, None)
    maps = attention_maps(query, key, scale, size)
    before = state.rollout
    if before is None:
        before = torch.eye(state.run.tokens, device=maps.device).expand(maps.shape[0], -1, -1)
    if before.shape[1] != maps.shape[1]:  # tokens have merged before attention
        before = _merged(before, state)
    # half of what leaves the block came through attention, half through the residual (Abnar & Zuidema 2020)
    return Look(attention, 0.5 * (maps @ before + before))


def kept_for_looking(state: TokenState, look: Look | None) -> TokenState:
    """The state that leaves a block, with what its step looked at."""
    step = dataclasses.replace(state.steps[-1], size=state.size, attention=None if look is None else look.attention)
    rollout = None if look is None else look.rollout
    if rollout is not None and step.plan is not None and rollout.shape[1] != step.plan.tokens_out:
        rollout = _merged(rollout, state)
    return dataclasses.replace(state, steps=(*state.steps[:-1], step), rollout=rollout)


def _merged(rows: Tensor, state: TokenState) -> Tensor:
    """`[B, N, N0]` -> `[B, N', N0]`: rows of tokens that the latest step made one, their mean weighted by size."""
    plan = state.steps[-1].plan
    assert plan is not None
    return merge_rows(rows, state.steps[-2].size if len(state.steps) > 1 else state.run.first_size, plan).x


def mark_gradient(x: Tensor, state: TokenState) -> None:
    """Let the gradient of `x`, when it comes, carry the state of `x`: tools for heat maps lay both out on the grid."""
    shared = dataclasses.replace(state, shared=state.merged is None)

    def mark(gradient: Tensor) -> None:
        attach(gradient, shared)

    x.register_hook(mark)


def similarity_of(metric: Tensor, plan: MergePlan) -> Tensor:
    """`[B, r]` float32: cosine of the metric of each token that merged and of the token it joined; NaN if it was dropped."""
    metric = metric.detach()
    units = unit(metric.sum(dim=1) if metric.dim() == 4 else metric)
    joined = plan.kept.gather(1, plan.target.clamp_min(0))
    similarity = (take_rows(units, plan.source) * take_rows(units, joined)).sum(dim=2)
    return similarity.masked_fill(plan.target < 0, torch.nan)
