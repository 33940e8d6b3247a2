"""Dropping tokens that a trained predictor lets go (DynamicViT).

Everything else in this library works off the shelf. A predictor does not: it is a small network inside a block, with
weights of its own, which `tokenmerge train --matcher dynamicvit` trains together with the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenmerge.errors import ConfigError
from tokenmerge.matching.joining import drop, lowest
from tokenmerge.matching.registry import register_matcher
from tokenmerge.plan import MergePlan

PREDICTOR = "tokenmerge_predictor"
"""A block's attribute for what a learned matcher works with."""
_ALMOST_NOTHING = 1e-6
"""What a token that training lets go counts for in attention.

Not 0, because then nothing would say how much better or worse the output would be with it: the attention that it draws is
`size · exp(qk)`, so its derivative by the size is the same for a tiny size as for 0, but reaches us through `log size`.
"""


class TokenPredictor(nn.Module):
    """Tokens -> log-probabilities of staying and of going (Rao et al. 2021, section 3.2).

    Half of the channels of a projection describe the token, the mean of the other half over all tokens that are still
    there describes the image; both together are classified by a network of three layers.

    Args:
        channels: C of the tokens.

    Attributes:
        kept: `[B]`, the part of the tokens that the latest training pass kept, with its gradient.
    """

    kept: Tensor | None

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % 4:
            raise ConfigError(
                f"a predictor halves its channels twice, but the model has {channels}: choose another matcher"
            )
        self.channels = channels
        self.project = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU())
        half, quarter = channels // 2, channels // 4
        self.classify = nn.Sequential(
            nn.Linear(channels, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
        )
        self.kept = None

    def forward(self, tokens: Tensor, size: Tensor) -> Tensor:
        """`[B, M, C]` and what each token counts in the mean `[B, M]` -> `[B, M, 2]`, log-probabilities."""
        x = self.project(tokens.to(next(self.parameters()).dtype))
        own, shared = x.chunk(2, dim=2)
        weight = size.to(x.dtype).unsqueeze(2)
        mean = (shared * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp_min(1e-6)
        scores: Tensor = self.classify(torch.cat([own, mean.expand_as(own)], dim=2))
        return F.log_softmax(scores.float(), dim=2)

    def __getstate__(self) -> dict[str, Any]:
        """Copies do not take part in the graph of the latest pass."""
        return {**self.__dict__, "kept": None}


@register_matcher("dynamicvit", learned=True, most="all but one")
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
    batch, count, _ = metric.shape
    if predictor is None or tokens is None or size is None:
        raise ConfigError(
            f"matcher 'dynamicvit' drops tokens in block {layer}, which has no trained predictor: train the model with "
            "`tokenmerge train --matcher dynamicvit`, or tokenmerge.patching.predictors.add_predictors(model, blocks) and your own loop"
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
    return MergePlan(everything.kept, everything.source, everything.target, gate=F.pad(gate, (protected, 0), value=1.0))
