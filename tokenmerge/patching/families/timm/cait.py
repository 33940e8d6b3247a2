"""timm: `cait`, whose talking heads mix scores and weights, and whose class token enters after the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import cait
from torch import Tensor

from tokenmerge.attention.tap import context, fused_metric, note_input
from tokenmerge.flops import BlockCost, Ends
from tokenmerge.patching.families.family import BlockFamily, ModelFamily
from tokenmerge.patching.families.linear import linear_weights
from tokenmerge.patching.families.timm.seams import isotropic
from tokenmerge.patching.families.timm.vit import stem_cost
from tokenmerge.patching.swap import original_class


class AddsSizes:
    """Mix-in before the layer that mixes the heads' scores `[B, N, N, H]`: what it gives goes into the softmax."""

    def forward(self, scores: Tensor) -> Tensor:
        """Upstream's mixed scores plus the bias of the sizes, per key."""
        mixed: Tensor = super().forward(scores)  # type: ignore[misc]
        bias = context().bias
        return mixed if bias is None else mixed + bias.permute(0, 2, 3, 1)


class CountsCopies:
    """Mix-in before the layer that mixes the heads' weights after the softmax: its own bias counts per patch."""

    bias: Tensor | None

    def forward(self, weights: Tensor) -> Tensor:
        """Upstream's mixed weights `[B, N, N, H]`; a token of size s gets the layer's bias s times."""
        mixed: Tensor = super().forward(weights)  # type: ignore[misc]
        sizes = context().bias
        if sizes is None or self.bias is None:
            return mixed
        return mixed + (sizes.permute(0, 2, 3, 1).exp() - 1) * self.bias


def _attention(block: Any, x: Tensor, bias: Tensor | None, **given: Any) -> Tensor:
    out: Tensor = x + block.drop_path(block.gamma_1 * block.attn(block.norm1(x)))
    return out


def _mlp(block: Any, x: Tensor) -> Tensor:
    out: Tensor = x + block.drop_path(block.gamma_2 * block.mlp(block.norm2(x)))
    return out


def _metric(block: Any, noted: tuple[Tensor, ...]) -> Tensor:
    qkv = block.attn.qkv
    return fused_metric(noted[0], qkv.weight, qkv.bias, block.attn.num_heads)


def _cost(block: Any) -> BlockCost:
    attn = block.attn
    pair = 2 * attn.proj.out_features + 2 * attn.num_heads**2  # scores and values, and two mixtures of the heads
    return BlockCost(linear_weights(attn.qkv, attn.proj), linear_weights(block.mlp), pair)


def _refuse(block: Any) -> list[str]:
    if original_class(block.attn).forward is cait.TalkingHeadAttn.forward:
        return []
    return [f"its attention is {type(block.attn).__qualname__}, which is not known to carry token sizes"]


def _model_cost(model: Any) -> Ends:
    """The class attention reads all patches, unmerged: its keys and values belong to the head."""
    per_patch = sum(linear_weights(block.attn.k, block.attn.v) for block in model.blocks_token_only)
    return Ends(stem_cost(model), linear_weights(model.head), head_per_patch=per_patch)


BLOCKS: Sequence[BlockFamily] = (
    BlockFamily(
        block=cait.LayerScaleBlock,
        attention=_attention,
        mlp=_mlp,
        keys=lambda block: [block.attn],
        tap=note_input,
        metric=_metric,
        cost=_cost,
        refuse=_refuse,
        mixins=lambda block: [(block.attn.proj_l, AddsSizes), (block.attn.proj_w, CountsCopies)],
    ),
)

MODELS: Sequence[ModelFamily] = (
    isotropic(
        cait.Cait,
        protected=lambda model: 0,
        tokens=lambda model: int(model.patch_embed.num_patches),
        pooling=lambda model: "class attention over unmerged tokens",
        merged_output=lambda model: ["its class attention reads all tokens, without sizes"],
        cost=_model_cost,
    ),
)
