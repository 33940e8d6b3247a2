"""Bipartite matching with costs from sizes, class attention and token features (`informed`), or with thresholds."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from torch import Tensor

from tokenmerge.config import Partition
from tokenmerge.errors import ConfigError
from tokenmerge.matching.distances import similarities
from tokenmerge.matching.partitions import first_of_sets, partition_order
from tokenmerge.matching.registry import register_matcher
from tokenmerge.matching.values import AtLeast, PerBlock, Within
from tokenmerge.ops.basics import ascending_order, counting, descending_order, is_exporting, marked, no_autocast, unit
from tokenmerge.plan import MergePlan
from tokenmerge.schedule import max_merges

Rows = Tensor | slice
SizePenalty = Literal["none", "harmonic", "sqrt_harmonic", "source", "sqrt_source"]


def _sides(order: Tensor | None, tokens: int, protected: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions of sets A and B, `[|A|]` and `[|B|]` int64, by alternation in `order` (`None`: token order)."""
    order = counting(tokens, device) if order is None else order
    first_a, first_b = first_of_sets(protected)
    return order[first_a::2], order[first_b::2]


def _penalty(size: Tensor, a: Tensor, b: Tensor, kind: str) -> Tensor:
    """Return the size penalty, a factor on the cost of merging A and B tokens; `[B, |A|, |B|]` or `[B, |A|, 1]`."""
    of_a, of_b = size[:, a].unsqueeze(2), size[:, b].unsqueeze(1)
    if kind in ("source", "sqrt_source"):
        return of_a if kind == "source" else of_a.sqrt()
    harmonic = 2 * of_a * of_b / (of_a + of_b).clamp_min(1e-12)
    return harmonic if kind == "harmonic" else harmonic.sqrt()


def _scores(metric: Tensor, tokens: Tensor | None, a: Rows, b: Rows, weight: float) -> tuple[Tensor, Tensor | float]:
    """Compute the cost of merging each pair, before size penalties, as `start − scores`.

    The cost is `(1 − weight)·(1 − cos) + weight·d²`, where d² is the squared distance of the tokens divided by twice their
    mean squared length (about 1 for unrelated tokens). Both parts are matrix products. Terms that are constant along a row
    are left to `start`, so that they need no pass over all pairs.

    Args:
        metric: `[B, N, D]`, floating.
        tokens: `[B, N, C]`, or `None` for a cost from the metric alone.
        a: rows of set A.
        b: rows of set B.
        weight: share of d² in the cost, in [0, 1].

    Returns:
        `scores` `[B, |A|, |B|]` float32, and `start`, `[B, |A|]` or a number.
    """
    keys = unit(metric)
    columns = keys[:, b].transpose(1, 2)
    if not weight or tokens is None:
        return torch.bmm(keys[:, a], columns), 1.0
    x = tokens.detach().float()
    x_a, x_b = x[:, a], x[:, b]
    of_a, of_b = x_a.square().sum(dim=2), x_b.square().sum(dim=2)
    count = of_a.shape[1] + of_b.shape[1]
    scale = weight * count / (of_a.sum(dim=1, keepdim=True) + of_b.sum(dim=1, keepdim=True)).clamp_min(1e-12)
    scores = torch.baddbmm((of_b * scale * -0.5).unsqueeze(1), keys[:, a], columns, alpha=1 - weight)
    scores = torch.baddbmm(scores, x_a * scale.unsqueeze(2), x_b.transpose(1, 2))
    return scores, 1 - weight + 0.5 * of_a * scale


@register_matcher("informed")
def informed_matching(
    metric: Tensor,
    r: int,
    protected: int = 0,
    size: Tensor | None = None,
    attention: Tensor | None = None,
    tokens: Tensor | None = None,
    partition: Partition = "alternating",
    grid: tuple[int, ...] | None = None,
    layer: int = 0,
    size_penalty: SizePenalty = "none",
    attention_power: Annotated[float, AtLeast(0)] = 0.5,
    attention_from: Annotated[int, AtLeast(0)] = 0,
    token_weight: Annotated[float, Within(0, 1)] = 0.0,
) -> MergePlan:
    """Match A with B by a cost: `(1 − cos) · size penalty · (class attention of the A token) ^ attention_power`.

    The r edges of lowest cost merge. Tokens with much class attention, or large ones under a `size_penalty`, cost more
    and therefore merge later. The preset "accurate" uses this matcher.

    Args:
        metric: `[B, N, D]`, floating: keys averaged over heads.
        r: tokens to merge away.
        protected: leading tokens that never merge.
        size: patches per token `[B, N]`.
        attention: attention of the class token to each token `[B, N]`.
        tokens: the tokens `[B, N, C]`.
        partition: how tokens are divided into A and B; see `partition_order`.
        grid: patches along each axis.
        layer: index of the block.
        size_penalty: factor for sizes nᵢ (A) and nⱼ (B): "none"; "harmonic", `2 nᵢnⱼ / (nᵢ + nⱼ)`; "source", `nᵢ`; or the
            square root of either ("sqrt_harmonic", "sqrt_source").
        attention_power: exponent of the class attention; 0 ignores attention.
        attention_from: index of the first block that uses class attention, which is less informative in early blocks.
        token_weight: share of the cost, in [0, 1], that is the squared distance of the tokens in place of 1 − cos.
    """
    batch, count, _ = metric.shape
    order = partition_order(partition, count, protected, grid, layer, metric.device)
    a, b = _sides(order, count, protected, metric.device)
    rows = tuple(slice(first, None, 2) for first in first_of_sets(protected))
    with no_autocast(metric.device.type):
        left, right = rows if order is None else (a, b)
        scores, start = _scores(metric, tokens, left, right, token_weight)
    if size is not None and size_penalty in ("harmonic", "sqrt_harmonic"):  # only these penalties vary along a row
        start = start.unsqueeze(2) if isinstance(start, Tensor) else start
        best, partner = ((start - scores).clamp_min(0.0) * _penalty(size, a, b, size_penalty)).min(dim=2)
    else:
        nearest, partner = scores.max(dim=2)
        best = (start - nearest).clamp_min(0.0)
        if size is not None and size_penalty != "none":
            best = best * _penalty(size, a, b, size_penalty).squeeze(2)
    if attention is not None and attention_power and layer >= attention_from:
        looked_at = attention[:, a] * (count - protected)  # about 1, so that its powers are, too
        best = best * looked_at.clamp_min(1e-6).pow(attention_power)
    order = ascending_order(best)[:, :r]
    return _in_partition(a, b, order, partner.gather(1, order), protected, batch)


def _in_partition(a: Tensor, b: Tensor, going: Tensor, partner: Tensor, protected: int, batch: int) -> MergePlan:
    """Return a plan with tokens ordered as by `bipartite_matching`: protected tokens, unmerged A tokens, B tokens.

    Args:
        a: positions of set A `[|A|]` int64.
        b: positions of set B `[|B|]` int64.
        going: indices into A of the tokens that merge away, `[B, r]` int64.
        partner: indices into B of the tokens that they join, `[B, r]` int64.
        protected: leading tokens that never merge.
        batch: B.
    """
    left = ascending_order(marked(going, a.shape[0]).to(torch.int64))[:, : a.shape[0] - going.shape[1]]
    prefix = counting(protected, a.device).expand(batch, -1)
    kept = torch.cat([prefix, a[left], b.expand(batch, -1)], dim=1)
    return MergePlan(kept, a[going], partner + (kept.shape[1] - b.shape[0]))


class _Collecting(threading.local):
    """Thread-local holder of the edges collected for calibration, by block; `None` while nothing is collected."""

    def __init__(self) -> None:
        # set in every thread from the start: Dynamo would guard on whether the attribute exists
        self.edges: dict[int, list[tuple[Tensor, int]]] | None = None


_collecting = _Collecting()


@contextlib.contextmanager
def collecting_edges() -> Iterator[dict[int, list[tuple[Tensor, int]]]]:
    """Collect, by block, the similarity of every best edge `[B, |A|]` and the r of each call of `threshold_matching`."""
    before, _collecting.edges = _collecting.edges, {}
    try:
        yield _collecting.edges
    finally:
        _collecting.edges = before


@register_matcher("threshold", adaptive=True)
def threshold_matching(
    metric: Tensor,
    r: int,
    protected: int = 0,
    layer: int = 0,
    thresholds: Annotated[list[float], PerBlock()] | None = None,
) -> MergePlan:
    """Merge every A token whose similarity to its best B token exceeds the threshold of the block (DyMU, LTMP).

    `tokenmerge.calibrate` finds the thresholds at which r tokens merge on average; without thresholds, r tokens merge in
    every image. All images of a batch must keep the same number of tokens, so each merges the batch's mean number. With
    single images, or images of similar content (`tokenmerge.tools.buckets`), that is about each image's own number.

    Args:
        metric: `[B, N, D]`, floating.
        r: tokens to merge away if there are no thresholds.
        protected: leading tokens that never merge.
        layer: index of the block.
        thresholds: cosine similarity above which tokens merge, one per block.
    """
    batch, count, _ = metric.shape
    a, b = _sides(None, count, protected, metric.device)
    most = max_merges(count, protected)
    best, partner = similarities(metric[:, a], metric[:, b]).max(dim=2) if most else (metric[:, :0, 0], None)
    if _collecting.edges is not None:
        _collecting.edges.setdefault(layer, []).append((best, r))
    if thresholds and is_exporting():
        raise ConfigError(
            "matcher 'threshold' leaves a number of tokens that depends on the images, but exported programs have static shapes: "
            "export without thresholds, or choose another matcher"
        )
    if thresholds:
        r = round(float((best > thresholds[layer]).sum()) / batch)
    r = min(r, most)
    if r == 0 or partner is None:
        return MergePlan.identity(batch, count, metric.device)
    order = descending_order(best)[:, :r]
    return _in_partition(a, b, order, partner.gather(1, order), protected, batch)
