"""Colours for tokens: as many different ones as there are tokens, ordered so that the first ones differ most."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_LIGHT, _CHROMA = (0.45, 0.9), 0.17
"""Darkest and lightest colour (OKLab), so that black and white lines remain visible on each; and the strongest, which are glaring."""
_FARTHEST = 256
"""Number of colours that are chosen one by one, which takes time; the others follow in random order."""


@functools.cache
def distinct(count: int) -> Tensor:
    """Return different colours, the first of them as far from each other in OKLab as possible, as `[count, 3]` float32 in [0, 1].

    They are taken from a lattice in sRGB, so no two are equal, however many there are.

    Args:
        count: number of colours.
    """
    import numpy as np  # PyTorch takes much longer for hundreds of small steps

    steps = 26  # one lattice for any usual number of tokens, so that a colour does not change with their number
    while len(colours := _lattice(steps)) < count:
        steps *= 2
    lab = oklab(colours).numpy()
    distance = np.full(len(lab), np.inf, dtype=np.float32)
    chosen = []
    current = int(
        np.square(lab - np.array([0.62, 0.0, -0.15], dtype=np.float32)).sum(axis=1).argmin()
    )  # a blue comes first
    for _ in range(min(count, _FARTHEST)):
        chosen.append(current)
        np.minimum(distance, np.square(lab - lab[current]).sum(axis=1), out=distance)
        distance[current] = -1.0
        current = int(distance.argmax())
    others = np.random.default_rng(0).permutation(np.flatnonzero(distance >= 0))
    return colours[[*chosen, *others[: count - len(chosen)].tolist()]]


def _lattice(steps: int) -> Tensor:
    levels = (torch.linspace(0, 1, steps) * 255).round() / 255
    colours = torch.cartesian_prod(levels, levels, levels)
    lab = oklab(colours)
    return colours[(lab[:, 0] > _LIGHT[0]) & (lab[:, 0] < _LIGHT[1]) & (lab[:, 1:].norm(dim=1) < _CHROMA)]


def oklab(colours: Tensor) -> Tensor:
    """Convert sRGB colours `[…, 3]` in [0, 1] to OKLab (Ottosson, 2020), in which distances are about as large as they look."""
    linear = torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    to_cones = linear.new_tensor(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = linear.new_tensor(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return (linear @ to_cones.T).clamp_min(0) ** (1 / 3) @ to_lab.T
