"""Token pruning by trained predictors (DynamicViT, arXiv 2106.02034)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenmerge.errors import ConfigError
from tokenmerge.matching.joining import drop, lowest
from tokenmerge.matching.learned import Predictor, mean_of_present, needed_predictor, present, sampled
from tokenmerge.matching.registry import needed, register_matcher
from tokenmerge.plan import MergePlan


class TokenPredictor(Predictor):
    """Network that predicts for each token whether to keep or drop it (Rao et al. 2021, section 3.2).

    Half of the channels of a projection describe the token. The mean of the other half over all tokens not yet dropped
    describes the image. A network of three layers classifies both together.

    Args:
        channels: C of the tokens, a multiple of 4.
        heads: not used.

    Attributes:
        kept: `[B]`, the fraction of the tokens that the latest training pass kept, with its gradient; `None` before it.

    Raises:
        ConfigError: if `channels` is not a multiple of 4.
    """

    matcher = "dynamicvit"

    def __init__(self, channels: int, heads: int = 0) -> None:
        super().__init__(channels, heads)
        if channels % 4:
            raise ConfigError(
                f"a predictor halves its channels twice, but the model has {channels}: choose another matcher"
            )
        self.project = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU())
        half, quarter = channels // 2, channels // 4
        self.classify = nn.Sequential(
            nn.Linear(channels, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
        )

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
        mean = mean_of_present(shared, size)
        scores: Tensor = self.classify(torch.cat([own, mean.expand_as(own)], dim=2))
        return F.log_softmax(scores.float(), dim=2)


@register_matcher("dynamicvit", learned=True, most="all but one", requires=("sizes",))
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
    lose their weight in attention, a loss pulls the number of kept tokens towards the schedule, and no time is saved. In
    evaluation r tokens are dropped.

    Args:
        metric: `[B, N, D]`; only its shape and device count.
        r: tokens to drop.
        protected: leading tokens that are never dropped.
        tokens: the tokens `[B, N, C]`, with their gradient.
        size: patches per token `[B, N]`.
        layer: index of the block, for messages.
        predictor: the predictor of the block.

    Raises:
        ConfigError: if the block has no predictor.
        InputError: if `tokens` or `size` is missing.
    """
    needed_predictor(predictor, TokenPredictor, layer)
    assert predictor is not None
    tokens, size = needed(tokens, "tokens", "dynamicvit"), needed(size, "size", "dynamicvit").detach()
    batch, count, _ = metric.shape
    score = predictor(tokens[:, protected:], size[:, protected:])
    real, number = present(size[:, protected:])
    if not predictor.training:
        keep = score[:, :, 0].masked_fill(~real, -torch.inf)  # padding goes first
        return drop(lowest(F.pad(keep, (protected, 0), value=1.0), r, protected), count)
    stays, here, gate = sampled(score, size[:, protected:])
    predictor.leave((stays * here).sum(dim=1) / number)
    everything = MergePlan.identity(batch, count, metric.device)
    return MergePlan(everything.kept, everything.source, everything.target, gate=F.pad(gate, (protected, 0), value=1.0))
