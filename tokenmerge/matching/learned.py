"""Dropping tokens that a trained head lets go (DynamicViT). The head is in `tokenmerge.matching.predictors`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenmerge.errors import ConfigError
from tokenmerge.matching.joining import drop, lowest, most_that_join
from tokenmerge.matching.registry import check_matching_input, register_matcher
from tokenmerge.plan import MergePlan

if TYPE_CHECKING:
    from tokenmerge.matching.predictors import TokenPredictor

_ALMOST_NOTHING = 1e-6
"""What a token that training lets go counts for in attention.

Not 0, because then nothing would say how much better or worse the output would be with it: the attention that it draws is
`size · exp(qk)`, so its derivative by the size is the same for a tiny size as for 0, but reaches us through `log size`.
"""


@register_matcher("dynamicvit", learned=True)
def predicted_pruning(
    metric: Tensor,
    r: int,
    protected: int = 0,
    tokens: Tensor | None = None,
    size: Tensor | None = None,
    layer: int = 0,
    predictor: TokenPredictor | None = None,
) -> MergePlan:
    """Drop the r tokens that the block's trained predictor most wants to go (DynamicViT).

    While training all tokens stay, as DynamicViT has it: what is drawn to go (Gumbel-softmax, straight through) loses its
    weight in attention, `ratio_loss` draws the number to what the schedule wants, and no time is saved. Evaluated, r go.

    Raises:
        ConfigError: if the block has no predictor.
    """
    check_matching_input(metric, r, protected)
    batch, count, _ = metric.shape
    r = min(r, most_that_join(count, protected))
    if r == 0:
        return MergePlan.identity(batch, count, metric.device)
    if predictor is None or tokens is None or size is None:
        raise ConfigError(
            f"matcher 'dynamicvit' drops tokens in block {layer}, which has no trained predictor: train the model with "
            "`tokenmerge train --matcher dynamicvit`, or tokenmerge.matching.predictors.add_predictors(model, blocks) and your own loop"
        )
    size = size.detach()
    score = predictor(tokens[:, protected:], size[:, protected:])
    if not predictor.training:
        return drop(lowest(F.pad(score[:, :, 0], (protected, 0), value=1.0), r, protected), count)
    stays = F.gumbel_softmax(score, hard=True, dim=2)[:, :, 0]
    here = size[:, protected:] > 0.5  # what went before stays gone, and no smaller: products of gates would underflow
    predictor.kept = (stays * here).mean(dim=1)
    gate = torch.where(here, stays * (1 - _ALMOST_NOTHING) + _ALMOST_NOTHING, 1.0)
    everything = MergePlan.identity(batch, count, metric.device)
    return MergePlan(everything.keep, everything.source, everything.target, gate=F.pad(gate, (protected, 0), value=1.0))
