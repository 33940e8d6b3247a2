"""Rows of this package's own models (`tokenmerge.models`), whose blocks are timm's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tokenmerge.errors import InputError
from tokenmerge.flops import Ends
from tokenmerge.models.video_mae import SpatiotemporalVisionTransformer
from tokenmerge.patching.families.family import BlockFamily, ModelFamily
from tokenmerge.patching.families.timm.vit import VIT, model_cost

NAMES = "tokenmerge.models"


def _shape(model: Any) -> tuple[int, ...]:
    embed = model.patch_embed
    return (embed.num_frames, embed.proj.in_channels, *embed.img_size)


def _grid_at(model: Any, sizes: Sequence[int]) -> tuple[int, ...]:
    frames, _, *sides = _shape(model)
    if tuple(sizes) != (frames, *sides):
        raise InputError(
            f"this model takes clips of {'×'.join(map(str, (frames, *sides)))} (frames × height × width) only, but "
            f"{'×'.join(map(str, sizes))} was given: create it with other num_frames or img_size"
        )
    return tuple(model.patch_embed.grid_size)


def _cost(model: Any) -> Ends:
    embed = model.patch_embed
    return model_cost(model, int(embed.proj.weight.numel() * embed.num_patches))


_VIDEO = ModelFamily(
    model=SpatiotemporalVisionTransformer,
    **{**VIT, "grid_at": _grid_at, "input_shape": _shape, "cost": _cost, "mae": lambda model: True},
)


def model_row(cls: type[nn.Module]) -> ModelFamily | None:
    """Return the row of a model class, or `None`."""
    return _VIDEO if cls is SpatiotemporalVisionTransformer else None


def block_row(cls: type[nn.Module]) -> BlockFamily | None:
    """Return `None`: the blocks are timm's, whose rows stand with timm's models."""
    return None


def why_not(cls: type[nn.Module]) -> str | None:
    """Return `None`: every model of the package has a row."""
    return None
