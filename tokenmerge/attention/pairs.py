"""Biases between pairs of tokens (relative positions), moved from the original tokens to merged ones.

The bias of a merged token is the mean over the pairs of original tokens that it stands for. As a matrix product with the
tokens' map on both sides, `M bias Mᵀ`, this mean would cost more than attention itself. Gathering and adding first rows
and then columns takes work proportional to N₀² and no matrix product.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tokenmerge.errors import PatchError
from tokenmerge.ops.basics import flat_rows


@dataclasses.dataclass(frozen=True, eq=False)
class PairMap:
    """Map of a bias between original tokens to the current tokens: rows and columns follow the same map as the tokens.

    Attributes:
        source: `[B, N₀]` int64: the current token of each original token; −1 if it was dropped.
        anchor: `[B, N]` int64: the original token at whose position each current token stands.
        joined: `[B, N₀ − N]` int64: all other original tokens.
        weight: `[B, N₀]` float32: 1 for tokens, 0 for padding; `None` without padding.
        mean: whether a merged token gets the mean bias over all its pairs; otherwise it gets the bias of its anchor.
        drops: whether `source` may contain −1.
    """

    source: Tensor
    anchor: Tensor
    joined: Tensor
    weight: Tensor | None
    mean: bool
    drops: bool

    def __call__(self, bias: Tensor) -> Tensor:
        """Return the bias between the current tokens.

        Args:
            bias: `[1 or B, H, N₀, N₀]`, any floating dtype: the bias between the original tokens.

        Returns:
            Bias `[B, H, N, N]` in the dtype of `bias`; means are accumulated in float32 (float64 for float64).

        Raises:
            PatchError: if the bias is for another number of original tokens.
        """
        if bias.shape[2:] != (self.source.shape[1],) * 2:
            raise PatchError(
                f"a bias for {tuple(bias.shape[2:])} tokens was given, but the model started with "
                f"{self.source.shape[1]}: use the image size that the relative positions are for"
            )
        heads, original = bias.shape[1:3]
        batch, tokens = self.anchor.shape
        rows = bias.transpose(1, 2).reshape(-1, heads * original)  # [1 or B of N₀, H·N₀]
        if not self.mean:
            moved = rows.index_select(0, self._rows_of(self.anchor, bias)).view(batch, tokens * heads, original)
            return self._by_head(moved.gather(2, self._for_columns(self.anchor, heads)))
        wide = torch.promote_types(bias.dtype, torch.float32)
        target, share = self.source.gather(1, self.joined), None
        if self.drops or self.weight is not None:
            share = self._shares(target)
            target = target.clamp_min(0)
        # first rows, then columns: each anchor's own, plus those of the tokens that joined it
        rows = rows.to(wide)
        kept = rows.index_select(0, self._rows_of(self.anchor, bias))
        joining = rows.index_select(0, self._rows_of(self.joined, bias))
        if share is not None:
            kept, joining = kept * share[0].reshape(-1, 1), joining * share[1].reshape(-1, 1)
        kept = kept.index_add(0, flat_rows(target, tokens), joining).view(batch, tokens * heads, original)
        columns = kept.gather(2, self._for_columns(self.anchor, heads))
        joining = kept.gather(2, self._for_columns(self.joined, heads))
        if share is not None:
            columns, joining = columns * share[0].unsqueeze(1), joining * share[1].unsqueeze(1)
        columns = columns.scatter_add(2, self._for_columns(target, heads), joining)
        one = torch.ones((), dtype=wide, device=bias.device)
        own, others = (one.expand_as(self.anchor), one.expand_as(target)) if share is None else share
        count = own.scatter_add(1, target, others).clamp_min(1.0)
        return (self._by_head(columns) / (count[:, None, :, None] * count[:, None, None, :])).to(bias.dtype)

    def _shares(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights in means of the anchors `[B, N]` and of the others `[B, N₀ − N]`; 0 if dropped or padding."""
        alive = (target >= 0).to(torch.float32)
        if self.weight is None:
            return torch.ones_like(self.anchor, dtype=torch.float32), alive
        return self.weight.gather(1, self.anchor), alive * self.weight.gather(1, self.joined)

    def _rows_of(self, index: Tensor, bias: Tensor) -> Tensor:
        """Return the row numbers of an index `[B, M]` in a bias that each image has for itself, or that all images share."""
        return index.reshape(-1) if bias.shape[0] == 1 else flat_rows(index, bias.shape[2])

    def _for_columns(self, index: Tensor, heads: int) -> Tensor:
        """Expand an index `[B, M]` to gather columns from `[B, N·H, N₀]`."""
        return index.unsqueeze(1).expand(-1, self.anchor.shape[1] * heads, -1)

    def _by_head(self, moved: Tensor) -> Tensor:
        """Return `[B, N·H, N]` as `[B, H, N, N]`, a view with the strides that attention prefers."""
        batch, tokens = self.anchor.shape
        return moved.view(batch, tokens, -1, tokens).transpose(1, 2)
