"""Bipartite soft matching, the paper's algorithm (section 3 and appendix D)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmerge.matching.registry import check_matching_input, register_matcher
from tokenmerge.plan import MergePlan, take_rows
from tokenmerge.precision import no_autocast
from tokenmerge.schedule import max_merges


@register_matcher("bipartite")
def bipartite_matching(metric: Tensor, r: int, protected: int = 0) -> MergePlan:
    """Pair every second token with its most similar partner and merge the `r` most similar pairs.

    Tokens at even positions form set A, those at odd positions set B. Each A token draws one edge to the B
    token of highest cosine similarity; the `r` best edges are merged, so several A tokens may join one B
    token. The result is ordered: protected tokens, remaining A tokens, B tokens, each by ascending position.
    Ties go to the lower A position, then to the lower B position. Takes no gradient.

    Args:
        metric: `[B, N, D]`, what similarity is measured on (the paper: keys averaged over heads), any
            floating dtype; compared in float32. A vector of norm 0 is similar to nothing (cosine 0).
        r: tokens to merge away per image; cut to `(N − protected) // 2`.
        protected: leading tokens that neither merge nor are merged into: class, distillation, registers.

    Raises:
        InputError: if `metric` is not `[B, N, D]` floating point, or `r` or `protected` is negative.
    """
    check_matching_input(metric, r, protected)
    batch, tokens, _ = metric.shape
    r = min(r, max_merges(tokens, protected))
    if r == 0:
        return MergePlan.identity(batch, tokens, metric.device)

    scores, first_a, first_b = _edge_scores(metric, protected)
    # amax first, argmax only for the chosen rows: finding positions costs far more than finding values
    order = scores.amax(dim=2).argsort(dim=1, descending=True, stable=True)
    chosen, rest = order[:, :r], order[:, r:].sort(dim=1).values
    partner = take_rows(scores, chosen).argmax(dim=2)

    position = torch.arange(tokens, device=metric.device)
    prefix, b_tokens = position[:protected], position[first_b::2]
    keep = torch.cat([prefix.expand(batch, -1), rest * 2 + first_a, b_tokens.expand(batch, -1)], dim=1)
    return MergePlan(keep, chosen * 2 + first_a, partner + (protected + rest.shape[1]))


def _edge_scores(metric: Tensor, protected: int) -> tuple[Tensor, int, int]:
    """Cosine similarities `[B, |A|, |B|]` of the unprotected tokens, and the first position of A and of B."""
    first_a = protected + protected % 2
    first_b = protected + 1 - protected % 2
    # autocast would round the similarities to half precision and so pick other pairs
    with no_autocast(metric.device.type):
        metric = metric.detach().to(torch.float32)
        unit = metric / torch.linalg.vector_norm(metric, dim=2, keepdim=True).clamp_min(1e-12)
        return unit[:, first_a::2] @ unit[:, first_b::2].transpose(1, 2), first_a, first_b
