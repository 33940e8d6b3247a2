"""`Trace`: the merges of one forward pass, recorded with `patch(..., trace=True)`."""

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
from tokenmerge.tracing.moments import Moments, moments_of
from tokenmerge.tracing.paint import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Trace:
    """Record of the merges of one forward pass.

    `handle.trace` is the trace of the latest complete pass, and `trace_of(features)` returns the trace of the pass that
    produced some features. The methods `unmerge` and `to_grid` use the plans that their features carry, whichever pass the trace
    belongs to; they also work in hooks of inner blocks and in exported programs.

    Example:
        >>> import timm, torch, tokenmerge
        >>> model = timm.create_model("test_vit").eval()  # 100 patches and a class token, 6 blocks
        >>> handle = tokenmerge.patch(model, r=8, trace=True)
        >>> features = model.forward_features(torch.zeros(1, 3, 160, 160))
        >>> features.shape[1], handle.trace.source().shape, handle.trace.to_grid(features).shape[2:]
        (53, torch.Size([1, 101]), torch.Size([10, 10]))
    """

    def __init__(self, state: TokenState | None, grid: tuple[int, ...] | None = None) -> None:
        """Create a trace.

        Args:
            state: state of the tokens that left the last block; `None` if no pass has finished, so that only the methods
                that take features work.
            grid: patches along each axis, if the pass did not record them.
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
        """Return the same trace with a grid, for models whose passes do not record one (NaFlex, Siglip2, Pixtral).

        Args:
            grid: patches along each axis: `(h, w)`, or `(t, h, w)` for video.

        Raises:
            InputError: if `grid` is not a sequence of positive whole numbers.
        """
        if not isinstance(grid, list | tuple) or not grid or not all(is_count(side) and side > 0 for side in grid):
            raise InputError(
                f"grid={grid!r}, but patches along each axis were expected: give (h, w), or (t, h, w) for video"
            )
        return Trace(self._left, tuple(grid))

    # --- the pass ----------------------------------------------------------------------------------------------

    @property
    def steps(self) -> tuple[Step, ...]:
        """The step of each block that ran: plan, sizes, similarity and attention."""
        return self._state().steps

    @property
    def plans(self) -> tuple[MergePlan | None, ...]:
        """The plan of each block that ran; `None` for blocks that merged nothing."""
        return tuple(step.plan for step in self.steps)

    @property
    def sizes(self) -> tuple[Tensor | None, ...]:
        """Patches per token after each of those blocks, `[B, N]` float32; `None` if all are 1."""
        return tuple(step.size for step in self.steps)

    @property
    def similarities(self) -> tuple[Tensor | None, ...]:
        """Cosine similarity between each merged token and the token it joined, in the metric of the matching.

        One tensor `[B, r]` per block in the order of `plan.source`, with NaN for dropped tokens; `None` for blocks that merged
        nothing.
        """
        return tuple(step.similarity for step in self.steps)

    @property
    def attention(self) -> tuple[Tensor | None, ...]:
        """Attention from the class token to every token in each block, `[B, N]` float32, averaged over heads.

        In models without a class token it is the mean over all queries. `None` without `trace="attention"`, and for
        blocks whose attention cannot be recorded.
        """
        return tuple(step.attention for step in self.steps)

    @property
    def protected(self) -> int:
        """Number of leading tokens that never merge (class and register tokens)."""
        return self._state().run.settings.protected

    @property
    def tokens(self) -> int:
        """N₀, the tokens per image that entered the first block."""
        return self._state().run.tokens

    @property
    def batch(self) -> int:
        """B, the images in the batch."""
        return self._state().run.batch

    @property
    def grid(self) -> tuple[int, ...] | None:
        """Patches along each axis in this pass, `(h, w)`, `(t, h, w)` or `(t,)`; `None` if they were not recorded."""
        return self._grid_given or self._state().run.grid

    @property
    def known_grid(self) -> tuple[int, ...]:
        """The grid, checked against the number of patches.

        Raises:
            InputError: if the grid is unknown or has another number of patches than the pass.
        """
        return _checked_grid(self.grid, self.tokens - self.protected)

    @property
    def device(self) -> torch.device:
        """Device of the plans."""
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
        """Return the token that each original token has become.

        Args:
            block: index of the block after which to look; `None` is the last block that ran.

        Returns:
            `[B, N₀]` int64; −1 for dropped tokens.

        Raises:
            InputError: if the pass had no such block.
        """
        source = source_map(self._until(block))
        return torch.arange(self.tokens, device=self.device).expand(self.batch, -1) if source is None else source

    def size(self, block: int | None = None) -> Tensor:
        """Return the number of patches per token.

        Args:
            block: index of the block after which to look; `None` is the last block that ran.

        Returns:
            `[B, N']` float32.

        Raises:
            InputError: if the pass had no such block.
        """
        self._until(block)
        size = self.sizes[-1 if block is None else block]
        return torch.ones(self.batch, self.tokens, device=self.device) if size is None else size

    # --- pixels ------------------------------------------------------------------------------------------------

    def regions(self, shape: Sequence[int], block: int | None = None, image: int = 0) -> Tensor:
        """Return the token that each pixel belongs to.

        Tokens are numbered by their first patch in row-major order, so a token keeps its number from block to block.

        Args:
            shape: pixels along each axis of the grid: `(H, W)`, or `(T, H, W)` for video.
            block: index of the block after which to look; `None` is the last block that ran.
            image: index of the image in the batch.

        Returns:
            int64 tensor of that shape on the CPU; −1 for dropped patches.

        Raises:
            InputError: if there is no such block or image, or the grid is unknown or has another number of axes.
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
        """Draw the merged tokens over a picture.

        Args:
            picture: the model's input as a picture: a tensor `[C, H, W]` in [0, 1] with C = 1 or 3, an array `[H, W, C]` of bytes,
                or a Pillow image; for video a tensor `[T, C, H, W]`. It may be larger than the model's input, but must show the
                same content.
            block: index of the block after which to draw, or several; "all" draws the input and four blocks up to the last;
                `None` is the last block that ran.
            view: "picture", each token in its mean colour; "outlines"; "sizes"; "tokens", each token in a colour that it
                keeps from block to block; or "frames", how many frames of a video each token lies in.
            image: index of the image in the batch.

        Returns:
            A matplotlib Figure, which notebooks display.

        Raises:
            InputError: if matplotlib is missing, there is no such block or image, or the picture's axes do not fit the grid.
        """
        from tokenmerge.tracing.figure import plot_regions

        titles = [f"{self.size(which).shape[1] - self.protected} tokens" for which in range(len(self.steps))]
        patches = self.tokens - self.protected
        return plot_regions(
            lambda shape, which: self.regions(shape, which, image), titles, patches, picture, block, view
        )

    def over_time(self) -> list[Moments]:
        """Return for each block of a clip's pass how many merges join tokens of one moment, and how many join moments.

        Raises:
            InputError: if the pass was none on clips, or its grid is unknown.

        Example:
            >>> import timm, torch, tokenmerge, tokenmerge.models.video_mae
            >>> model = timm.create_model("video_mae_vit_tiny_patch16_224", num_frames=4, img_size=64).eval()
            >>> handle = tokenmerge.patch(model, r=4, matcher="temporal", trace=True)  # pairs of one moment first
            >>> logits = model(torch.randn(1, 4, 3, 64, 64))
            >>> first = handle.trace.over_time()[0]
            >>> first.merged, first.within, first.across, first.spanned
            (4.0, 1.0, 0.0, 1.0)
        """
        return moments_of(self.plans, self.known_grid, self.batch, self.protected)

    def rollout(self) -> Tensor:
        """Return attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928) from the class token to each patch.

        Rollout is the product of the attention matrices of all blocks, each averaged with the identity for the residual. The
        row of a merged token is the size-weighted mean of its members' rows. Without a class token, the result is the
        size-weighted mean over all tokens.

        Returns:
            `[B, *grid]` float32, such as `[B, h, w]`. Together with the share of the protected tokens it sums to 1.

        Raises:
            InputError: if the pass ran without `trace="rollout"`, attention cannot be recorded, or the grid is unknown.
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
        """Copy the features of each token to all of its original tokens, by the plans that the features carry.

        Features that were unmerged before are returned unchanged. A gradient, as a tensor hook receives it, is divided among
        the members of a token, so that sums are preserved.

        Args:
            features: output of a patched model or of one of its blocks, `[B, N', C]`.

        Returns:
            `[B, N₀, C]` in the dtype of `features`; dropped tokens are 0.

        Raises:
            InputError: if the features carry no state of a pass.
            PatchError: if tokens merged but their plans were not kept (patch with `trace=True`).
        """
        return unmerged(features)

    def to_grid(self, features: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """Return dense feature maps on the grid of patches, by the plans and the grid that the features carry.

        Args:
            features: output of a patched model or of one of its blocks, merged `[B, N', C]` or unmerged `[B, N₀, C]`, including
                protected tokens.
            grid: patches along each axis, if the pass did not record them.

        Returns:
            `[B, C, h, w]`, or `[B, C, t, h, w]` for video, in the dtype of `features`.

        Raises:
            InputError: if the features carry no state of a pass, or the grid is unknown or has another number of patches.
            PatchError: if tokens merged but their plans were not kept (patch with `trace=True`).
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
    """Unmerge features as `Trace.unmerge` does, without a trace; the model must be patched with `trace=True`."""
    state = _carried(features)
    if state.merged is not None or not state.plans:
        return features
    values = features / state.size.unsqueeze(2).to(features) if state.shared and state.size is not None else features
    full = spread_rows(values, _source(state).to(features.device), state.drops)
    return attach(full, dataclasses.replace(state, merged=features))  # one patch per token: pooling weights are 1


def _source(state: TokenState) -> Tensor:
    source = state.source()
    assert source is not None
    return source


def trace_of(features: Tensor) -> Trace:
    """Return the trace of the pass that produced some features, up to the block that returned them.

    Args:
        features: output of a model patched with `trace=True`, or of one of its blocks.

    Raises:
        InputError: if the features carry no state of a pass.
        PatchError: if tokens merged but their plans were not kept (patch with `trace=True`).

    Example:
        >>> import timm, torch, tokenmerge
        >>> model = timm.create_model("test_vit").eval()
        >>> with tokenmerge.patched(model, r=8, trace=True):
        ...     features = model.forward_features(torch.zeros(1, 3, 160, 160))
        >>> tokenmerge.trace_of(features).size().sum()
        tensor(101.)
    """
    return Trace(_carried(features))
