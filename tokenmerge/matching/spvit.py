"""Soft token pruning by a selector of several heads, with a package token (SPViT, arXiv 2112.13890)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenmerge.errors import ConfigError
from tokenmerge.matching.joining import lowest, rest_of
from tokenmerge.matching.learned import Predictor, mean_of_present, needed_predictor, present, sampled
from tokenmerge.matching.registry import needed, register_matcher
from tokenmerge.ops.basics import take_rows
from tokenmerge.plan import MergePlan


class TokenSelector(Predictor):
    """Network that scores each token in each head, and weighs the heads (Kong et al. 2022, "token selector").

    A head sees its C/H channels of a token. Half of their projection describes the token, and the mean of the other half
    over all tokens not yet dropped describes the image; a network classifies both together, the same one for all heads.
    The attention branch weighs the heads of each token, from the mean of each head's channels.

    The paper leaves open how many layers these networks have and whether heads share them. Here a projection is one layer,
    the classifier has two, the branch has two with H hidden units, and heads share the first two networks.

    Args:
        channels: C of the tokens.
        heads: H; C/H must be even.

    Attributes:
        kept: `[B]`, the fraction of the tokens that the latest training pass kept, package token included, with its
            gradient; `None` before it.

    Raises:
        ConfigError: if the number of heads is not known, or does not divide the channels into even parts.
    """

    matcher = "spvit"

    def __init__(self, channels: int, heads: int = 0) -> None:
        super().__init__(channels, heads)
        if not heads or channels % (2 * heads):
            raise ConfigError(
                f"the selector of SPViT halves the channels of each head, but the model has {channels} channels and "
                f"{heads or 'an unknown number of'} heads: choose another matcher"
            )
        each = channels // heads
        self.norm = nn.LayerNorm(channels)
        self.project = nn.Sequential(nn.Linear(each, each), nn.GELU())
        self.classify = nn.Sequential(nn.Linear(each, each // 2), nn.GELU(), nn.Linear(each // 2, 2))
        self.branch = nn.Sequential(nn.Linear(heads, heads), nn.GELU(), nn.Linear(heads, heads), nn.Sigmoid())

    def forward(self, tokens: Tensor, size: Tensor) -> Tensor:
        """Predict the probabilities of keeping and of dropping each token.

        Args:
            tokens: `[B, M, C]`, floating: the unprotected tokens.
            size: weight of each token in the mean, `[B, M]`.

        Returns:
            `[B, M, 2]` float32: `Σ_h a_h s_h / Σ_h a_h` for the scores s_h of the heads and their weights a_h.
        """
        x = self.norm(tokens.to(next(self.parameters()).dtype)).unflatten(2, (self.heads, -1))  # [B, M, H, C/H]
        weight = self.branch(x.mean(dim=3)).float().unsqueeze(3)  # [B, M, H, 1]
        own, shared = self.project(x).chunk(2, dim=3)
        image = mean_of_present(shared.transpose(1, 2), size.unsqueeze(1)).transpose(1, 2)  # [B, 1, H, C/2H]
        scores = self.classify(torch.cat([own, image.expand_as(own)], dim=3)).float().softmax(dim=3)  # [B, M, H, 2]
        mean: Tensor = (scores * weight).sum(dim=2) / weight.sum(dim=2)
        return mean


@register_matcher("spvit", learned=True, most="all but one", requires=("sizes",))
def selected_packing(
    metric: Tensor,
    r: int,
    protected: int = 0,
    tokens: Tensor | None = None,
    size: Tensor | None = None,
    layer: int = 0,
    predictor: TokenSelector | None = None,
) -> MergePlan:
    """Pack the r + 1 tokens with the lowest scores into one token, their mean weighted by their scores (SPViT).

    The package token counts as one token, and is an ordinary token for the next selector, which the paper leaves open.

    In training all tokens stay, and tokens that are sampled to be dropped (straight-through Gumbel-softmax) lose their
    weight in attention. The paper appends the package token; here it takes the row of the dropped token with the lowest
    score, whose own decision therefore gets no gradient in that pass. A loss pulls the number of kept tokens towards the
    schedule. In evaluation every image keeps as many tokens as the schedule leaves, where the paper lets the number vary
    between images.

    Args:
        metric: `[B, N, D]`; only its shape and device count.
        r: tokens to merge away.
        protected: leading tokens that are never dropped.
        tokens: the tokens `[B, N, C]`, with their gradient.
        size: patches per token `[B, N]`.
        layer: index of the block, for messages.
        predictor: the selector of the block.

    Raises:
        ConfigError: if the block has no selector.
        InputError: if `tokens` or `size` is missing.
    """
    needed_predictor(predictor, TokenSelector, layer)
    assert predictor is not None
    tokens, size = needed(tokens, "tokens", "spvit"), needed(size, "size", "spvit").detach()
    score = predictor(tokens[:, protected:], size[:, protected:])
    if predictor.training:
        return _training_plan(tokens, size, protected, score, predictor)
    count = tokens.shape[1]
    real, _ = present(size)
    keep = F.pad(score[:, :, 0], (protected, 0), value=1.0)
    going = lowest(keep.masked_fill(~real, -1.0), r + 1, protected)  # padding goes first
    stays, package = rest_of(going, count), going[:, -1:]
    kept, weight = torch.cat([stays, package], dim=1), (keep * real).gather(1, going)
    features = torch.cat([take_rows(tokens, stays), packed(take_rows(tokens, going), weight)], dim=1)
    source, sizes = going[:, :-1], size.gather(1, going).sum(dim=1)
    gate = torch.ones_like(kept, dtype=size.dtype)
    gate[:, -1] = 1 / sizes.clamp_min(1.0)  # sizes add up, but a package counts as one token
    return MergePlan(kept, source, torch.full_like(source, kept.shape[1] - 1), gate=gate, features=features)


def packed(tokens: Tensor, weight: Tensor) -> Tensor:
    """Return the mean of `tokens [B, M, C]` weighted by `weight [B, M]`, `[B, 1, C]` in the dtype of the tokens."""
    share = (weight / weight.sum(dim=1, keepdim=True).clamp_min(1e-12)).unsqueeze(2)
    return (tokens.float() * share).sum(dim=1, keepdim=True).to(tokens.dtype)


def _training_plan(tokens: Tensor, size: Tensor, protected: int, score: Tensor, predictor: TokenSelector) -> MergePlan:
    """Return the plan that keeps all rows, masks dropped tokens, and puts the package token into one of their rows."""
    batch, count, _ = tokens.shape
    keep, (_, number) = score[:, :, 0], present(size[:, protected:])
    stays, here, gate = sampled(score.clamp_min(1e-12).log(), size[:, protected:])
    dropped = here & (stays.detach() < 0.5)
    any_dropped = dropped.any(dim=1)
    predictor.leave(((stays * here).sum(dim=1) + any_dropped) / number)
    package = packed(tokens[:, protected:], keep * dropped)
    row = keep.detach().masked_fill(~dropped, torch.inf).argmin(dim=1, keepdim=True)
    here_now = F.one_hot(row[:, 0], count - protected).bool() & any_dropped.unsqueeze(1)
    features = torch.cat([tokens[:, :protected], torch.where(here_now.unsqueeze(2), package, tokens[:, protected:])], 1)
    gate = F.pad(gate.masked_fill(here_now, 1.0), (protected, 0), value=1.0)
    whole = MergePlan.identity(batch, count, tokens.device)
    return MergePlan(whole.kept, whole.source, whole.target, gate=gate, features=features)
