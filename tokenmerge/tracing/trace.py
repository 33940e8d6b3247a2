"""What a forward pass merged, when asked for by `patch(..., trace=True)`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenmerge.errors import InputError, PatchError
from tokenmerge.ops.basics import spread_rows
from tokenmerge.patching.state import Step, TokenState, attach, carried_state, plans_needed
from tokenmerge.plan import MergePlan, source_map
from tokenmerge.schedule import is_count
from tokenmerge.tracing.paint import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Trace:
    """Which tokens became one during one forward pass.

    Methods that are given features (`unmerge`, `to_grid`) read what those very features carry, whenever and wherever they are
    called: before the pass by order of evaluation, in a hook of an inner block, in an exported program. All others are about
    the pass that the trace is of: `handle.trace` is the latest whole one, `trace_of(features)` that of some features.
    """

    def __init__(self, state: TokenState | None, grid: tuple[int, ...] | None = None) -> None:
        """Args:
        state: what left the last block of the pass; `None` if none had run yet, so that features must be given.
        grid: patches along each axis, where the pass did not see them.
        """
        self._left, self._grid_given = state, grid

    def _state(self) -> TokenState:
        if self._left is None:
            raise PatchError(
                "no forward pass had run to its end when this trace was asked for: call the model, then ask handle.trace again, or "
                "give the features of a pass to unmerge or to_grid"
            )
        return self._left

    def with_grid(self, grid: Sequence[int]) -> Trace:
        """The same trace with patches laid out so: for models whose grid no pass sees (NaFlex, Siglip2, Pixtral)."""
        if not isinstance(grid, list | tuple) or not grid or not all(is_count(side) and side > 0 for side in grid):
            raise InputError(
                f"grid={grid!r}, but patches along each axis were expected: give (h, w), or (t, h, w) for video"
            )
        return Trace(self._left, tuple(grid))

    # --- what the pass was -----------------------------------------------------------------------------------

    @property
    def steps(self) -> tuple[Step, ...]:
        """What each block that ran did."""
        return self._state().steps

    @property
    def plans(self) -> tuple[MergePlan | None, ...]:
        """One per block that ran, `None` where it merged nothing."""
        return tuple(step.plan for step in self.steps)

    @property
    def sizes(self) -> tuple[Tensor | None, ...]:
        """Patches per token after each of those blocks, `[B, N]` float32, `None` where all are 1."""
        return tuple(step.size for step in self.steps)

    @property
    def similarities(self) -> tuple[Tensor | None, ...]:
        """Cosine of each token that merged and of the token it joined, in what matching compared.

        One `[B, r]` per block, in the order of its plan's sources, NaN for tokens that were dropped; `None` where none merged.
        """
        return tuple(step.similarity for step in self.steps)

    @property
    def attention(self) -> tuple[Tensor | None, ...]:
        """Of the class token to the tokens that took part in each block's attention, `[B, N]`, mean over heads.

        In models without a class token the mean over all tokens that look. `None` without `trace="attention"`, or where
        attention cannot be looked into.
        """
        return tuple(step.attention for step in self.steps)

    @property
    def protected(self) -> int:
        """Leading tokens that never merge."""
        return self._state().run.settings.protected

    @property
    def tokens(self) -> int:
        """Tokens per image that entered the first block (N0)."""
        return self._state().run.tokens

    @property
    def batch(self) -> int:
        """Images in the pass (B)."""
        return self._state().run.batch

    @property
    def grid(self) -> tuple[int, ...] | None:
        """Patches along each axis in this very pass, `(h, w)`, `(t, h, w)` or `(t,)`; `None` if nobody saw them."""
        return self._grid_given or self._state().run.grid

    @property
    def known_grid(self) -> tuple[int, ...]:
        """The grid, which holds all patches of the pass.

        Raises:
            InputError: if it is unknown, or holds another number of patches.
        """
        return _checked_grid(self.grid, self.tokens - self.protected)

    @property
    def device(self) -> torch.device:
        """Where the plans are."""
        plan = next(iter(self._state().plans), None)
        return torch.device("cpu") if plan is None else plan.kept.device

    def _until(self, block: int | None) -> tuple[MergePlan, ...]:
        steps = self.steps
        known = block is None or (isinstance(block, int) and not isinstance(block, bool))
        if not known or (block is not None and not -len(steps) <= block < len(steps)):
            raise InputError(
                f"block {block!r} is not in this trace, which has blocks 0 … {len(steps) - 1}: give one of them"
            )
        end = len(steps) if block is None else range(len(steps))[block] + 1
        return tuple(step.plan for step in steps[:end] if step.plan is not None)

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

    # --- where tokens are --------------------------------------------------------------------------------------

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

        if not isinstance(image, int) or isinstance(image, bool) or not -self.batch <= image < self.batch:
            raise InputError(
                f"image {image!r} is not in this trace, which has images 0 … {self.batch - 1}: give one of them"
            )
        return region_map(anchors(self.source(block)[image, self.protected :]), self.known_grid, shape)

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
        from tokenmerge.tracing.figure import plot_regions

        titles = [f"{self.size(which).shape[1] - self.protected} tokens" for which in range(len(self.steps))]
        patches = self.tokens - self.protected
        return plot_regions(
            lambda shape, which: self.regions(shape, which, image), titles, patches, picture, block, view
        )

    def rollout(self) -> Tensor:
        """Attention rollout (Abnar & Zuidema 2020) over merged tokens: how much each patch reached the class token.

        Attention of all blocks, each half attention and half residual, multiplied; a merged token passes on the
        size-weighted mean of its members' parts. Without a class token, the mean over tokens by size.

        Returns:
            `[B, *grid]` float32, such as `[B, h, w]`; with the prefix tokens' part it sums to 1.

        Raises:
            InputError: without `trace="rollout"`, where attention cannot be looked into, or if the grid is unknown.
        """
        state = self._state()
        if state.rollout is None:
            raise InputError(
                "this pass kept no rollout: patch with trace='rollout', and use fused ('sdpa') attention, which can be looked into"
            )
        settings = state.run.settings
        if settings.class_token:
            reached = state.rollout[:, 0]
        else:
            size = (
                torch.ones(state.rollout.shape[:2], device=state.rollout.device) if state.size is None else state.size
            )
            reached = (state.rollout * size.unsqueeze(2)).sum(dim=1) / size.sum(dim=1, keepdim=True)
        grid = self.known_grid
        heat: Tensor = reached[:, settings.protected :].unflatten(1, grid)
        return heat

    # --- features ----------------------------------------------------------------------------------------------

    def unmerge(self, features: Tensor) -> Tensor:
        """Spread features over the patches again, by the plans that they carry: `[B, N, C]` -> `[B, N0, C]`.

        Features that were spread already come back as they are. Of a gradient, which comes to a tensor hook, patches share
        what their token has, so that sums stay.

        Args:
            features: what a patched model, or one of its blocks, put out.

        Raises:
            InputError: if the features carry nothing.
            PatchError: if tokens merged and their plans did not travel (`trace=True` lets them).
        """
        return unmerged(features)

    def to_grid(self, features: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """Dense maps of features, by the plans and the grid that they carry: `[B, C, h, w]` or `[B, C, t, h, w]`.

        Args:
            features: what a patched model, or one of its blocks, put out: `[B, N, C]` merged, or `[B, N0, C]` unmerged, prefix
                tokens included.
            grid: patches along each axis, where the pass did not see them.

        Raises:
            InputError: if the features carry nothing, or the grid is unknown or does not hold as many patches.
            PatchError: if tokens merged and their plans did not travel (`trace=True` lets them).
        """
        full, run = unmerged(features), _carried(features).run
        patches = run.tokens - run.settings.protected
        seen = self._grid_given or run.grid
        known = _checked_grid(seen if grid is None else self.with_grid(grid)._grid_given, patches)
        maps: Tensor = full[:, full.shape[1] - patches :].transpose(1, 2).unflatten(2, known)
        return maps


def _checked_grid(grid: tuple[int, ...] | None, patches: int) -> tuple[int, ...]:
    if grid is None or math.prod(grid) != patches:
        raise InputError(
            f"the pass had {patches} patches, but the grid is {grid}: give grid=(h, w), or (t, h, w) for video, or ask "
            "trace.with_grid((h, w))"
        )
    return tuple(grid)


def _carried(features: Tensor) -> TokenState:
    return plans_needed(carried_state(features, "plans", "a patched model or block gave"), "unmerging")


def unmerged(features: Tensor) -> Tensor:
    """`Trace.unmerge`, for features of any patched model whose plans travel (`trace=True`)."""
    state = _carried(features)
    if state.merged is not None or not state.plans:
        return features
    values = features / state.size.unsqueeze(2).to(features) if state.shared and state.size is not None else features
    full = spread_rows(values, _source(state).to(features.device), state.drops)
    return attach(full, dataclasses.replace(state, merged=features))  # one patch per token: pooling takes it as it is


def _source(state: TokenState) -> Tensor:
    source = state.source()
    assert source is not None
    return source


def trace_of(features: Tensor) -> Trace:
    """The trace of the very pass that these features come from, up to the block that gave them; no handle is needed.

    Args:
        features: what a model that was patched with `trace=True`, or one of its blocks, put out.

    Raises:
        InputError: if they carry nothing.
        PatchError: if tokens merged and their plans did not travel.
    """
    return Trace(_carried(features))
