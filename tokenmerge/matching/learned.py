"""Token pruning by trained predictors (DynamicViT, arXiv 2106.02034).

All other matchers work without training. A predictor is a small network inside a block, whose weights
`tokenmerge train --matcher dynamicvit` trains together with the model.
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
"""Name of the attribute of a block that holds its predictor."""
_ALMOST_NOTHING = 1e-6
"""Factor on the size of a token that is sampled to be dropped in training.

It is not 0, because the gradient passes through `log size`. The attention to the token is proportional to
`size · exp(qk)`, whose derivative with respect to the size is the same for a tiny size as for 0.
"""


class TokenPredictor(nn.Module):
    """Network that predicts for each token whether to keep or drop it (Rao et al. 2021, section 3.2).

    Half of the channels of a projection describe the token. The mean of the other half over all tokens not yet dropped
    describes the image. A network of three layers classifies both together.

    Args:
        channels: C of the tokens, a multiple of 4.

    Attributes:
        kept: `[B]`, the fraction of the tokens that the latest training pass kept, with its gradient; `None` before it.

    Raises:
        ConfigError: if `channels` is not a multiple of 4.
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
        """Predict the log-probabilities of keeping and of dropping each token.

        Args:
            tokens: `[B, M, C]`, floating: the unprotected tokens.
            size: weight of each token in the mean, `[B, M]`.

        Returns:
            `[B, M, 2]` float32.
        """
        x = self.project(tokens.to(next(self.parameters()).dtype))
        own, shared = x.chunk(2, dim=2)
        weight = size.to(x.dtype).unsqueeze(2)
        mean = (shared * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp_min(1e-6)
        scores: Tensor = self.classify(torch.cat([own, mean.expand_as(own)], dim=2))
        return F.log_softmax(scores.float(), dim=2)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without `kept`, which belongs to the autograd graph of the latest pass."""
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
    """Drop the r tokens with the lowest predicted probability of being kept (DynamicViT).

    In training all tokens stay, as in DynamicViT: tokens that are sampled to be dropped (straight-through Gumbel-softmax)
    lose their weight in attention, `ratio_loss` pulls the number of kept tokens towards the schedule, and no time is
    saved. In evaluation r tokens are dropped.

    Args:
        metric: `[B, N, D]`; only its shape and device count.
        r: tokens to drop.
        protected: leading tokens that are never dropped.
        tokens: the tokens `[B, N, C]`.
        size: patches per token `[B, N]`.
        layer: index of the block, for messages.
        predictor: the predictor of the block.

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
    here = size[:, protected:] > 0.5  # tokens dropped earlier keep their factor: products of factors would underflow
    predictor.kept = (stays * here).mean(dim=1)
    gate = torch.where(here, stays * (1 - _ALMOST_NOTHING) + _ALMOST_NOTHING, 1.0)
    everything = MergePlan.identity(batch, count, metric.device)
    return MergePlan(everything.kept, everything.source, everything.target, gate=F.pad(gate, (protected, 0), value=1.0))
