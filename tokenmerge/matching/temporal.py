"""Bipartite matching that prefers pairs within one moment of a clip, or pairs of different moments."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tokenmerge.matching.bipartite import edges_as_plan
from tokenmerge.matching.partitions import first_of_sets
from tokenmerge.matching.registry import needed, needed_grid, register_matcher
from tokenmerge.ops.basics import descending_order, no_autocast, unit
from tokenmerge.plan import MergePlan

_LATER = 4.0
"""Taken off the similarity of pairs of the other kind, so that all of them come after all pairs of the wanted kind."""


@register_matcher("temporal")
def temporal_matching(
    metric: Tensor,
    r: int,
    protected: int = 0,
    anchor: Tensor | None = None,
    grid: tuple[int, ...] | None = None,
    pairs: Literal["within", "across"] = "within",
) -> MergePlan:
    """Merge as bipartite matching does, but first the pairs within one moment of a clip, or first those across moments.

    A moment is a step along the first axis of the grid: tubelets of the same frames in a clip, and a row of an image. That axis is time
    in the spectrograms of AudioMAE, too, but frequency in those of AST. A merged token counts to the moment of the token that the
    others joined. If fewer than r pairs of the wanted kind are left, the most similar of the others merge, because all images lose the
    same number of tokens.

    Args:
        metric: `[B, N, D]`, floating.
        r: tokens to merge away.
        protected: leading tokens that never merge.
        anchor: original token at whose position each token is, `[B, N]` int64.
        grid: patches along each axis, time first: `(t, h, w)`.
        pairs: the kind of pairs that merges first.

    Raises:
        InputError: if `anchor` or `grid` is missing, or the grid has one axis alone, or does not hold all tokens.

    Example:
        >>> import torch
        >>> from tokenmerge.matching.temporal import temporal_matching
        >>> keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [1.0, 0.1]]])  # two moments of two patches
        >>> given = {"anchor": torch.arange(4)[None], "grid": (2, 2, 1)}
        >>> temporal_matching(keys, r=1, **given).assign, temporal_matching(keys, r=1, pairs="across", **given).assign
        (tensor([[0, 1, 2, 2]]), tensor([[2, 1, 0, 2]]))
    """
    tokens = metric.shape[1]
    anchor, grid = needed(anchor, "anchor", "temporal"), needed_grid(grid, tokens - protected, "temporal")
    first_a, first_b = first_of_sets(protected)
    moment = (anchor - protected) // math.prod(grid[1:])
    with no_autocast(metric.device.type):
        normed = unit(metric.detach())
        scores = normed[:, first_a::2] @ normed[:, first_b::2].transpose(1, 2)
    same = moment[:, first_a::2].unsqueeze(2) == moment[:, first_b::2].unsqueeze(1)
    wanted = same if pairs == "within" else torch.logical_not(same)
    best, partner = torch.where(wanted, scores, scores - _LATER).max(dim=2)
    order = descending_order(best)
    return edges_as_plan(order, partner.gather(1, order[:, :r]), protected, tokens)
