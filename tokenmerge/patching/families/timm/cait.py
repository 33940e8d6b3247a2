"""Rows of timm's `cait`, with talking heads, and with a class token that enters only after the blocks."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from timm.models import cait
from torch import Tensor

from tokenmerge.attention.tap import context, fused_metric, note_input
from tokenmerge.flops import BlockCost, Ends
from tokenmerge.patching.families.family import BlockFamily, ModelFamily
from tokenmerge.patching.families.linear import attention_pool, channels_of, linear_weights
from tokenmerge.patching.families.timm.seams import MergeHook, isotropic
from tokenmerge.patching.families.timm.vit import stem_cost
from tokenmerge.patching.state import TokenState, attach, state_of
from tokenmerge.patching.swap import original_class


def _add_sizes(layer: Any, args: tuple[Any, ...], mixed: Tensor) -> Tensor | None:
    """Add the sizes to the scores `[B, N, N, H]` before the softmax: a forward hook of the layer that mixes their heads."""
    bias = context().bias
    return None if bias is None else mixed + bias.permute(0, 2, 3, 1)


def _count_copies(layer: Any, args: tuple[Any, ...], mixed: Tensor) -> Tensor | None:
    """Add a layer's bias once per patch: a forward hook of the layer that mixes heads of the weights `[B, N, N, H]`.

    A token of size s stands for s equal tokens, each of which would get the bias of the layer.
    """
    sizes = context().bias
    if sizes is None:
        return None
    weights: Tensor = args[0]
    own: Tensor = layer.forward(
        weights.new_zeros(1, 1, 1, weights.shape[-1])
    )  # the layer's bias, even if it is quantised or has an adapter
    return mixed + (sizes.permute(0, 2, 3, 1).exp() - 1) * own


def _attention(block: Any, x: Tensor, bias: Tensor | None, **given: Any) -> Tensor:
    out: Tensor = x + block.drop_path(block.gamma_1 * block.attn(block.norm1(x)))
    return out


def _mlp(block: Any, x: Tensor) -> Tensor:
    out: Tensor = x + block.drop_path(block.gamma_2 * block.mlp(block.norm2(x)))
    return out


def _metric(block: Any, noted: tuple[Tensor, ...]) -> Tensor:
    return fused_metric(noted[0], block.attn.qkv, block.attn.num_heads)


def _cost(block: Any) -> BlockCost:
    attn = block.attn
    pair = 2 * channels_of(block, 0) + 2 * attn.num_heads**2  # scores and values, and two mixings of the heads
    return BlockCost(linear_weights(attn.qkv, attn.proj), linear_weights(block.mlp), pair)


def _refuse(block: Any) -> list[str]:
    if original_class(block.attn).forward is cait.TalkingHeadAttn.forward:
        return []
    return [f"its attention is {type(block.attn).__qualname__}, which is not known to carry token sizes"]


def _model_cost(model: Any) -> Ends:
    """Return the multiply-adds around the blocks; the class attention, over unmerged tokens, counts as the head."""
    head, per_patch = linear_weights(model.head), 0
    for block in model.blocks_token_only:
        fixed, per_key = attention_pool(block)
        head += fixed + per_key
        per_patch += per_key
    return Ends(stem_cost(model), head, head_per_patch=per_patch)


class _Leaving(threading.local):
    """State of the tokens that entered the class attention in the current thread, until `forward_features` takes it."""

    def __init__(self) -> None:
        # set from the start in each thread, because compiled code would depend on whether the attribute exists
        self.state: TokenState | None = None


_leaving = _Leaving()


def _note_leaving(module: Any, args: tuple[Any, ...]) -> None:
    """Record the state of the tokens that left the last block: a forward pre-hook of the first class attention."""
    _leaving.state = state_of(args[0])


def _left() -> TokenState | None:
    state, _leaving.state = _leaving.state, None
    return state


class MergeCait(MergeHook):
    """Mix-in for CaiT, which adds its class token after the blocks and would thereby lose the state of the tokens."""

    def forward_features(self: Any, x: Any) -> Any:
        """Return upstream's features `[B, 1 + N₀, C]`, with the state of the tokens that left the last block."""
        _left()  # drop the state of a pass that ended by an error
        try:
            features = super().forward_features(x)
        finally:
            state = _left()
        return features if state is None else attach(features, state)


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
        answers=lambda block: [(block.attn.proj_l, _add_sizes), (block.attn.proj_w, _count_copies)],
    ),
)

MODELS: Sequence[ModelFamily] = (
    isotropic(
        cait.Cait,
        protected=lambda model: 0,
        tokens=lambda model: int(model.patch_embed.num_patches),
        pooling=lambda model: "class attention over unmerged tokens",
        swap=MergeCait,
        hooks=lambda model: [(model.blocks_token_only[0], _note_leaving)],
        merged_output=lambda model: ["its class attention reads all tokens, without sizes"],
        cost=_model_cost,
    ),
)
