"""Rotary position embeddings of merged tokens, at the size-weighted mean of their patches' coordinates.

Rotary attention rotates q and k by `angle = coordinates · frequencies`. Upstream passes its blocks a table of sines and
cosines with one row per patch. A merged token lies between patches and needs a row of its own: its coordinates are
recovered from upstream's table (which may be augmented, cropped or resized in every pass), merged like tokens, and
converted back to sines and cosines. Only the frequencies must be known.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokenmerge.errors import PatchError
from tokenmerge.ops.basics import no_autocast
from tokenmerge.ops.modes import has_values

_STEP = 24.0  # largest ratio of two frequencies at which one angle unwraps the next in half precision


class Rotary(Protocol):
    """Conversion between the rotary table of one block and the coordinates of its tokens; P is the number of axes."""

    @property
    def module(self) -> nn.Module:
        """Upstream's module that computes the table."""
        ...

    def positions(self, table: Any) -> Tensor:
        """Return the coordinates `[1 or B, N, P]` float32 of the tokens that `table` rotates."""
        ...

    def table(self, positions: Tensor, like: Any) -> Any:
        """Return the table for coordinates `[B, N, P]`, in the format and dtype of upstream's table `like`."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class AxialRotary:
    """Rotary embedding in which each channel rotates by one coordinate (EVA-02, DINOv3, Pixtral, MRoPE and others).

    Attributes:
        module: upstream's module that holds the frequencies.
        frequencies: module -> `[P, F]`, the angle of channel f per unit of coordinate p; each f has one nonzero p.
        unpack: upstream's table -> its sines and cosines, `[N, F]` or `[B, N, F]` each.
        pack: sines and cosines `[B, N, F]`, and upstream's table -> a table in upstream's format.
        ladders: for each coordinate, the channels it is recovered from, by ascending frequency; set by `axial_rotary`.
    """

    module: nn.Module
    frequencies: Callable[[Any], Tensor]
    unpack: Callable[[Any], tuple[Tensor, Tensor]]
    pack: Callable[[Tensor, Tensor, Any], Any]
    ladders: tuple[tuple[int, ...], ...]

    def positions(self, table: Any) -> Tensor:
        """Return coordinates `[1 or B, N, P]` float32: low frequencies give them roughly, higher ones refine them.

        Raises:
            PatchError: if the frequencies were not known when the model was patched.
        """
        if not self.ladders:
            raise PatchError(
                "the rotary frequencies had no values when the model was patched (it was on the meta device, or fake), so "
                "positions cannot be read: load the weights, then patch it again"
            )
        sin, cos = (part.float() for part in self.unpack(table))
        frequencies = self.frequencies(self.module).to(sin.device)
        columns = []
        for axis, ladder in enumerate(self.ladders):
            value = torch.zeros_like(sin[..., 0])
            for step, channel in enumerate(ladder):
                angle, speed = torch.atan2(sin[..., channel], cos[..., channel]), frequencies[axis, channel]
                turns = torch.round((speed * value - angle) / (2 * math.pi)) if step else 0.0
                value = (angle + 2 * math.pi * turns) / speed
            columns.append(value)
        found = torch.stack(columns, dim=-1)
        return found if found.dim() == 3 else found.unsqueeze(0)

    def table(self, positions: Tensor, like: Any) -> Any:
        """Return the table for coordinates `[B, N, P]`, in the format of upstream's table `like`."""
        with no_autocast(positions.device.type):
            angles = positions @ self.frequencies(self.module).to(positions)
        return self.pack(angles.sin(), angles.cos(), like)


def axial_rotary(
    module: nn.Module,
    frequencies: Callable[[Any], Tensor],
    unpack: Callable[[Any], tuple[Tensor, Tensor]],
    pack: Callable[[Tensor, Tensor, Any], Any],
) -> AxialRotary:
    """Return an `AxialRotary` whose ladders are computed from the current frequencies; see its attributes."""
    speeds = frequencies(module)
    ladders: list[tuple[int, ...]] = []
    for row in speeds.abs().tolist() if has_values(speeds) else []:
        slow_to_fast = sorted((speed, channel) for channel, speed in enumerate(row) if speed > 0)
        ladder = slow_to_fast[:1]
        for below, above in zip(slow_to_fast[1:], [*slow_to_fast[2:], (math.inf, -1)], strict=False):
            if above[0] > _STEP * ladder[-1][0]:  # the last rung cannot unwrap `above`
                ladder.append(below)
        ladders.append(tuple(channel for _, channel in ladder))
    return AxialRotary(module, frequencies, unpack, pack, tuple(ladders))


@dataclasses.dataclass(frozen=True, eq=False)
class MixedRotary:
    """Rotary embedding in which each head of each block rotates by learned mixtures of the coordinates (RoPE-mixed).

    Coordinates cannot be recovered from such a table, so they come from upstream's module.

    Attributes:
        module: upstream's module that holds grid and frequencies.
        grid: module -> coordinates of the patches `[N, P]`.
        frequencies: module -> frequencies of this block `[P, H, F]`.
        pack: sines and cosines `[B, H, N, F]`, and upstream's table -> a table in upstream's format.
    """

    module: nn.Module
    grid: Callable[[Any], Tensor]
    frequencies: Callable[[Any], Tensor]
    pack: Callable[[Tensor, Tensor, Any], Any]

    def positions(self, table: Any) -> Tensor:
        """Return the coordinates of the patches `[1, N, P]` float32; `table` is not read."""
        return self.grid(self.module).float().unsqueeze(0)

    def table(self, positions: Tensor, like: Any) -> Any:
        """Return the table for coordinates `[B, N, P]`, in the format of upstream's table `like`."""
        with no_autocast(positions.device.type):
            frequencies = self.frequencies(self.module).float()  # [P, H, F]
            angles = torch.einsum("bnp,phf->bhnf", positions, frequencies)
        return self.pack(angles.sin(), angles.cos(), like)
