"""Halting of tokens by a score that the network learns to write into one channel (A-ViT, arXiv 2112.07658)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenmerge.errors import ConfigError
from tokenmerge.matching.learned import Predictor, needed_predictor
from tokenmerge.matching.registry import needed, register_matcher
from tokenmerge.ops.basics import descending_order, is_exporting
from tokenmerge.plan import Carried, MergePlan

EPSILON = 0.01
"""A token halts when its scores add up to 1 − ε (A-ViT, section 3)."""
PONDER_WEIGHT, DISTRIBUTION_WEIGHT = 5e-4, 0.1
"""Weights of the ponder loss and of the distribution loss; the authors' published command has 0.001 for the second."""
WIDTH = 1.0
"""Standard deviation of the target distribution, in blocks; the paper leaves it open."""


class HaltingGate(Predictor):
    """Halting score of a token, `σ(scale · t_e + shift)` for channel e of the token t (Yin et al. 2022, section 3).

    The gate has no weights of its own: training teaches the blocks to write the score into the channel. With the paper's
    constants, an untrained channel near 0 gives scores near 0, so that no token halts at first.

    Args:
        channels: C of the tokens.
        heads: not used.
        scale: γ of the paper.
        shift: β of the paper.
        channel: e of the paper, the channel that holds the score.

    Attributes:
        scale, shift: the constants, float32 buffers that are saved with the model.
        channel: the channel.
        kept: of the last block's gate after a training pass: the ponder loss of each image `[B]`, and the mean score of
            each block `[B, L]`, both with gradient; `None` before it.

    Raises:
        ConfigError: if there is no such channel.
    """

    matcher = "avit"
    scale: Tensor
    shift: Tensor

    def __init__(
        self, channels: int, heads: int = 0, scale: float = 5.0, shift: float = -10.0, channel: int = 0
    ) -> None:
        super().__init__(channels, heads)
        if not 0 <= channel < channels:
            raise ConfigError(
                f"channel={channel} was to hold the halting score, but tokens have channels 0 … {channels - 1}"
            )
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("shift", torch.tensor(float(shift)))
        self.channel = channel

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the halting scores `[B, N]` float32, between 0 and 1, of tokens `[B, N, C]`."""
        return torch.sigmoid(self.scale.float() * tokens[:, :, self.channel].float() + self.shift.float())

    @classmethod
    def loss(cls, predictors: Mapping[int, Any], schedule: Sequence[int], tokens: int) -> Tensor | None:
        """Return the weighted ponder loss and distribution loss after a training pass; `None` if none ran.

        The distribution loss is the KL divergence of the mean score of each block, as a distribution over blocks, from a
        Gaussian whose mean is the number of blocks that a token passes on average under the schedule.

        Args:
            predictors: the gates of the model, by the position of their block.
            schedule: tokens that each block would drop, cut to the possible maximum.
            tokens: tokens that enter the first block, without protected tokens.
        """
        found = [kept for predictor in predictors.values() if (kept := predictor.take()) is not None]
        if not found:
            return None
        ponder, score = found[-1]
        share = score.mean(dim=0)
        share = share / share.sum()
        target = depth_distribution(expected_depth(schedule, tokens), len(share), share.device)
        divergence = (share * (share.clamp_min(1e-12).log() - target.log())).sum()
        loss: Tensor = PONDER_WEIGHT * ponder.mean() + DISTRIBUTION_WEIGHT * divergence
        return loss


def expected_depth(schedule: Sequence[int], tokens: int) -> float:
    """Return the number of blocks that a token passes on average, if block i drops `schedule[i]` of `tokens` tokens."""
    left, total = tokens, 0
    for r in schedule:
        total += left
        left -= r
    return total / tokens


def depth_distribution(depth: float, layers: int, device: torch.device | None = None) -> Tensor:
    """Return a Gaussian around a depth on blocks 1 … L, as probabilities `[L]` float32 of at least 1e-6."""
    at = torch.arange(1, layers + 1, dtype=torch.float32, device=device)
    density = torch.exp(-((at - depth) ** 2) / (2 * WIDTH**2)).clamp_min(1e-6)
    return density / density.sum()


class Halting(NamedTuple):
    """What A-ViT keeps for one pass, beside the sum of each token's scores.

    Attributes:
        output: `[B, C]`: sum of the class token after each block, weighted by its halting probabilities.
        ponder: `[B]`: sum of `N_k + r_k` over the tokens that halted.
        tokens: `[B]`: tokens that entered the first block.
        scores: `[B, blocks so far]`: sum of the scores of the tokens that had not halted, for each block.
    """

    output: Tensor
    ponder: Tensor
    tokens: Tensor
    scores: Tensor


@register_matcher(
    "avit",
    adaptive=True,
    learned=True,
    most="all but one",
    requires=("sizes", "class token", "after", "every block"),
)
def halting(
    metric: Tensor,
    r: int,
    protected: int = 0,
    tokens: Tensor | None = None,
    size: Tensor | None = None,
    layer: int = 0,
    layers: int = 1,
    predictor: HaltingGate | None = None,
    carried: Carried | None = None,
) -> MergePlan:
    """Drop the tokens whose halting scores add up to 1 − ε, and put A-ViT's output into the class token at the end.

    Every image halts its own tokens. A batch keeps as many rows as the image with the most tokens left; the rows of
    halted tokens among them have size 0, so that an image's result does not depend on the other images. The class
    token stays to the end, and its mean over blocks, weighted by its halting probabilities, replaces it after the last
    block. The schedule sets the depth that training aims at, and nothing in evaluation.

    Args:
        metric: `[B, N, D]`; only its device counts.
        r: not used here.
        protected: leading tokens that are never dropped; the first is the class token.
        tokens: the tokens after the block `[B, N, C]`, with their gradient.
        size: `[B, N]`: 0 for halted tokens and padding, 1 for all others.
        layer: index of the block.
        layers: number of blocks.
        predictor: the gate of the block.
        carried: the plan's `carried` of the block before; `None` in the first block.

    Raises:
        ConfigError: if the block has no gate, or an earlier block did not run this matcher.
        InputError: if `tokens` or `size` is missing.
    """
    needed_predictor(predictor, HaltingGate, layer)
    assert predictor is not None
    tokens, size = needed(tokens, "tokens", "avit"), needed(size, "size", "avit").detach()
    if is_exporting():
        raise ConfigError(
            "matcher 'avit' leaves a number of tokens that depends on the images, but exported programs have static shapes: "
            "choose another matcher"
        )
    if carried is None and layer:
        raise ConfigError(
            f"matcher 'avit' adds up a score in every block, but block {layer - 1} merged nothing: give r=…, above 0 in each block"
        )
    total, kept = _begin(tokens, size) if carried is None else (carried.tokens[:, :, 0], Halting(*carried.images))
    score = predictor(tokens)
    active = (total < 1 - EPSILON) & (size > 0)
    last = layer == layers - 1
    halts = active & ((total + score >= 1 - EPSILON) | last)
    left_over = 1 - total
    # the last block's score is 1 by definition, so that every token has halted
    score = torch.where(active, torch.ones_like(score) if last else score, 0.0)
    weight = torch.where(halts, left_over, score) * active
    kept = Halting(
        kept.output + weight[:, :1] * tokens[:, 0].float(),
        kept.ponder + torch.where(halts, layer + 1 + left_over, 0.0).sum(dim=1),
        kept.tokens,
        torch.cat([kept.scores, score.sum(dim=1, keepdim=True)], dim=1),
    )
    if last:
        if predictor.training:
            predictor.leave((kept.ponder / kept.tokens, kept.scores / kept.tokens.unsqueeze(1)))
        whole = MergePlan.identity(len(tokens), tokens.shape[1], tokens.device)
        features = torch.cat([kept.output.to(tokens.dtype).unsqueeze(1), tokens[:, 1:]], dim=1)
        return MergePlan(whole.kept, whole.source, whole.target, features=features)
    return _without_halted(active & ~halts, protected, total + score, kept)


def _begin(tokens: Tensor, size: Tensor) -> tuple[Tensor, Halting]:
    """Return the sums of scores and what the pass keeps before the first block."""
    batch, count, channels = tokens.shape
    nothing = torch.zeros(batch, 0, device=tokens.device)
    real = (size > 0).sum(dim=1).float()
    return nothing.new_zeros(batch, count), Halting(
        nothing.new_zeros(batch, channels), nothing.new_zeros(batch), real, nothing
    )


def _without_halted(active: Tensor, protected: int, total: Tensor, kept: Halting) -> MergePlan:
    """Return the plan that drops halted tokens `[B, N]`, as far as the image with the most tokens left allows."""
    stays = active.clone()
    stays[:, :protected] = True
    most = int(stays.sum(dim=1).max())  # the only number that is read from the device
    order = descending_order(stays.to(torch.int64))  # those that stay first, in their order
    rows, gone = order[:, :most], order[:, most:]
    return MergePlan(
        rows,
        gone,
        torch.full_like(gone, -1),
        drops=gone.shape[1] > 0,
        gate=stays.gather(1, rows).to(torch.float32),
        carried=Carried(total.gather(1, rows).unsqueeze(2), tuple(kept)),
    )
