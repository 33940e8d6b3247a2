"""Bipartite soft matching, the default matching algorithm (arXiv 2210.09461, section 3 and appendix D)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenmerge.config import Backend, Distance, Partition
from tokenmerge.errors import ConfigError
from tokenmerge.matching.distances import as_product
from tokenmerge.matching.partitions import first_of_sets, partition_order
from tokenmerge.matching.registry import register_matcher
from tokenmerge.ops import native
from tokenmerge.ops.basics import ascending, counting, descending_order, no_autocast, sum_over_heads, take_rows, unit
from tokenmerge.ops.choice import takes_c, takes_triton
from tokenmerge.plan import MergePlan

_FEW = 2**13
"""Similarities per image up to which one `max` over values and indices is faster than `amax` and `argmax` apart."""
_SCORES = 2**21
"""Most similarities per image in memory at once (8 MB in float32), so that memory grows with N, not with N²."""


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
    """Match each token of set A with its most similar token of set B and merge the `r` most similar pairs.

    Bipartite soft matching (arXiv 2210.09461, section 3 and appendix D). Unprotected tokens alternate between set A
    (even positions) and set B (odd positions). Each A token draws one edge to the B token of highest similarity, and
    the `r` edges of highest similarity are merged, so several A tokens may join one B token. Ties go to the lower
    A position, then to the lower B position. The remaining tokens are ordered: protected tokens, unmerged A tokens,
    B tokens, each group by ascending position. Matching carries no gradient.

    Args:
        metric: `[B, N, D]`, any floating dtype: the features compared; the paper uses the keys averaged over heads.
            Keys `[B, H, N, D]` are averaged over heads first. Similarities are computed in float32; a zero vector has
            cosine similarity 0 with every token.
        r: tokens to merge away per image, cut to at most `(N − protected) // 2`.
        protected: number of leading tokens (class, distillation, register) that neither merge nor are merged into.
        backend: "torch", "triton" (two fused kernels, four for long inputs), "c" (one function, for inference on a CPU), or
            "auto": Triton on a GPU it supports, C on a CPU.
        distance: similarity measure (paper, table 1b); see `tokenmerge/matching/distances.py`.
        partition: how tokens are divided into A and B (paper, table 1e); see `tokenmerge/matching/partitions.py`.
        grid: patches along each axis, needed by `partition="checkerboard"` alone.
        layer: index of the block, which seeds `partition="random"`.

    Returns:
        A plan for `[B, N, C]` tokens that leaves N' = N − r of them in every image.

    Raises:
        InputError: if `metric` has another shape or is not floating point, or `r` or `protected` is negative.
        ConfigError: if `backend="triton"` or `backend="c"` cannot run; the message lists the reasons.

    Example:
        >>> import torch, tokenmerge
        >>> keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [1.0, 0.1]]])  # [B=1, N=4, D=2]
        >>> plan = tokenmerge.bipartite_matching(keys, r=1)
        >>> plan.tokens_out, plan.assign  # tokens 2 and 3, the most similar pair, became token 2
        (3, tensor([[0, 1, 2, 2]]))
    """
    metric = metric.detach()
    if partition != "alternating":
        order = partition_order(partition, metric.shape[-2], protected, grid, layer, metric.device)
        if order is not None:
            plan = _alternating(metric.index_select(-2, order), r, protected, backend, distance)
            return MergePlan(order[plan.kept], order[plan.source], plan.target)
    return _alternating(metric, r, protected, backend, distance)


def _alternating(metric: Tensor, r: int, protected: int, backend: Backend, distance: Distance) -> MergePlan:
    """Match with the alternating partition: unprotected tokens at even positions form A, at odd positions B."""
    tokens = metric.shape[-2]
    if distance != "cosine" and backend in ("triton", "c"):
        raise ConfigError(
            f"backend={backend!r} cannot run: its functions compare by cosine, not by {distance!r}: use backend='auto'"
        )
    if distance == "cosine" and backend != "torch":
        if (metric.is_cuda or backend not in ("auto", "c")) and takes_triton(backend, metric, "match"):
            from tokenmerge.ops import matching

            return MergePlan(*matching.match(metric if metric.dim() == 4 else metric.unsqueeze(1), r, protected))
        if takes_c(backend, metric):
            return MergePlan(*native.match(metric if metric.dim() == 4 else metric.unsqueeze(1), r, protected))

    first_a, first_b = first_of_sets(protected)
    if metric.dim() == 4:
        heads, metric = metric.shape[1], sum_over_heads(metric, 1)
        metric = metric if distance == "cosine" else metric / heads  # cosine similarity ignores the scale
    # autocast would round similarities to half precision and thereby select other pairs
    with no_autocast(metric.device.type):
        if distance == "cosine":
            normed = unit(metric)
            a, b = normed[:, first_a::2], normed[:, first_b::2]
        else:
            a, b = as_product(metric[:, first_a::2], metric[:, first_b::2], distance)
        order, partner = _best_edges(a, b, r)
    return edges_as_plan(order, partner, protected, tokens)


def edges_as_plan(order: Tensor, partner: Tensor, protected: int, tokens: int) -> MergePlan:
    """Return the plan of edges between the alternating sets A and B; both tensors are changed.

    Args:
        order: the A tokens, numbered within A, those that merge first, `[B, |A|]` int64.
        partner: the B tokens that the first r of them join, numbered within B, `[B, r]` int64.
        protected: leading tokens in neither set.
        tokens: N.
    """
    (first_a, first_b), r = first_of_sets(protected), partner.shape[1]
    a_tokens = order.mul_(2).add_(first_a)
    position = counting(tokens, order.device)
    prefix, b_tokens = (part.expand(order.shape[0], -1) for part in (position[:protected], position[first_b::2]))
    kept = torch.cat([prefix, ascending(a_tokens[:, r:]), b_tokens], dim=1)
    return MergePlan(kept, a_tokens[:, :r], partner.add_(kept.shape[1] - b_tokens.shape[1]))


def _best_edges(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Rank the A tokens by similarity to their best B token, and find that B token for the first r of them.

    For many similarities, `amax` runs over all rows and `argmax` only over the r rows that merge, because `argmax` is
    far slower; for few, the number of operations dominates, and one `max` does both.

    Args:
        a: features of set A, `[B, |A|, D]` float32.
        b: features of set B, `[B, |B|, D]` float32.
        r: edges to merge.

    Returns:
        The A tokens by descending similarity `[B, |A|]`, and the best B tokens of the first r of them `[B, r]`, int64.
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
    """Yield `a @ columns` in tiles of rows that share one buffer, because fresh memory costs page faults.

    Each tile is overwritten by the next one (not while compiling).
    """
    batch, _, count_b = columns.shape
    rows = max(1, _SCORES // count_b)
    parts = a.split(rows, dim=1)
    if torch.compiler.is_compiling():  # Inductor plans the memory itself
        yield from (part @ columns for part in parts)
        return
    buffer = a.new_empty(batch * parts[0].shape[1] * count_b)
    for part in parts:
        scores = buffer[: batch * part.shape[1] * count_b].view(batch, part.shape[1], count_b)
        yield torch.bmm(part, columns, out=scores)
