"""Bipartite soft matching, the paper's algorithm (section 3 and appendix D)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenmerge.config import Backend, Distance, Partition
from tokenmerge.errors import ConfigError
from tokenmerge.matching.distances import as_product
from tokenmerge.matching.partitions import partition_order
from tokenmerge.matching.registry import register_matcher
from tokenmerge.ops.basics import ascending, counting, descending_order, no_autocast, sum_over_heads, take_rows, unit
from tokenmerge.ops.choice import takes_triton
from tokenmerge.plan import MergePlan

_FEW = 2**13
"""Similarities per image up to which one operation for values and their columns beats two."""
_SCORES = 2**21
"""Similarities per image that are held at once, 8 MB: memory then grows with N, not with N²."""


@register_matcher("bipartite")
def bipartite_matching(
    metric: Tensor,
    r: int,
    protected: int = 0,
    backend: Backend = "auto",
    distance: Distance = "cosine",
    partition: Partition = "alternating",
    grid: tuple[int, ...] | None = None,
    layer: int = 0,
) -> MergePlan:
    """Pair every second token with its most similar partner and merge the `r` most similar pairs.

    Tokens at even positions form set A, those at odd positions set B. Each A token draws one edge to the B
    token of highest cosine similarity; the `r` best edges are merged, so several A tokens may join one B
    token. The result is ordered: protected tokens, remaining A tokens, B tokens, each by ascending position.
    Ties go to the lower A position, then to the lower B position. Takes no gradient.

    Args:
        metric: `[B, N, D]`, what similarity is measured on (the paper: keys averaged over heads), any
            floating dtype; compared in float32. A vector of norm 0 is similar to nothing (cosine 0).
            Keys `[B, H, N, D]` are averaged over the heads first.
        r: tokens to merge away per image; cut to `(N − protected) // 2`.
        protected: leading tokens that neither merge nor are merged into: class, distillation, registers.
        backend: "triton" for two fused kernels, "torch", or "auto": Triton on a GPU where it is installed.
        distance: another measure of similarity (`distances.py`).
        partition: other sides than every second token (`partitions.py`).
        grid: patches along each axis, for `partition="checkerboard"`.
        layer: number of the block, for `partition="random"`.

    Raises:
        InputError: if `metric` has another shape or is not floating point, or `r` or `protected` is negative.
        ConfigError: if `backend` is "triton" and cannot run, with the reasons.
    """
    metric = metric.detach()
    if partition != "alternating":
        order = partition_order(partition, metric.shape[-2], protected, grid, layer, metric.device)
        if order is not None:
            plan = _alternating(metric.index_select(-2, order), r, protected, backend, distance)
            return MergePlan(order[plan.kept], order[plan.source], plan.target)
    return _alternating(metric, r, protected, backend, distance)


def _alternating(metric: Tensor, r: int, protected: int, backend: Backend, distance: Distance) -> MergePlan:
    """The plan in which every second token is on side A."""
    batch, tokens = metric.shape[0], metric.shape[-2]
    if distance != "cosine" and backend == "triton":
        raise ConfigError(
            f"backend='triton' cannot run: its kernels compare by cosine, not by {distance!r}: use backend='auto'"
        )
    if distance == "cosine" and (metric.is_cuda or backend != "auto") and takes_triton(backend, metric, "match"):
        from tokenmerge.ops import matching

        return MergePlan(*matching.match(metric if metric.dim() == 4 else metric.unsqueeze(1), r, protected))

    first_a = protected + protected % 2
    first_b = protected + 1 - protected % 2
    if metric.dim() == 4:
        heads, metric = metric.shape[1], sum_over_heads(metric, 1)
        metric = metric if distance == "cosine" else metric / heads  # only a cosine does not ask for the length
    # autocast would round the similarities to half precision and so pick other pairs
    with no_autocast(metric.device.type):
        if distance == "cosine":
            normed = unit(metric)
            a, b = normed[:, first_a::2], normed[:, first_b::2]
        else:
            a, b = as_product(metric[:, first_a::2], metric[:, first_b::2], distance)
        order, partner = _best_edges(a, b, r)
    a_tokens = order.mul_(2).add_(first_a)
    position = counting(tokens, metric.device)
    prefix, b_tokens = position[:protected].expand(batch, -1), position[first_b::2].expand(batch, -1)
    kept = torch.cat([prefix, ascending(a_tokens[:, r:]), b_tokens], dim=1)
    return MergePlan(kept, a_tokens[:, :r], partner.add_(kept.shape[1] - b_tokens.shape[1]))


def _best_edges(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The A tokens `[B, |A|]` by their best edge, best first, and the B token `[B, r]` of the first r of those edges.

    Where there are many similarities, the largest value of each row first, and its column only for the rows that merge:
    columns cost far more than values. Where there are few, operations are what costs.
    """
    columns = b.transpose(1, 2)
    pairs = a.shape[1] * b.shape[1]
    if pairs <= _FEW:
        best, column = torch.bmm(a, columns).max(dim=2)
        order = descending_order(best)
        return order, column.gather(1, order[:, :r])
    if pairs <= _SCORES:
        scores = torch.bmm(a, columns)
        order = descending_order(scores.amax(dim=2))
        return order, take_rows(scores, order[:, :r]).argmax(dim=2)
    best = torch.cat([scores.amax(dim=2) for scores in _score_tiles(a, columns)], dim=1)
    order = descending_order(best)
    rows = take_rows(a, order[:, :r])
    return order, torch.cat([scores.argmax(dim=2) for scores in _score_tiles(rows, columns)], dim=1)


def _score_tiles(a: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """`a @ columns`, some rows at a time, each in the memory of the rows before: new memory costs page faults."""
    batch, _, count_b = columns.shape
    rows = max(1, _SCORES // count_b)
    parts = a.split(rows, dim=1)
    if torch.compiler.is_compiling():  # which plans memory itself
        yield from (part @ columns for part in parts)
        return
    buffer = a.new_empty(batch * parts[0].shape[1] * count_b)
    for part in parts:
        scores = buffer[: batch * part.shape[1] * count_b].view(batch, part.shape[1], count_b)
        yield torch.bmm(part, columns, out=scores)
