"""Attention, rollout and similarities that a traced pass records for display; no result depends on them."""

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
    """Attention recorded in one block.

    Attributes:
        attention: `[B, N]` float32: attention from the class token to each token; without a class token, from all tokens.
        rollout: `[B, N, N₀]` float32: attention rollout from each token to the original tokens, through all blocks so far.
    """

    attention: Tensor
    rollout: Tensor | None


def look_at(tap: Tap, state: TokenState) -> Look | None:
    """Return the attention that a tap has seen; `None` if the attention shows no Q, K and V."""
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
    if before.shape[1] != maps.shape[1]:  # place="before": tokens merged before attention
        before = _merged(before, state)
    # rollout counts attention and the residual connection as half each (Abnar & Zuidema 2020, arXiv 2005.00928)
    return Look(attention, 0.5 * (maps @ before + before))


def kept_for_looking(state: TokenState, look: Look | None) -> TokenState:
    """Return the state that leaves a block, with the sizes and the attention of the block's step recorded."""
    step = dataclasses.replace(state.steps[-1], size=state.size, attention=None if look is None else look.attention)
    rollout = None if look is None else look.rollout
    if rollout is not None and step.plan is not None and rollout.shape[1] != step.plan.tokens_out:
        rollout = _merged(rollout, state)
    return dataclasses.replace(state, steps=(*state.steps[:-1], step), rollout=rollout)


def _merged(rows: Tensor, state: TokenState) -> Tensor:
    """Merge `rows [B, N, N₀]` like the tokens of the latest step, by their size-weighted mean: `[B, N', N₀]`."""
    plan = state.steps[-1].plan
    assert plan is not None
    return merge_rows(rows, state.steps[-2].size if len(state.steps) > 1 else state.run.first_size, plan).x


def mark_gradient(x: Tensor, state: TokenState) -> None:
    """Make the gradient of `x` carry the state of `x`, so that tools for heat maps can place both on the grid."""
    shared = dataclasses.replace(state, shared=state.merged is None)

    def mark(gradient: Tensor) -> None:
        attach(gradient, shared)

    x.register_hook(mark)


def similarity_of(metric: Tensor, plan: MergePlan) -> Tensor:
    """Return the cosine similarity of each merged token to the token it joined.

    Args:
        metric: `[B, N, D]` or `[B, H, N, D]`, any floating dtype.
        plan: the merge.

    Returns:
        `[B, r]` float32; NaN for dropped tokens.
    """
    metric = metric.detach()
    units = unit(metric.sum(dim=1) if metric.dim() == 4 else metric)
    joined = plan.kept.gather(1, plan.target.clamp_min(0))
    similarity = (take_rows(units, plan.source) * take_rows(units, joined)).sum(dim=2)
    return similarity.masked_fill(plan.target < 0, torch.nan)
