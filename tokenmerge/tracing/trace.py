"""The plans of the latest forward pass, when asked for by `patch(..., trace=True)`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.patching.state import TokenState, carry
from tokenmerge.plan import MergePlan, source_map, spread_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tokenmerge.tracing import View


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Which tokens became one during one forward pass.

    Attributes:
        plans: one per block that ran, `None` where it merged nothing.
        sizes: patches per token after each of those blocks, `[B, N]` float32, `None` where all are 1.
        protected: leading tokens that never merge.
        tokens: tokens per image that entered the first block (N0).
        batch: images in the pass (B).
        device: where the tokens were.
        grid: patches along each axis, `(h, w)` or `(t, h, w)`, at the model's own input size; `None` if unknown.
        similarities: cosine of each token that merged and of the token it joined, in what matching compared: one `[B, r]`
            per block, in the order of its plan's sources, NaN for tokens that were dropped; `None` where none merged.
        attention: of the class token to the tokens that took part in each block's attention, `[B, N]`, mean over heads; in
            models without a class token the mean over all tokens that look. `None` without `trace="attention"`, or where
            attention cannot be looked into.
    """

    plans: tuple[MergePlan | None, ...]
    sizes: tuple[Tensor | None, ...]
    protected: int
    tokens: int
    batch: int
    device: torch.device
    grid: tuple[int, ...] | None = None
    similarities: tuple[Tensor | None, ...] = ()
    attention: tuple[Tensor | None, ...] = ()

    def _until(self, block: int | None) -> tuple[MergePlan, ...]:
        count = len(self.plans)
        if block is not None and not -count <= block < count:
            raise InputError(f"block {block} is not in this trace, which has blocks 0 … {count - 1}")
        end = count if block is None else range(count)[block] + 1
        return tuple(plan for plan in self.plans[:end] if plan is not None)

    def source(self, block: int | None = None) -> Tensor:
        """`[B, N0]`, int64: which token each original token has become after `block` (default: the last).

        −1 for tokens that were dropped.

        Raises:
            InputError: if the pass had no such block.
        """
        source = source_map(self._until(block))
        return torch.arange(self.tokens, device=self.device).expand(self.batch, -1) if source is None else source

    def size(self, block: int | None = None) -> Tensor:
        """`[B, N]`, float32: patches per token after `block` (default: the last).

        Raises:
            InputError: if the pass had no such block.
        """
        self._until(block)
        size = self.sizes[-1 if block is None else block]
        return torch.ones(self.batch, self.tokens, device=self.device) if size is None else size

    def regions(self, shape: Sequence[int], block: int | None = None, image: int = 0) -> Tensor:
        """Which token each pixel belongs to after `block` (default: the last).

        Args:
            shape: pixels along each axis of the grid: `(H, W)`, or `(T, H, W)` for video.
            block: from 0.
            image: which of the batch.

        Returns:
            int64 of that shape, on the CPU: the first patch, row by row, of the token that the pixel's patch has become,
            which stays its number from block to block; −1 if it was dropped.

        Raises:
            InputError: if there is no such block or image, or the grid is unknown or of other axes.
        """
        from tokenmerge.tracing.regions import anchors, region_map

        if not -self.batch <= image < self.batch:
            raise InputError(f"image {image} is not in this trace, which has images 0 … {self.batch - 1}")
        return region_map(anchors(self.source(block)[image, self.protected :]), self._grid(), shape)

    def _grid(self) -> tuple[int, ...]:
        if self.grid is None or math.prod(self.grid) != self.tokens - self.protected:
            raise InputError(
                f"the pass had {self.tokens - self.protected} patches, but the grid is {self.grid}: give images of the model's "
                "own input size, or dataclasses.replace(trace, grid=(h, w))"
            )
        return self.grid

    def plot(
        self,
        picture: Any,
        block: int | Sequence[int] | Literal["all"] | None = None,
        view: View = "picture",
        image: int = 0,
    ) -> Figure:
        """Draw which patches became one token.

        Args:
            picture: what the model was given, to look at: `[C, H, W]` in [0, 1], C 1 or 3, or bytes `[H, W, C]`, or a Pillow
                image; of a video `[T, C, H, W]` in [0, 1]. It may be larger than the model's input, but must show the same.
            block: after which block, from 0; several; "all" for the input and four blocks up to the last (default: the last).
            view: "picture", every token in its mean colour; "outlines"; "sizes"; "tokens", a colour that stays the token's.
            image: which of the batch.

        Returns:
            A matplotlib Figure; in a notebook it shows itself.

        Raises:
            InputError: if matplotlib is missing, there is no such block or image, or the picture has other axes than the grid.
        """
        from tokenmerge.tracing.figure import plot_trace

        return plot_trace(self, picture, block, view, image)

    def unmerge(self, features: Tensor, block: int | None = None) -> Tensor:
        """Spread merged features back: `[B, N, C]` after `block` (default: the last) -> `[B, N0, C]`.

        Raises:
            InputError: if the features have another number of images or tokens than that block left.
        """
        plans = self._until(block)
        left = plans[-1].tokens_out if plans else self.tokens
        if features.dim() != 3 or features.shape[:2] != (self.batch, left):
            raise InputError(
                f"features are {tuple(features.shape)}, but this trace unmerges [{self.batch}, {left}, C]: "
                "give it the features of the pass that it traced"
            )
        source = source_map(plans)
        full = self._spread(features, plans, source)
        return carry(full, TokenState())  # one patch per token: pooling takes it as it is

    @staticmethod
    def _spread(features: Tensor, plans: tuple[MergePlan, ...], source: Tensor | None) -> Tensor:
        if source is None:
            return features.clone()
        return spread_rows(features, source.to(features.device), any(plan.drops for plan in plans))

    def to_grid(self, features: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """Dense maps: `[B, N, C]` merged, or `[B, N0, C]` unmerged, -> `[B, C, h, w]` or `[B, C, t, h, w]`.

        Args:
            features: tokens after the last block, or unmerged ones, prefix tokens included or already left out.
            grid: patches along each axis, if they are not those of the model's own input size.

        Raises:
            InputError: if the grid is unknown, or does not hold as many patches as the pass had.
        """
        patches = self.tokens - self.protected
        grid = grid or self.grid
        if grid is None or math.prod(grid) != patches:
            raise InputError(
                f"the pass had {patches} patches, but the grid is {grid}: give grid=(h, w), or (t, h, w) for video"
            )
        if features.dim() != 3 or features.shape[1] not in (self.tokens, patches):
            features = self.unmerge(features)
        maps: Tensor = features[:, features.shape[1] - patches :].transpose(1, 2).unflatten(2, grid)
        return maps
