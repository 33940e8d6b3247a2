"""Pruning: tokens that are dropped, or fused into one (paper, table 2; EViT; ATS)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from tokenmerge.matching.distances import similarities
from tokenmerge.matching.joining import drop, join, lowest, rest_of
from tokenmerge.matching.partitions import shuffled
from tokenmerge.matching.registry import needed, register_matcher
from tokenmerge.matching.values import PerBlock, Within
from tokenmerge.plan import MergePlan


@register_matcher("random_prune", most="all but one")
def random_pruning(
    metric: Tensor, r: int, protected: int = 0, layer: int = 0, seed: Annotated[int, Within(0, 2**31)] = 0
) -> MergePlan:
    """Drop r tokens at random: what any other method must beat. The same for every image and in every pass."""
    batch, tokens, _ = metric.shape
    drawn = shuffled(tokens - protected, 1000 * seed + layer, metric.device)[:r] + protected
    return drop(drawn.expand(batch, -1), tokens)


@register_matcher("attention_prune", most="all but one")
def attention_pruning(metric: Tensor, r: int, protected: int = 0, attention: Tensor | None = None) -> MergePlan:
    """Drop the r tokens that the class token attends to least (EViT without its fused token)."""
    attention = needed(attention, "attention", "attention_prune")
    return drop(lowest(attention, r, protected), metric.shape[1])


@register_matcher("evit", most="all but one")
def attention_fusing(metric: Tensor, r: int, protected: int = 0, attention: Tensor | None = None) -> MergePlan:
    """Fuse the r + 1 tokens that the class token attends to least into one, weighted by that attention (EViT).

    So N − r tokens are left, one of them the fused one (EViT leaves N − r and the fused one, and does not divide its
    sum by the weights). It is last, and an ordinary token for the next block.
    """
    tokens = metric.shape[1]
    attention = needed(attention, "attention", "evit")
    going = lowest(attention, r + 1, protected)
    source, fused = going[:, :-1], going[:, -1:]
    kept = torch.cat([rest_of(going, tokens), fused], dim=1)
    return MergePlan(kept, source, torch.full_like(source, kept.shape[1] - 1), weight=attention)


@register_matcher("ats", most="all but one")
def adaptive_token_sampling(
    metric: Tensor, r: int, protected: int = 0, attention: Tensor | None = None, values: Tensor | None = None
) -> MergePlan:
    """Sample N − r tokens by inverse transform of class attention times the length of V (ATS); drop the others.

    ATS keeps fewer where one token is drawn twice; here the most significant others fill up, so that batches stay dense.
    """
    tokens = metric.shape[1]
    attention, values = needed(attention, "attention", "ats"), needed(values, "values", "ats")
    significance = attention * values.float().square().sum(dim=3).sqrt().mean(dim=1)
    significance = significance[:, protected:]
    share = significance / significance.sum(dim=1, keepdim=True).clamp_min(1e-12)
    count = tokens - protected - r
    quantile = (torch.arange(count, device=metric.device) + 0.5) / count
    drawn = torch.searchsorted(share.cumsum(dim=1), quantile.expand(len(share), -1).contiguous())
    drawn = drawn.clamp_max(share.shape[1] - 1)
    # drawn ones rank above all others, and among each kind the more significant ones
    score = share + torch.zeros_like(share).scatter_(1, drawn, 2.0)
    full = torch.nn.functional.pad(score, (protected, 0), value=4.0)
    return drop(lowest(full, r, protected), tokens)


@register_matcher("diffrate", most="all but one")
def prune_then_merge(
    metric: Tensor,
    r: int,
    protected: int = 0,
    attention: Tensor | None = None,
    layer: int = 0,
    pruned: Annotated[float, Within(0, 1)] | Annotated[list[Annotated[float, Within(0, 1)]], PerBlock()] = 0.5,
) -> MergePlan:
    """Of the r tokens that the class token attends to least, drop the last part and merge the rest (DiffRate).

    Those that merge join the most similar token that stays. `pruned` is the part of r that is dropped, the same in every
    block or one for each (`tokenmerge.diffrate_schedule` reads them from DiffRate's own files).
    """
    batch, tokens, _ = metric.shape
    count = round((pruned[layer] if isinstance(pruned, list) else pruned) * r)
    going = lowest(needed(attention, "attention", "diffrate"), r, protected)
    merged = going[:, count:]
    similarity = similarities(metric, metric).gather(1, merged.unsqueeze(2).expand(-1, -1, tokens))
    closed = torch.zeros(batch, tokens, dtype=torch.bool, device=metric.device).scatter_(1, going, True)
    closed[:, :protected] = True
    nearest = similarity.masked_fill(closed.unsqueeze(1), -torch.inf).argmax(dim=2)
    # what is dropped joins anything first, and is then marked
    joined = torch.cat([rest_of(going, tokens)[:, -1:].expand(-1, count), nearest], dim=1)
    plan = join(going, joined, tokens)
    target = plan.target.clone()
    target[:, :count] = -1
    return MergePlan(plan.kept, plan.source, target, drops=count > 0)
