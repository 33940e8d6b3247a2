"""Rows of timm's `eva` (EVA, EVA-02, DINOv3, Perception Encoder, RoPE ViTs), and its rotary embeddings."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import pos_embed_sincos
from timm.layers.attention import AttentionRope
from timm.models import eva
from torch import Tensor

from tokenmerge.attention.rotary import MixedRotary, Rotary, axial_rotary
from tokenmerge.flops import BlockCost
from tokenmerge.patching.families.family import BlockFamily, ModelFamily
from tokenmerge.patching.families.linear import linear_weights
from tokenmerge.patching.families.timm.seams import isotropic
from tokenmerge.patching.swap import original_class

# --- blocks -----------------------------------------------------------------------------------------------


def _attention(block: Any, x: Tensor, bias: Tensor | None, **given: Any) -> Tensor:
    y = block.attn(block.norm1(x), attn_mask=bias, **given)
    if block.gamma_1 is not None:
        y = block.gamma_1 * y
    out: Tensor = x + block.drop_path1(y)
    return out


def _mlp(block: Any, x: Tensor) -> Tensor:
    y = block.mlp(block.norm2(x))
    if block.gamma_2 is not None:
        y = block.gamma_2 * y
    out: Tensor = x + block.drop_path2(y)
    return out


def _post_norm_attention(block: Any, x: Tensor, bias: Tensor | None, **given: Any) -> Tensor:
    out: Tensor = x + block.drop_path1(block.norm1(block.attn(x, attn_mask=bias, **given)))
    return out


def _post_norm_mlp(block: Any, x: Tensor) -> Tensor:
    out: Tensor = x + block.drop_path2(block.norm2(block.mlp(x)))
    return out


def cost(block: Any) -> BlockCost:
    """Return the multiply-adds of a block."""
    width = int(block.attn.num_heads * block.attn.head_dim)
    return BlockCost(linear_weights(block.attn), linear_weights(block.mlp), 2 * width)


def refuse(block: Any) -> list[str]:
    """Return reasons against any attention other than timm's own."""
    known = (eva.EvaAttention, AttentionRope)
    if original_class(block.attn).forward not in [cls.forward for cls in known]:
        return [f"its attention is {type(block.attn).__qualname__}, which is not known to carry token sizes"]
    return []


_COMMON: dict[str, Any] = {
    "keys": lambda block: [block.attn.k_norm],
    "cost": cost,
    "refuse": refuse,
    "mask": "attn_mask",
    "rope": "rope",
}
BLOCKS: Sequence[BlockFamily] = (
    BlockFamily(block=eva.EvaBlock, attention=_attention, mlp=_mlp, **_COMMON),
    BlockFamily(block=eva.EvaBlockPostNorm, attention=_post_norm_attention, mlp=_post_norm_mlp, **_COMMON),
)

# --- rotary positions -------------------------------------------------------------------------------------


def _is_half(rope: Any) -> bool:
    return bool(getattr(rope, "rotate_half", False)) or type(rope).__name__ == "RotaryEmbeddingMRope"


def _on_two_axes(speeds: Tensor) -> Tensor:
    zeros = torch.zeros_like(speeds)
    return torch.stack([torch.cat([speeds, zeros]), torch.cat([zeros, speeds])])


def _frequencies(rope: Any) -> Tensor:
    """Return the angle of each channel per unit of the two coordinates, `[2, F]`."""
    kind = type(rope).__name__
    if kind == "RotaryEmbeddingDinoV3":
        return _on_two_axes(2 * math.pi / rope.periods.float())
    if kind == "RotaryEmbeddingMRope":
        speeds = rope.inv_freq.float()
        return torch.stack([torch.where(rope.axis == axis, speeds, 0.0) for axis in (1, 2)])
    if rope.bands is not None:
        return _on_two_axes(rope.bands.float())
    # a cached table does not keep its bands, so they are computed from the settings, on the table's device
    count, where = rope.dim // 4, {"device": rope.pos_embed.device}
    if rope.in_pixels:
        bands = pos_embed_sincos.pixel_freq_bands(count, float(rope.max_res), linear_bands=rope.linear_bands, **where)
    else:
        bands = pos_embed_sincos.freq_bands(count, temperature=rope.temperature, step=1, **where)
    return _on_two_axes(bands.float())


def _unpack(table: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """Split a table `[N, 2D]` or `[B, 1, N, 2D]` into sines and cosines, each angle once."""
    if table.dim() == 4:
        table = table.squeeze(1)
    sin, cos = table.chunk(2, dim=-1)
    if half:
        return sin[..., : sin.shape[-1] // 2], cos[..., : cos.shape[-1] // 2]
    return sin[..., ::2], cos[..., ::2]


def _spread(part: Tensor, half: bool) -> Tensor:
    return torch.cat([part, part], dim=-1) if half else part.repeat_interleave(2, dim=-1)


def _pack(sin: Tensor, cos: Tensor, like: Tensor, half: bool, per_head: bool) -> Tensor:
    """Return sines and cosines as a table `[B, 1 or H, N, 2D]` in timm's layout."""
    table = torch.cat([_spread(sin, half), _spread(cos, half)], dim=-1).to(like.dtype)
    return table if per_head else table.unsqueeze(1)


def _block_frequencies(rope: Any, index: int) -> Tensor:
    """Return the frequencies `[2, H, F]` of one block from those of RoPE-mixed `[2, depth, H, F]`."""
    frequencies: Tensor = rope.freqs[:, index]
    return frequencies


def _mixed_grid(rope: Any) -> Tensor:
    return torch.stack([rope.t_x, rope.t_y], dim=-1)


def rotary(model: Any, index: int) -> Rotary | None:
    """Return how a block's rotary table is read and written (`model.rope`); `None` without rotary positions."""
    rope = model.rope
    if rope is None:
        return None
    half = _is_half(rope)
    if type(rope).__name__ == "RotaryEmbeddingMixed":
        frequencies = functools.partial(_block_frequencies, index=index)  # a closure could not be pickled
        return MixedRotary(rope, _mixed_grid, frequencies, functools.partial(_pack, half=False, per_head=True))
    unpack, pack = functools.partial(_unpack, half=half), functools.partial(_pack, half=half, per_head=False)
    return axial_rotary(rope, _frequencies, unpack, pack)


def rotary_table(model: Any, index: int) -> Any:
    """Return upstream's table at the model's own size, in the form in which the blocks get it."""
    rope, was_training = model.rope, model.rope.training
    rope.eval()  # training mode would augment the positions
    try:
        table = (
            rope.get_embed()
            if hasattr(rope, "feat_shape") and rope.feat_shape
            else rope.get_embed(shape=model.patch_embed.grid_size)
        )
    finally:
        rope.train(was_training)
    if type(rope).__name__ == "RotaryEmbeddingMixed":
        return table[index].unsqueeze(0)
    return table[None, None]


def _refuse_rope(model: Any) -> list[str]:
    rope = model.rope
    known = ("RotaryEmbeddingCat", "RotaryEmbeddingDinoV3", "RotaryEmbeddingMRope", "RotaryEmbeddingMixed")
    if rope is None:
        return []
    if type(rope).__name__ not in known:
        return [f"its rotary embedding is {type(rope).__qualname__}, whose frequencies are not known"]
    if type(rope).__name__ == "RotaryEmbeddingMixed" and rope.t_x is None:
        return ["its mixed rotary embedding is made for a new grid in every pass (dynamic_img_size)"]
    return []


MODELS: Sequence[ModelFamily] = (isotropic(eva.Eva, rotary=rotary, rotary_example=rotary_table, refuse=_refuse_rope),)
