"""Rotary positions of transformers' DINOv3 and Pixtral."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokenmerge.attention.rotary import Rotary, axial_rotary
from tokenmerge.patching.families.transformers.grids import image_grid, pair


def _halves(table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return sines and cosines, each angle once, from a table (cos, sin) that holds each angle twice."""
    cos, sin = table
    return sin[..., : sin.shape[-1] // 2], cos[..., : cos.shape[-1] // 2]


def _pack_per_head(sin: Tensor, cos: Tensor, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return sines and cosines `[B, N, F]` as a table (cos, sin), `[B, 1, N, 2F]` each, which all heads share."""
    return tuple(torch.cat([part, part], dim=-1).unsqueeze(1).to(like[0].dtype) for part in (cos, sin))  # type: ignore[return-value]


def _pack_packed(sin: Tensor, cos: Tensor, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return sines and cosines `[1, N, F]` as a table (cos, sin), `[N, 2F]` each, for one packed sequence."""
    return tuple(torch.cat([part, part], dim=-1)[0].to(like[0].dtype) for part in (cos, sin))  # type: ignore[return-value]


def _on_two_axes(rows: Tensor, columns: Tensor) -> Tensor:
    """Return frequencies `[2, F]`: the first channels rotate with the row, the others with the column."""
    zeros = torch.zeros_like
    return torch.stack([torch.cat([rows, zeros(columns)]), torch.cat([zeros(rows), columns])])


def _dinov3_frequencies(rope: Any) -> Tensor:
    speeds = 2 * math.pi * rope.inv_freq.float()
    return _on_two_axes(speeds, speeds)


def dinov3_rotary(model: Any, index: int) -> Rotary:
    """Return how DINOv3's rotary table is read and written."""
    return axial_rotary(model.rope_embeddings, _dinov3_frequencies, _halves, _pack_per_head)


def dinov3_table(model: Any, index: int) -> Any:
    """Return DINOv3's rotary table at the model's own size."""
    (down, right), (height, width) = pair(model.config.patch_size), pair(model.config.image_size)
    weight = next(model.parameters())
    image = torch.empty(1, 1, height // down * down, width // right * right, device=weight.device, dtype=weight.dtype)
    return model.rope_embeddings(image)


def _pixtral_frequencies(rope: Any) -> Tensor:
    config = rope.config
    base = (getattr(config, "rope_parameters", None) or {}).get("rope_theta") or config.rope_theta
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    speeds = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=rope.inv_freq.device) / dim)
    return _on_two_axes(speeds[0::2], speeds[1::2])


def pixtral_rotary(model: Any, index: int) -> Rotary:
    """Return how Pixtral's rotary table is read and written."""
    return axial_rotary(model.patch_positional_embedding, _pixtral_frequencies, _halves, _pack_packed)


def pixtral_table(model: Any, index: int) -> Any:
    """Return Pixtral's rotary table at the model's own size."""
    grid = image_grid(model.config)
    assert grid is not None
    weight = next(model.parameters())
    ids = torch.cartesian_prod(*(torch.arange(side, device=weight.device) for side in grid))
    return model.patch_positional_embedding(weight.new_empty(1, 1), ids)
