"""What learned matchers share: the base class of their networks, and masks through which they are trained.

All other matchers work without training. A learned matcher has a small network in each block that drops tokens, its
predictor, whose weights `tokenmerge train --matcher NAME` trains together with the model. A token that is gone while
its row must stay has size 0: it counts nothing in attention and in means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenmerge.errors import ConfigError
from tokenmerge.ops.basics import is_recomputing

PREDICTOR = "tokenmerge_predictor"
"""Name of the attribute of a block that holds its predictor."""
ALMOST_NOTHING = 1e-6
"""Factor on the size of a token that is sampled to be dropped in training.

It is not 0, because the gradient passes through `log size`. The attention to the token is proportional to
`size · exp(qk)`, whose derivative with respect to the size is the same for a tiny size as for 0.
"""
RATIO_WEIGHT = 2.0
"""Weight of the loss that pulls predictors towards the target number of tokens (DynamicViT, section 3.3; SPViT)."""


class Predictor(nn.Module):
    """Network of a learned matcher in one block; a subclass for each matcher.

    Args:
        channels: C of the tokens.
        heads: H of the block's attention; 0 if it is not known, which only SPViT asks for.

    Attributes:
        matcher: name of the matcher that it belongs to.
        kept: what the latest training pass left for the loss, with its gradient; `None` before it.

    Raises:
        ConfigError: if the network cannot be made for this many channels or heads.
    """

    matcher: ClassVar[str]
    kept: Any

    def __init__(self, channels: int, heads: int = 0) -> None:
        super().__init__()
        self.channels, self.heads = channels, heads
        self.kept = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without `kept`, which belongs to the autograd graph of the latest pass."""
        return {**self.__dict__, "kept": None}

    def leave(self, kept: Any) -> None:
        """Leave what the loss needs, unless backward is running the block again, whose pass was counted already."""
        if not is_recomputing():
            self.kept = kept

    def take(self) -> Any:
        """Return what the latest training pass left for the loss, and let go of it, so that each pass counts once."""
        found, self.kept = self.kept, None
        return found

    @classmethod
    def loss(cls, predictors: Mapping[int, Any], schedule: Sequence[int], tokens: int) -> Tensor | None:
        """Return the weighted loss of all predictors of a model after a training pass; `None` if none ran.

        The default is DynamicViT's ratio loss: the mean over predictors of `(kept − wanted)²`, times 2, where kept is the
        fraction of the tokens that the predictor kept, and wanted the fraction that the schedule leaves.

        Args:
            predictors: the predictors of the model, by the position of their block.
            schedule: tokens that each block drops, cut to the possible maximum.
            tokens: tokens that enter the first block, without protected tokens.
        """
        parts = []
        for index, predictor in predictors.items():
            kept = predictor.take()
            if kept is not None and schedule[index]:
                parts.append((kept - (1 - sum(schedule[: index + 1]) / tokens)).square().mean())
        return RATIO_WEIGHT * torch.stack(parts).mean() if parts else None


def needed_predictor(predictor: Any, kind: type[Predictor], layer: int) -> None:
    """Raise `ConfigError` unless a block has the predictor of its matcher."""
    if isinstance(predictor, kind):
        return
    found = "no trained predictor" if predictor is None else f"a predictor of {getattr(predictor, 'matcher', '?')!r}"
    raise ConfigError(
        f"matcher {kind.matcher!r} drops tokens in block {layer}, which has {found}: train the model with "
        f"`tokenmerge train --matcher {kind.matcher}`, or add_predictors(model, blocks, {kind.matcher!r}) of "
        "tokenmerge.patching.predictors and your own loop"
    )


def present(size: Tensor) -> tuple[Tensor, Tensor]:
    """Return which tokens are no padding, `[B, M]` bool, and their number in each image, `[B]` of at least 1."""
    real = size > 0
    return real, real.sum(dim=1).clamp_min(1)


def mean_of_present(x: Tensor, size: Tensor) -> Tensor:
    """Return the mean `[B, …, 1, D]` of the tokens `x [B, …, M, D]`, weighted by their sizes `[B, …, M]`."""
    weight = size.to(x.dtype).unsqueeze(-1)
    return (x * weight).sum(dim=-2, keepdim=True) / weight.sum(dim=-2, keepdim=True).clamp_min(1e-6)


def sampled(log_score: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample which tokens stay in a training pass, with a straight-through gradient (Gumbel-softmax).

    Args:
        log_score: log-probabilities of keeping and of dropping each token, `[B, M, 2]`.
        size: `[B, M]`: 1 for tokens that are still there, almost 0 for tokens dropped by earlier blocks.

    Returns:
        `[B, M]` stays, 1 or 0 with gradient; `[B, M]` bool, whether a token was still there; and `[B, M]` factors on the
        sizes with gradient. Tokens dropped earlier have factor 1, because products of factors would underflow.
    """
    stays = F.gumbel_softmax(log_score, hard=True, dim=2)[:, :, 0]
    here = size > 0.5
    return stays, here, torch.where(here, stays * (1 - ALMOST_NOTHING) + ALMOST_NOTHING, 1.0)
