"""Rows of timm's `qwen3_vit` and `deepseek_vit`, vision encoders of language models that return a grid of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import deepseek_vit, qwen3_vit
from torch import Tensor, nn

from tokenmerge.flops import Ends
from tokenmerge.patching.families.family import BlockFamily, ModelFamily
from tokenmerge.patching.families.linear import linear_weights
from tokenmerge.patching.families.timm.eva import cost, refuse, rotary, rotary_table
from tokenmerge.patching.families.timm.seams import isotropic


def _attention(block: Any, x: Tensor, bias: Tensor | None, **given: Any) -> Tensor:
    out: Tensor = x + block.drop_path1(block.attn(block.norm1(x), attn_mask=bias, **given))
    return out


def _mlp(block: Any, x: Tensor) -> Tensor:
    out: Tensor = x + block.drop_path2(block.mlp(block.norm2(x)))
    return out


def _classifier(way: list[nn.Module], model: Any) -> Ends:
    """Return the multiply-adds of the classifier that timm adds after the mean of an encoder's tokens."""
    heads = [head for module in way if isinstance(head := getattr(module, "head", None), nn.Linear)]
    return Ends(0, linear_weights(*heads))


BLOCKS: Sequence[BlockFamily] = (
    BlockFamily(
        block=deepseek_vit.DeepseekVitBlock,
        attention=_attention,
        mlp=_mlp,
        keys=lambda block: [block.attn.k_norm],
        cost=cost,
        refuse=refuse,
        rope="rope",
    ),
)

_SEAMS: dict[str, Any] = {
    "protected": lambda model: 0,
    "tokens": lambda model: int(model.patch_embed.num_patches),
    "pooling": lambda model: "none: a grid of unmerged tokens",
    "merged_output": lambda model: ["it gives its tokens out on their grid"],
    "around": _classifier,
    "rotary": rotary,
    "rotary_example": rotary_table,
}
MODELS: Sequence[ModelFamily] = (
    isotropic(qwen3_vit.Qwen3VitEncoder, norms=lambda model: [], **_SEAMS),
    isotropic(deepseek_vit.DeepseekVitEncoder, **_SEAMS),
)
