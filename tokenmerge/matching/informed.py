"""Bipartite matching that looks at more than keys: sizes, class attention, the tokens themselves; and by threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmerge.matching.distances import similarities
from tokenmerge.matching.partitions import Partition, partition_order
from tokenmerge.matching.registry import check_matching_input, register_matcher
from tokenmerge.ops import counting
from tokenmerge.plan import MergePlan
from tokenmerge.schedule import max_merges

SIZE_PENALTIES = ("none", "harmonic", "sqrt_harmonic", "source", "sqrt_source")


def _sides(
    tokens: int, protected: int, partition: str, grid: tuple[int, ...] | None, layer: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Positions of side A and of side B, `[|A|]` and `[|B|]`."""
    order = partition_order(partition, tokens, protected, grid, layer, device)
    order = counting(tokens, device) if order is None else order
    return order[protected + protected % 2 :: 2], order[protected + 1 - protected % 2 :: 2]


def _penalty(size: Tensor, a: Tensor, b: Tensor, kind: str) -> Tensor | float:
    """What a merge of two tokens costs more for their sizes; `[B, |A|, |B|]` or `[B, |A|, 1]`."""
    if kind == "none":
        return 1.0
    of_a, of_b = size[:, a].unsqueeze(2), size[:, b].unsqueeze(1)
    if kind in ("source", "sqrt_source"):
        return of_a if kind == "source" else of_a.sqrt()
    harmonic = 2 * of_a * of_b / (of_a + of_b).clamp_min(1e-12)
    return harmonic if kind == "harmonic" else harmonic.sqrt()


def _squared_distances(tokens: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`[B, |A|, |B|]`: squared distance of the tokens in units of twice the mean squared length; 1 for unrelated ones."""
    x = tokens.detach().float()
    scale = x.square().sum(dim=2).mean(dim=1, keepdim=True).unsqueeze(2).clamp_min(1e-12)
    # `similarities` gives −‖a − b‖² / 2
    return -similarities(x[:, a], x[:, b], "euclidean").clamp_max(0) / scale


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
    size_penalty: str = "none",
    attention_power: float = 0.5,
    attention_from: int = 0,
    token_weight: float = 0.0,
) -> MergePlan:
    """Bipartite matching by a cost: `(1 − cos) · penalty of the sizes · (class attention of the A token) ^ power`.

    A token that the class token looks at costs more, so it merges later; and so do large tokens, by `size_penalty`:
    "harmonic" `2 nᵢnⱼ / (nᵢ + nⱼ)`, "source" `nᵢ`, or the root of either.

    Args:
        metric: `[B, N, D]` keys.
        r: tokens to merge away.
        protected: leading tokens that stay alone.
        size: patches per token `[B, N]`.
        attention: of the class token `[B, N]`.
        tokens: `[B, N, C]`.
        partition: which tokens are on which side.
        grid: patches along each axis.
        layer: number of the block.
        size_penalty: one of `SIZE_PENALTIES`.
        attention_power: of the class attention; 0 leaves it out.
        attention_from: the first block that looks at it: early class attention says little.
        token_weight: part of the cost, between 0 and 1, that is the squared distance of the tokens instead of keys' cosines.
    """
    check_matching_input(metric, r, protected)
    batch, count, _ = metric.shape
    if size_penalty not in SIZE_PENALTIES:
        raise ValueError(f"size_penalty={size_penalty!r}, but it must be one of {', '.join(SIZE_PENALTIES)}")
    r = min(r, max_merges(count, protected))
    if r == 0:
        return MergePlan.identity(batch, count, metric.device)
    a, b = _sides(count, protected, partition, grid, layer, metric.device)
    cost = 1 - similarities(metric[:, a], metric[:, b])
    if token_weight and tokens is not None:
        cost = (1 - token_weight) * cost + token_weight * _squared_distances(tokens, a, b)
    if size is not None:
        cost = cost.clamp_min(0) * _penalty(size, a, b, size_penalty)
    if attention is not None and attention_power and layer >= attention_from:
        looked_at = attention[:, a] * (count - protected)  # about 1, so that its power keeps the order of magnitude
        cost = cost.clamp_min(0) * looked_at.clamp_min(1e-6).pow(attention_power).unsqueeze(2)
    best, partner = cost.min(dim=2)
    order = best.argsort(dim=1, stable=True)[:, :r]
    return _in_partition(a, b, order, partner.gather(1, order), protected, batch)


def _in_partition(a: Tensor, b: Tensor, going: Tensor, partner: Tensor, protected: int, batch: int) -> MergePlan:
    """The paper's order: protected tokens, what is left of A, B; as `bipartite_matching` leaves them."""
    staying = torch.ones(batch, len(a), dtype=torch.int64, device=a.device).scatter_(1, going, 0)
    left = staying.argsort(dim=1, descending=True, stable=True)[:, : len(a) - going.shape[1]]
    prefix = counting(protected, a.device).expand(batch, -1)
    keep = torch.cat([prefix, a[left], b.expand(batch, -1)], dim=1)
    return MergePlan(keep, a[going], partner + (keep.shape[1] - len(b)))


@register_matcher("threshold", adaptive=True)
def threshold_matching(
    metric: Tensor,
    r: int,
    protected: int = 0,
    layer: int = 0,
    thresholds: list[float] | None = None,
    seen: dict[int, list[Tensor]] | None = None,
) -> MergePlan:
    """Merge every A token whose best B token is more similar than this block's threshold (DyMU, LTMP).

    `tokenmerge.calibrate` finds the thresholds at which r merge on average; without any, r merge in every image. The
    images of a batch must keep one length, so a batch merges the number that its images would merge on average. Give
    it images alone, or of like content (`tokenmerge.tools.buckets`), and each merges about what it would alone. `seen` is for
    `calibrate`: it collects the similarities of best edges.
    """
    check_matching_input(metric, r, protected)
    batch, count, _ = metric.shape
    a, b = _sides(count, protected, "alternating", None, layer, metric.device)
    most = max_merges(count, protected)
    best, partner = similarities(metric[:, a], metric[:, b]).max(dim=2) if most else (metric[:, :0, 0], None)
    if seen is not None:
        seen.setdefault(layer, []).append(best)
    if thresholds:
        r = round(float((best > thresholds[layer]).sum()) / batch)
    r = min(r, most)
    if r == 0 or partner is None:
        return MergePlan.identity(batch, count, metric.device)
    order = best.argsort(dim=1, descending=True, stable=True)[:, :r]
    return _in_partition(a, b, order, partner.gather(1, order), protected, batch)
