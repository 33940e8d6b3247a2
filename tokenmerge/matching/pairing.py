"""Matchers on the complete graph of tokens: greedy matching, mutual nearest neighbours, PiToMe, strided destinations."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from tokenmerge.matching.joining import join, join_nearest, lowest
from tokenmerge.matching.registry import needed, needed_grid, register_matcher
from tokenmerge.matching.values import AtLeast, Within
from tokenmerge.ops.basics import counting, descending_order, is_exporting, take_rows, unit
from tokenmerge.plan import MergePlan


def _similarities(metric: Tensor, protected: int) -> Tensor:
    """Compute cosine similarities `[B, N, N]` float32, with −inf on the diagonal and for protected tokens."""
    x = unit(metric)
    similarity = x @ x.transpose(1, 2)
    position = counting(x.shape[1], x.device)
    closed = torch.logical_or(position < protected, position == position.unsqueeze(1))
    return similarity.masked_fill(torch.logical_or(closed, (position < protected).unsqueeze(1)), -torch.inf)


@register_matcher("greedy", most="all but one")
def greedy_matching(metric: Tensor, r: int, protected: int = 0, size: Tensor | None = None) -> MergePlan:
    """Merge the most similar pair of all tokens, r times (paper, table 2).

    The metric of a merged token is the size-weighted mean of its members. Bipartite matching approximates this matcher,
    which is slow because its r rounds run one after the other, each over all pairs.

    Args:
        metric: `[B, N, D]`, floating.
        r: tokens to merge away.
        protected: leading tokens that never merge.
        size: patches per token `[B, N]`; `None` means 1 for every token.
    """
    batch, tokens, _ = metric.shape
    similarity = _similarities(metric, protected)
    mean = metric.float()
    weight = torch.ones(batch, tokens, device=metric.device) if size is None else size.float()
    position = counting(tokens, metric.device)
    into = position.expand(batch, -1)
    closed = (position < protected).expand(batch, -1)
    gone = torch.zeros(batch, tokens, dtype=torch.bool, device=metric.device)
    for _ in range(r):
        of_rows, columns = similarity.max(dim=2)
        first = of_rows.argmax(dim=1, keepdim=True)
        second = columns.gather(1, first)
        stays, goes = torch.minimum(first, second), torch.maximum(first, second)  # [B, 1]
        total = weight.gather(1, stays) + weight.gather(1, goes)
        share = (weight.gather(1, goes) / total.clamp_min(1e-12)).unsqueeze(2)
        own, other = take_rows(mean, stays), take_rows(mean, goes)
        merged = own + share * (other - own)  # [B, 1, D]
        # masks rather than writes to single places, which not every exporter knows
        is_staying, is_going = position == stays, position == goes
        mean = torch.where(is_staying.unsqueeze(2), merged, mean)
        weight = torch.where(is_staying, total, weight)
        gone = torch.logical_or(gone, is_going)
        into = torch.where(into == goes, stays, into)
        new = torch.nn.functional.cosine_similarity(mean, merged, dim=2, eps=1e-12)
        new = new.masked_fill(torch.logical_or(torch.logical_or(gone, closed), is_staying), -torch.inf)
        similarity = torch.where(is_staying.unsqueeze(2), new.unsqueeze(1), similarity)
        similarity = torch.where(is_staying.unsqueeze(1), new.unsqueeze(2), similarity)
        similarity = similarity.masked_fill(torch.logical_or(is_going.unsqueeze(2), is_going.unsqueeze(1)), -torch.inf)
    source = descending_order(gone.to(torch.int64))[:, :r]
    return join(source, into.gather(1, source), tokens)


@register_matcher("mutual")
def mutual_matching(metric: Tensor, r: int, protected: int = 0) -> MergePlan:
    """Merge pairs of tokens that are each other's nearest neighbour (MPM), the most similar pairs first.

    If there are fewer than r such pairs, other tokens merge as well, those with the most similar neighbour first. Each
    source joins the most similar token that remains.

    Args:
        metric: `[B, N, D]`, floating.
        r: tokens to merge away.
        protected: leading tokens that never merge.
    """
    batch, tokens, _ = metric.shape
    similarity = _similarities(metric, protected)
    best, partner = similarity.max(dim=2)
    position = counting(tokens, metric.device).expand(batch, -1)
    mutual = torch.logical_and(partner.gather(1, partner) == position, best > -torch.inf)
    second = torch.logical_and(mutual, position > partner)  # the later token of a pair joins the earlier one
    first = torch.logical_and(mutual, torch.logical_not(second))
    # sources: later tokens of pairs, then tokens of no pair, then earlier tokens of pairs
    score = -best - 4.0 * second + 4.0 * first
    source = lowest(score, r, protected)
    return join_nearest(similarity, source, protected)


@register_matcher("pitome")
def energy_matching(
    metric: Tensor,
    r: int,
    protected: int = 0,
    layer: int = 0,
    layers: int = 12,
    margin: Annotated[float, Within(-1, 1)] = 0.9,
    alpha: Annotated[float, AtLeast(0)] = 1.0,
) -> MergePlan:
    """Merge among the 2r tokens of highest energy, which have many similar tokens (PiToMe); protect all others.

    The energy of a token is the mean, over all unprotected tokens, of its cosine similarity where that is at least a
    margin, and of `α·(exp(cos − margin) − 1)` below it. The margin falls linearly with depth from `margin` to 0. By descending energy,
    every second of the 2r tokens joins the most similar one of the others.

    Args:
        metric: `[B, N, D]`, floating.
        r: tokens to merge away.
        protected: leading tokens that never merge.
        layer: index of the block.
        layers: number of blocks.
        margin: margin in the first block.
        alpha: α, the weight of similarities below the margin.
    """
    tokens = metric.shape[1]
    x = unit(metric)
    similarity = x @ x.transpose(1, 2)
    at = margin * (1 - layer / layers)
    deficit = similarity - at
    below = alpha * (deficit.exp() - 1 if is_exporting() else deficit.expm1())  # the older ONNX exporter lacks expm1
    energy = torch.where(similarity >= at, similarity, below)[:, :, protected:].mean(dim=2)
    eligible = lowest(-energy, 2 * r, protected)
    source, open_to = eligible[:, ::2], eligible[:, 1::2]
    rows = similarity.gather(1, source.unsqueeze(2).expand(-1, -1, tokens))
    between = rows.gather(2, open_to.unsqueeze(1).expand(-1, r, -1))
    return join(source, open_to.gather(1, between.argmax(dim=2)), tokens)


@register_matcher("strided", most="all but one")
def strided_matching(
    metric: Tensor,
    r: int,
    protected: int = 0,
    anchor: Tensor | None = None,
    grid: tuple[int, ...] | None = None,
    stride: Annotated[int, AtLeast(1)] = 2,
) -> MergePlan:
    """Merge tokens into destinations on a coarse grid, one in each stride × stride patches (tomesd).

    Destinations do not merge away. When fewer than r other tokens are left, the stride doubles.

    Args:
        metric: `[B, N, D]`, floating.
        r: tokens to merge away.
        protected: leading tokens that never merge.
        anchor: original token at whose position each token is, `[B, N]` int64.
        grid: patches along each axis, `(h, w)` or `(t, h, w)`.
        stride: distance between destinations in patches, along both axes of the image.

    Raises:
        InputError: if `anchor` or `grid` is missing, or the grid does not hold all tokens.
    """
    batch, tokens, _ = metric.shape
    anchor, grid = needed(anchor, "anchor", "strided"), needed_grid(grid, tokens - protected, "strided")
    rows, columns = grid[-2:]
    frames = math.prod(grid[:-2])
    while tokens - protected - frames * -(-rows // stride) * -(-columns // stride) < r:
        if stride >= max(rows, columns):  # one destination per frame is still too many
            frames = 1
        stride *= 2
    index = torch.arange(math.prod(grid), device=metric.device)
    on_grid = torch.logical_and(index // columns % rows % stride == 0, index % columns % stride == 0)
    on_grid = torch.logical_and(on_grid, index < frames * rows * columns)
    # numbers rather than booleans, because not every exporter pads or gathers those
    stands_on = torch.cat([index.new_zeros(protected), on_grid.to(torch.int64)]).expand(batch, -1)
    fixed = stands_on.gather(1, anchor) > 0
    similarity = _similarities(metric, protected).masked_fill(torch.logical_not(fixed).unsqueeze(1), -torch.inf)
    best, partner = similarity.max(dim=2)
    best = best.nan_to_num(-1.0)  # else NaN of a broken image would sort after destinations, which must not be sources
    source = lowest((-best).masked_fill(fixed, torch.inf), r, protected)
    return join(source, partner.gather(1, source), tokens)
