"""Bipartite matching that looks at more than keys: sizes, class attention, the tokens themselves; and by threshold."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from torch import Tensor

from tokenmerge.config import Partition
from tokenmerge.matching.distances import similarities
from tokenmerge.matching.partitions import partition_order
from tokenmerge.matching.registry import register_matcher
from tokenmerge.matching.values import AtLeast, PerBlock, Within
from tokenmerge.ops.basics import ascending_order, counting, descending_order, no_autocast, unit
from tokenmerge.plan import MergePlan
from tokenmerge.schedule import max_merges

Rows = Tensor | slice
SizePenalty = Literal["none", "harmonic", "sqrt_harmonic", "source", "sqrt_source"]


def _sides(order: Tensor | None, tokens: int, protected: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of side A and of side B, `[|A|]` and `[|B|]`, in an order in which every second token is on side A."""
    order = counting(tokens, device) if order is None else order
    return order[protected + protected % 2 :: 2], order[protected + 1 - protected % 2 :: 2]


def _penalty(size: Tensor, a: Tensor, b: Tensor, kind: str) -> Tensor:
    """What a merge of two tokens costs more for their sizes; `[B, |A|, |B|]` or `[B, |A|, 1]`."""
    of_a, of_b = size[:, a].unsqueeze(2), size[:, b].unsqueeze(1)
    if kind in ("source", "sqrt_source"):
        return of_a if kind == "source" else of_a.sqrt()
    harmonic = 2 * of_a * of_b / (of_a + of_b).clamp_min(1e-12)
    return harmonic if kind == "harmonic" else harmonic.sqrt()


def _scores(metric: Tensor, tokens: Tensor | None, a: Rows, b: Rows, weight: float) -> tuple[Tensor, Tensor | float]:
    """What is most wanted is largest, `[B, |A|, |B|]`; and what to take it from for the cost, `[B, |A|]` or a number.

    The cost is `(1 − weight)(1 − cos) + weight · d²`, with d² the squared distance of the tokens in units of twice their
    mean squared length, 1 for unrelated ones. Both parts are products, and what is the same along a row waits until each
    row has its best: no further pass over all pairs.
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
        size_penalty: which penalty.
        attention_power: of the class attention; 0 leaves it out.
        attention_from: the first block that looks at it: early class attention says little.
        token_weight: part of the cost, between 0 and 1, that is the squared distance of the tokens instead of keys' cosines.
    """
    batch, count, _ = metric.shape
    order = partition_order(partition, count, protected, grid, layer, metric.device)
    a, b = _sides(order, count, protected, metric.device)
    rows = (slice(protected + protected % 2, None, 2), slice(protected + 1 - protected % 2, None, 2))
    with no_autocast(metric.device.type):
        left, right = rows if order is None else (a, b)
        scores, start = _scores(metric, tokens, left, right, token_weight)
    if size is not None and size_penalty in ("harmonic", "sqrt_harmonic"):  # the only ones that differ along a row
        start = start.unsqueeze(2) if isinstance(start, Tensor) else start
        best, partner = ((start - scores).clamp_min(0) * _penalty(size, a, b, size_penalty)).min(dim=2)
    else:
        nearest, partner = scores.max(dim=2)
        best = (start - nearest).clamp_min(0)
        if size is not None and size_penalty != "none":
            best = best * _penalty(size, a, b, size_penalty).squeeze(2)
    if attention is not None and attention_power and layer >= attention_from:
        looked_at = attention[:, a] * (count - protected)  # about 1, so that its power keeps the order of magnitude
        best = best * looked_at.clamp_min(1e-6).pow(attention_power)
    order = ascending_order(best)[:, :r]
    return _in_partition(a, b, order, partner.gather(1, order), protected, batch)


def _in_partition(a: Tensor, b: Tensor, going: Tensor, partner: Tensor, protected: int, batch: int) -> MergePlan:
    """The paper's order: protected tokens, what is left of A, B; as `bipartite_matching` leaves them."""
    staying = torch.ones(batch, len(a), dtype=torch.int64, device=a.device).scatter_(1, going, 0)
    left = descending_order(staying)[:, : len(a) - going.shape[1]]
    prefix = counting(protected, a.device).expand(batch, -1)
    kept = torch.cat([prefix, a[left], b.expand(batch, -1)], dim=1)
    return MergePlan(kept, a[going], partner + (kept.shape[1] - len(b)))


class _Collecting(threading.local):
    """Where this thread collects the similarities of best edges, by block; `None` where it does not."""

    def __init__(self) -> None:
        # in each thread from the start, or compiled code would depend on whether it is there yet
        self.edges: dict[int, list[tuple[Tensor, int]]] | None = None


_collecting = _Collecting()


@contextlib.contextmanager
def collecting_edges() -> Iterator[dict[int, list[tuple[Tensor, int]]]]:
    """Within it, `threshold_matching` notes the similarity of every best edge, `[B, |A|]`, and r of each pass, by block."""
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
    """Merge every A token whose best B token is more similar than this block's threshold (DyMU, LTMP).

    `tokenmerge.calibrate` finds the thresholds at which r merge on average; without any, r merge in every image. The
    images of a batch must keep one length, so a batch merges the number that its images would merge on average. Give
    it images alone, or of like content (`tokenmerge.tools.buckets`), and each merges about what it would alone.
    """
    batch, count, _ = metric.shape
    a, b = _sides(None, count, protected, metric.device)
    most = max_merges(count, protected)
    best, partner = similarities(metric[:, a], metric[:, b]).max(dim=2) if most else (metric[:, :0, 0], None)
    if _collecting.edges is not None:
        _collecting.edges.setdefault(layer, []).append((best, r))
    if thresholds:
        r = round(float((best > thresholds[layer]).sum()) / batch)
    r = min(r, most)
    if r == 0 or partner is None:
        return MergePlan.identity(batch, count, metric.device)
    order = descending_order(best)[:, :r]
    return _in_partition(a, b, order, partner.gather(1, order), protected, batch)
