"""Rows of timm's `beit` and `vision_transformer_relpos`, whose attention adds a bias of relative positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import beit
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor

from tokenmerge.attention.tap import note_input, projected_metric
from tokenmerge.flops import BlockCost
from tokenmerge.patching.families.family import BlockFamily, Example, ModelFamily
from tokenmerge.patching.families.linear import channels_of, linear_weights
from tokenmerge.patching.families.timm.seams import FollowsTokens, isotropic
from tokenmerge.patching.swap import original_class


def _cost(block: Any) -> BlockCost:
    width = channels_of(block, block.attn.num_heads * int(getattr(block.attn, "head_dim", 64)))
    table = getattr(block.attn, "rel_pos", None)  # in some models, an MLP computes the bias from coordinates
    offsets = getattr(table, "rel_coords_log", None)
    fixed = 0 if table is None or offsets is None else linear_weights(table) * offsets.shape[:-1].numel()
    return BlockCost(linear_weights(block.attn.qkv, block.attn.proj), linear_weights(block.mlp), 2 * width, fixed)


# --- BEiT ---------------------------------------------------------------------------------------------------


def _beit_attention(block: Any, x: Tensor, bias: Tensor | None, **given: Any) -> Tensor:
    y = block.attn(block.norm1(x), shared_rel_pos_bias=bias)
    y = y if block.gamma_1 is None else block.gamma_1 * y
    out: Tensor = x + block.drop_path1(y)
    return out


def _beit_mlp(block: Any, x: Tensor) -> Tensor:
    y = block.mlp(block.norm2(x))
    y = y if block.gamma_2 is None else block.gamma_2 * y
    out: Tensor = x + block.drop_path2(y)
    return out


def _beit_metric(block: Any, noted: tuple[Tensor, ...]) -> Tensor:
    weight = block.attn.qkv.weight
    width = weight.shape[0] // 3
    return projected_metric(noted[0], weight[width : 2 * width], block.attn.k_bias, block.attn.num_heads)


def _beit_example(block: Any) -> Example:
    window = block.attn.window_size
    return Example(window[0] * window[1] + 1) if window else Example()


def _beit_mixins(block: Any) -> list[Any]:
    return [(block.attn, FollowsTokens)] if block.attn.relative_position_bias_table is not None else []


def _refuse_attention(block: Any, known: Any) -> list[str]:
    if original_class(block.attn).forward is known.forward:
        return []
    return [f"its attention is {type(block.attn).__qualname__}, which is not known to carry token sizes"]


# --- VisionTransformerRelPos ---------------------------------------------------------------------------------


def _relpos_bias(block: Any, bias: Tensor | None) -> Tensor | None:
    """Return the sizes as a shared bias, or `None` if `FollowsTokens` adds them to a bias of the block's own."""
    return None if block.attn.rel_pos is not None else bias


def _relpos_attention(block: Any, x: Tensor, bias: Tensor | None, **given: Any) -> Tensor:
    y = block.attn(block.norm1(x), shared_rel_pos=_relpos_bias(block, bias))
    out: Tensor = x + block.drop_path1(block.ls1(y))
    return out


def _relpos_mlp(block: Any, x: Tensor) -> Tensor:
    out: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return out


def _res_post_attention(block: Any, x: Tensor, bias: Tensor | None, **given: Any) -> Tensor:
    out: Tensor = x + block.drop_path1(block.norm1(block.attn(x, shared_rel_pos=_relpos_bias(block, bias))))
    return out


def _res_post_mlp(block: Any, x: Tensor) -> Tensor:
    out: Tensor = x + block.drop_path2(block.norm2(block.mlp(x)))
    return out


def _relpos_mixins(block: Any) -> list[Any]:
    return [] if block.attn.rel_pos is None else [(block.attn.rel_pos, FollowsTokens)]


def _relpos_example(block: Any) -> Example:
    table = block.attn.rel_pos
    if table is None:
        return Example()
    return Example(int(table.get_bias().shape[-1]))


_RELPOS: dict[str, Any] = {
    "keys": lambda block: [block.attn.k_norm],
    "cost": _cost,
    "pair_bias": "shared_rel_pos",
    "own_pairs": True,
    "mixins": _relpos_mixins,
    "example": _relpos_example,
    "refuse": lambda block: _refuse_attention(block, relpos.RelPosAttention),
}
BLOCKS: Sequence[BlockFamily] = (
    BlockFamily(
        block=beit.Block,
        attention=_beit_attention,
        mlp=_beit_mlp,
        keys=lambda block: [block.attn],
        tap=note_input,
        metric=_beit_metric,
        cost=_cost,
        refuse=lambda block: _refuse_attention(block, beit.Attention),
        pair_bias="shared_rel_pos_bias",
        own_pairs=True,
        mixins=_beit_mixins,
        example=_beit_example,
    ),
    BlockFamily(block=relpos.RelPosBlock, attention=_relpos_attention, mlp=_relpos_mlp, **_RELPOS),
    BlockFamily(block=relpos.ResPostRelPosBlock, attention=_res_post_attention, mlp=_res_post_mlp, **_RELPOS),
)

MODELS: Sequence[ModelFamily] = (
    isotropic(beit.Beit, protected=lambda model: 1, tokens=lambda model: int(model.patch_embed.num_patches) + 1),
    isotropic(relpos.VisionTransformerRelPos),
)
