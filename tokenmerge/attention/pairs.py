"""Biases between pairs of tokens (relative positions), brought from the original tokens to merged ones."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tokenmerge.errors import PatchError
from tokenmerge.ops.basics import take_rows


@dataclasses.dataclass(frozen=True, eq=False)
class PairMap:
    """Rows and columns follow the same map as the tokens.

    With `mean`, a merged token's bias is the mean over the pairs of original tokens that it stands for, as its
    value is the mean of theirs; otherwise it is that of the one token at whose position the others joined.

    Attributes:
        source: `[B, N0]`, int64: the current token of each original token; −1 where it was dropped.
        anchor: `[B, N]`, int64: the original token that each current token is positioned at.
        weight: `[B, N0]`, float32: 1 for tokens, 0 for padding.
        mean: which of the two.
    """

    source: Tensor
    anchor: Tensor
    weight: Tensor | None
    mean: bool

    def __call__(self, bias: Tensor) -> Tensor:
        """`[1 or B, H, N0, N0]` -> `[B, H, N, N]`, in the dtype of `bias`.

        Raises:
            PatchError: if the bias is for another number of original tokens.
        """
        if bias.shape[2:] != (self.source.shape[1],) * 2:
            raise PatchError(
                f"a bias for {tuple(bias.shape[2:])} tokens was given, but the model started with "
                f"{self.source.shape[1]}: use the image size that the relative positions are for"
            )
        batch, tokens = self.anchor.shape
        if not self.mean:
            rows = bias.expand(batch, -1, -1, -1).permute(0, 2, 1, 3)  # [B, N0, H, N0]
            rows = take_rows(rows.flatten(2), self.anchor).unflatten(2, rows.shape[2:])
            columns = rows.permute(0, 3, 2, 1)  # [B, N0, H, N]
            both = take_rows(columns.flatten(2), self.anchor).unflatten(2, columns.shape[2:])
            chosen: Tensor = both.permute(0, 2, 3, 1)
            return chosen
        member = torch.zeros(batch, tokens, self.source.shape[1], dtype=torch.float32, device=bias.device)
        counts = torch.ones_like(self.source, dtype=torch.float32) if self.weight is None else self.weight
        counts = counts * (self.source >= 0)
        member = member.scatter_(1, self.source.clamp_min(0).unsqueeze(1), counts.unsqueeze(1))
        member = (member / member.sum(dim=2, keepdim=True).clamp_min(1)).unsqueeze(1)
        moved: Tensor = member @ bias.float() @ member.transpose(2, 3)
        return moved.to(bias.dtype)
