"""Rows of timm's `naflexvit`: native aspect ratios, padded batches, and the blocks of `vision_transformer` or `eva`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import naflexvit
from torch import nn

from tokenmerge.attention.rotary import Rotary
from tokenmerge.flops import Ends
from tokenmerge.patching.families.family import BlockFamily, ModelFamily
from tokenmerge.patching.families.linear import linear_weights
from tokenmerge.patching.families.timm.eva import rotary
from tokenmerge.patching.families.timm.seams import ends, isotropic


def _grid(model: Any) -> tuple[int, int]:
    """Return the grid of a square image of the size for which the weights were trained."""
    side = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]
    patch = model.embeds.patch_size
    down, right = patch if isinstance(patch, tuple | list) else (patch, patch)
    return int(side[0]) // int(down), int(side[1]) // int(right)


def _image(model: Any) -> tuple[int, int, int]:
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    return int(size[0]), int(size[1]), int(size[2])


def _tokens(model: Any) -> int:
    grid = _grid(model)
    return grid[0] * grid[1] + int(model.num_prefix_tokens)


def _cost(model: Any) -> Ends:
    grid = _grid(model)
    proj = model.embeds.proj
    per_patch = proj.weight.numel() if isinstance(proj, nn.Conv2d) else linear_weights(proj)
    stem = int(per_patch) * grid[0] * grid[1]
    return ends(model, stem)


def _rotary(model: Any, index: int) -> Rotary | None:
    return None if model.rope is None else rotary(model, index)


def _refuse(model: Any) -> list[str]:
    if getattr(model, "rope_is_mixed", False) or type(getattr(model, "rope", None)).__name__ == "RotaryEmbeddingMixed":
        return ["its mixed rotary embedding is made for a new grid in every pass"]
    return []


def _grid_at(model: Any, sizes: Sequence[int]) -> tuple[int, ...]:
    patch = model.embeds.patch_size
    return tuple(-(-size // side) for size, side in zip(sizes, patch, strict=True))


BLOCKS: Sequence[BlockFamily] = ()
MODELS: Sequence[ModelFamily] = (
    isotropic(
        naflexvit.NaFlexVit,
        input_shape=_image,
        tokens=_tokens,
        grid=_grid,
        embed=lambda model: model.embeds,  # it returns the grid for images, and `None` for padded patches
        grid_at=_grid_at,
        cost=_cost,
        rotary=_rotary,
        refuse=_refuse,
    ),
)
