"""Matchers that prune: they drop tokens or fuse them into one (paper, table 2; EViT, ATS, DiffRate)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from tokenmerge.matching.distances import similarities
from tokenmerge.matching.joining import drop, join, lowest, rest_of
from tokenmerge.matching.partitions import shuffled
from tokenmerge.matching.registry import needed, register_matcher
from tokenmerge.matching.values import PerBlock, Within
from tokenmerge.ops.basics import counting, first_reaching, marked
from tokenmerge.plan import MergePlan


@register_matcher("random_prune", most="all but one")
def random_pruning(
    metric: Tensor, r: int, protected: int = 0, layer: int = 0, seed: Annotated[int, Within(0, 2**31)] = 0
) -> MergePlan:
    """Drop r random tokens, the same ones in every image and every pass; a baseline (paper, table 2).

    Args:
        metric: `[B, N, D]`; only its shape and device count.
        r: tokens to drop.
        protected: leading tokens that are never dropped.
        layer: index of the block, which selects other tokens in each block.
        seed: seed of the pseudorandom choice.
    """
    batch, tokens, _ = metric.shape
    drawn = shuffled(tokens - protected, 1000 * seed + layer, metric.device)[:r] + protected
    return drop(drawn.expand(batch, -1), tokens)


@register_matcher("attention_prune", most="all but one")
def attention_pruning(metric: Tensor, r: int, protected: int = 0, attention: Tensor | None = None) -> MergePlan:
    """Drop the r tokens with the least class attention (EViT without its fused token).

    Args:
        metric: `[B, N, D]`; only its shape counts.
        r: tokens to drop.
        protected: leading tokens that are never dropped.
        attention: attention of the class token to each token `[B, N]`.

    Raises:
        InputError: if `attention` is missing.
    """
    attention = needed(attention, "attention", "attention_prune")
    return drop(lowest(attention, r, protected), metric.shape[1])


@register_matcher("evit", most="all but one")
def attention_fusing(metric: Tensor, r: int, protected: int = 0, attention: Tensor | None = None) -> MergePlan:
    """Fuse the r + 1 tokens with the least class attention into one, weighted by that attention (EViT).

    The fused token is the last of the N − r tokens and is an ordinary token for the next block. Two things differ from
    EViT, which keeps N − r tokens besides the fused one, and does not divide the weighted sum by the weights.

    Args:
        metric: `[B, N, D]`; only its shape counts.
        r: tokens to merge away.
        protected: leading tokens that never merge.
        attention: attention of the class token to each token `[B, N]`.

    Raises:
        InputError: if `attention` is missing.
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
    """Keep N − r tokens by inverse transform sampling of class attention times the norm of V (ATS); drop the others.

    Where ATS draws a token twice, it keeps fewer tokens. Here the most significant remaining tokens fill the number up, so
    that all images of a batch keep N − r tokens.

    Args:
        metric: `[B, N, D]`; only its shape and device count.
        r: tokens to drop.
        protected: leading tokens that are never dropped.
        attention: attention of the class token to each token `[B, N]`.
        values: V `[B, H, N, D]`.

    Raises:
        InputError: if `attention` or `values` is missing.
    """
    tokens = metric.shape[1]
    attention, values = needed(attention, "attention", "ats"), needed(values, "values", "ats")
    significance = attention * values.float().square().sum(dim=3).sqrt().mean(dim=1)
    significance = significance[:, protected:]
    share = significance / significance.sum(dim=1, keepdim=True).clamp_min(1e-12)
    count = tokens - protected - r
    quantile = (torch.arange(count, device=metric.device) + 0.5) / count
    drawn = first_reaching(share.cumsum(dim=1), quantile)
    drawn = drawn.clamp_max(share.shape[1] - 1)
    # drawn tokens rank above all others, and both groups rank by significance
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
    """Drop or merge the r tokens with the least class attention (DiffRate).

    Of these r tokens, the fraction `pruned` with the least attention is dropped, and each of the others joins the most
    similar token that remains.

    Args:
        metric: `[B, N, D]`, floating.
        r: tokens to drop or merge away.
        protected: leading tokens that never merge.
        attention: attention of the class token to each token `[B, N]`.
        layer: index of the block.
        pruned: fraction of r that is dropped, one number or one per block (`tokenmerge.diffrate_schedule` reads the
            latter from DiffRate's published files).

    Raises:
        InputError: if `attention` is missing.
    """
    tokens = metric.shape[1]
    count = round((pruned[layer] if isinstance(pruned, list) else pruned) * r)
    going = lowest(needed(attention, "attention", "diffrate"), r, protected)
    merged = going[:, count:]
    similarity = similarities(metric, metric).gather(1, merged.unsqueeze(2).expand(-1, -1, tokens))
    closed = torch.logical_or(marked(going, tokens), counting(tokens, metric.device) < protected)
    nearest = similarity.masked_fill(closed.unsqueeze(1), -torch.inf).argmax(dim=2)
    # `join` needs a partner for dropped tokens, too; their targets are then replaced by −1
    joined = torch.cat([rest_of(going, tokens)[:, -1:].expand(-1, count), nearest], dim=1)
    plan = join(going, joined, tokens)
    target = plan.target.clone()
    target[:, :count] = -1
    return MergePlan(plan.kept, plan.source, target, drops=count > 0)
