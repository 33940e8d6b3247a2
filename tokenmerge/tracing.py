"""The plans of the latest forward pass, when asked for by `patch(..., trace=True)`."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.plan import MergePlan, source_map, spread_rows
from tokenmerge.state import TokenState, carry


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
    """

    plans: tuple[MergePlan | None, ...]
    sizes: tuple[Tensor | None, ...]
    protected: int
    tokens: int
    batch: int
    device: torch.device
    grid: tuple[int, ...] | None = None

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
