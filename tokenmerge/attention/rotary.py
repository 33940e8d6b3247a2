"""Rotary positions of merged tokens: the size-weighted mean of the coordinates they came from.

Rotary attention turns q and k by `angle = coordinates · frequencies`. Upstream hands its blocks a table of the
sines and cosines, one row per patch. A merged token lies between patches, so it needs a row of its own. The
coordinates are read off upstream's own table (which may be augmented, cropped or of another size in every pass),
merged like everything else, and turned back into sines and cosines. Only the frequencies must be known.
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

_STEP = 24.0  # largest ratio of two frequencies between which an angle can be unwrapped in half precision


class Rotary(Protocol):
    """How one block's table and the coordinates of its tokens belong together."""

    @property
    def module(self) -> nn.Module:
        """Upstream's module that makes the table."""
        ...

    def positions(self, table: Any) -> Tensor:
        """Coordinates `[1 or B, N, P]`, float32, of the tokens that `table` turns."""
        ...

    def table(self, positions: Tensor, like: Any) -> Any:
        """The table for coordinates `[B, N, P]`, in form and dtype of upstream's own table `like`."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class AxialRotary:
    """Every channel turns by one coordinate: the rotary embeddings of EVA-02, DINOv3, Pixtral, MRoPE and others.

    Attributes:
        module: upstream's module that holds the frequencies.
        frequencies: of that module -> `[P, F]`: angle of channel f per unit of coordinate p; one p per f.
        unpack: upstream's table -> its sines and cosines, `[N, F]` or `[B, N, F]`, one column per frequency.
        pack: sines, cosines `[B, N, F]` and upstream's table -> a table in upstream's form.
        ladders: for each coordinate the channels to read it from, slow to fast; made by `axial_rotary`.
    """

    module: nn.Module
    frequencies: Callable[[Any], Tensor]
    unpack: Callable[[Any], tuple[Tensor, Tensor]]
    pack: Callable[[Tensor, Tensor, Any], Any]
    ladders: tuple[tuple[int, ...], ...]

    def positions(self, table: Any) -> Tensor:
        """Coordinates `[1 or B, N, P]`, float32: slow channels say roughly where, fast ones exactly."""
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
        """The table for coordinates `[B, N, P]`."""
        with no_autocast(positions.device.type):
            angles = positions @ self.frequencies(self.module).to(positions)
        return self.pack(angles.sin(), angles.cos(), like)


def axial_rotary(
    module: nn.Module,
    frequencies: Callable[[Any], Tensor],
    unpack: Callable[[Any], tuple[Tensor, Tensor]],
    pack: Callable[[Tensor, Tensor, Any], Any],
) -> AxialRotary:
    """An `AxialRotary` with its ladders, from the frequencies as they are now."""
    speeds = frequencies(module)
    ladders: list[tuple[int, ...]] = []
    for row in speeds.abs().tolist() if has_values(speeds) else []:
        slow_to_fast = sorted((speed, channel) for channel, speed in enumerate(row) if speed > 0)
        ladder = slow_to_fast[:1]
        for below, above in zip(slow_to_fast[1:], [*slow_to_fast[2:], (math.inf, -1)], strict=False):
            if above[0] > _STEP * ladder[-1][0]:  # the next would be too far: this one is the last safe rung
                ladder.append(below)
        ladders.append(tuple(channel for _, channel in ladder))
    return AxialRotary(module, frequencies, unpack, pack, tuple(ladders))


@dataclasses.dataclass(frozen=True, eq=False)
class MixedRotary:
    """Every head of every block turns by its own learned mixture of the coordinates (RoPE-mixed).

    Such a table cannot be read backwards, so the coordinates come from upstream's module.

    Attributes:
        module: upstream's module.
        grid: of that module -> coordinates `[N, P]` of the patches.
        frequencies: of that module -> `[P, H, F]` of this block.
        pack: sines, cosines `[B, H, N, F]` and upstream's table -> a table in upstream's form.
    """

    module: nn.Module
    grid: Callable[[Any], Tensor]
    frequencies: Callable[[Any], Tensor]
    pack: Callable[[Tensor, Tensor, Any], Any]

    def positions(self, table: Any) -> Tensor:
        """Coordinates `[1, N, P]`, float32."""
        return self.grid(self.module).float().unsqueeze(0)

    def table(self, positions: Tensor, like: Any) -> Any:
        """The table for coordinates `[B, N, P]`."""
        with no_autocast(positions.device.type):
            frequencies = self.frequencies(self.module).float()  # [P, H, F]
            angles = torch.einsum("bnp,phf->bhnf", positions, frequencies)
        return self.pack(angles.sin(), angles.cos(), like)
