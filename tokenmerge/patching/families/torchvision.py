"""Rows of torchvision's `VisionTransformer`, for which the SWAG weights are published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models import vision_transformer as vit

from tokenmerge.errors import InputError
from tokenmerge.flops import BlockCost, Ends
from tokenmerge.patching.families import multihead
from tokenmerge.patching.families.family import BlockFamily, ModelFamily
from tokenmerge.patching.families.linear import linear_weights

NAMES = "torchvision's VisionTransformer"


def _attention(block: Any, x: Tensor, bias: Tensor | None, **given: Any) -> Tensor:
    out: Tensor = block.dropout(multihead.attend(block.self_attention, block.ln_1(x))) + x
    return out


def _mlp(block: Any, x: Tensor) -> Tensor:
    out: Tensor = x + block.mlp(block.ln_2(x))
    return out


def _cost(block: Any) -> BlockCost:
    width = int(block.self_attention.embed_dim)
    return BlockCost(4 * width * width, linear_weights(block.mlp), 2 * width)


def _model_cost(model: Any) -> Ends:
    patches = (model.image_size // model.patch_size) ** 2
    convolutions = [m for m in model.conv_proj.modules() if isinstance(m, nn.Conv2d)]
    side, stem = model.image_size, 0
    for convolution in convolutions:
        side //= convolution.stride[0]
        stem += convolution.weight.numel() * side * side
    stem = stem if len(convolutions) > 1 else convolutions[0].weight.numel() * patches
    return Ends(stem, linear_weights(model.heads))


def _grid_at(model: Any, sizes: Sequence[int]) -> tuple[int, ...]:
    if tuple(sizes) != (model.image_size,) * 2:
        raise InputError(
            f"this model takes images of {model.image_size}×{model.image_size} pixels only, but {'×'.join(map(str, sizes))} was "
            "given: create it with another image_size"
        )
    return (model.image_size // model.patch_size,) * 2


_MODEL = ModelFamily(
    library="torchvision",
    model=vit.VisionTransformer,
    seams=("forward", "_process_input"),
    blocks=lambda model: list(model.encoder.layers),
    channels=lambda model: int(model.hidden_dim),
    protected=lambda model: 1,
    tokens=lambda model: int(model.seq_length),
    grid=lambda model: (model.image_size // model.patch_size,) * 2,
    embed=lambda model: model.conv_proj,
    grid_at=_grid_at,
    input_shape=lambda model: (3, model.image_size, model.image_size),
    pooling=lambda model: "class token",
    cost=_model_cost,
    norms=lambda model: [model.encoder.ln],
    output="merged",
    refuse=lambda model: [] if type(model.encoder) is vit.Encoder else ["its encoder is not torchvision's own"],
)

_BLOCK = BlockFamily(
    block=vit.EncoderBlock,
    attention=_attention,
    mlp=_mlp,
    keys=lambda block: [],
    keys_at_call=True,
    cost=_cost,
    refuse=lambda block: multihead.refuse(block.self_attention),
)


def model_row(cls: type[nn.Module]) -> ModelFamily | None:
    """Return the row of a model class, or `None`."""
    return _MODEL if cls is vit.VisionTransformer else None


def block_row(cls: type[nn.Module]) -> BlockFamily | None:
    """Return the row of a block class, or `None`."""
    return _BLOCK if cls is vit.EncoderBlock else None


def why_not(cls: type[nn.Module]) -> str | None:
    """Return why a model class has no row; `None` if the reason is not known."""
    if cls.__module__.endswith("swin_transformer"):
        return "its blocks attend within windows, whose shape merging would break"
    if cls.__module__.endswith("maxvit"):
        return "it is hierarchical, and its blocks attend within windows and grids"
    return None
