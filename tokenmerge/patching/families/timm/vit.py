"""Rows of timm's `vision_transformer`, `deit` and `vision_transformer_hybrid`.

They need a timm whose blocks take `attn_mask` (see the extras in pyproject.toml); the check at patch time detects others.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.patch_embed import PatchEmbed
from timm.models import deit, vision_transformer
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.flop_counter import FlopCounterMode

from tokenmerge.attention.tap import head_mean_untransposed, size_bias
from tokenmerge.errors import InputError, PatchError
from tokenmerge.flops import BlockCost, Ends
from tokenmerge.patching.families.family import BlockFamily, ModelFamily
from tokenmerge.patching.families.linear import attention_pool, linear_weights
from tokenmerge.patching.leaf import deferred
from tokenmerge.patching.root import MergeFeatures
from tokenmerge.patching.state import needed_state, plans_needed, state_of, weighted_mean
from tokenmerge.patching.swap import copy_without_hooks, original_class

# newer versions of timm added these classes; classes that the installed version lacks get no row
_DiffAttention: type[nn.Module] | None = getattr(vision_transformer, "DiffAttention", None)
_ATTENTION: tuple[type[nn.Module], ...] = tuple(cls for cls in (Attention, _DiffAttention) if cls is not None)


# --- blocks -----------------------------------------------------------------------------------------------


def _block_attention(block: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=bias)))
    return out


def _block_mlp(block: Any, x: Tensor) -> Tensor:
    out: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return out


def _res_post_attention(block: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = x + block.drop_path1(block.norm1(block.attn(x, attn_mask=bias)))
    return out


def _res_post_mlp(block: Any, x: Tensor) -> Tensor:
    out: Tensor = x + block.drop_path2(block.norm2(block.mlp(x)))
    return out


def _things_attention(block: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    branches = [branch.drop_path(branch.ls(branch.attn(branch.norm(x), attn_mask=bias))) for branch in block.attns]
    return x + torch.stack(branches).sum(dim=0)


def _things_mlp(block: Any, x: Tensor) -> Tensor:
    return x + torch.stack([ffn(x) for ffn in block.ffns]).sum(dim=0)


def _parallel_attention(block: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Run upstream's whole forward as the branch, because attention and MLP share their projections here."""
    out: Tensor = original_class(block).forward(block, x, attn_mask=bias)
    return out


def _pair_cost(attn: Any) -> int:
    dim: int = attn.num_heads * attn.head_dim
    if "Diff" not in original_class(attn).__name__:
        return 2 * dim
    # two maps with heads of half the size; fused attention multiplies each by V, other attention only their difference
    return 6 * dim if attn.fused_attn else 4 * dim


def _block_cost(block: Any) -> BlockCost:
    return BlockCost(linear_weights(block.attn), linear_weights(block.mlp), _pair_cost(block.attn))


def _things_cost(block: Any) -> BlockCost:
    pair = sum(_pair_cost(branch.attn) for branch in block.attns)
    return BlockCost(linear_weights(block.attns), linear_weights(block.ffns), pair)


def _parallel_cost(block: Any) -> BlockCost:
    return BlockCost(linear_weights(block), 0, _pair_cost(block))


def _refuse_attention(*attentions: Any) -> list[str]:
    """Return reasons against any attention not known to add the mask to its scores and to pass K through `k_norm`."""
    reasons = []
    for attn in attentions:
        known = next((cls for cls in _ATTENTION if isinstance(attn, cls)), None)
        if known is None or original_class(attn).forward is not known.forward or "forward" in vars(attn):
            names = " and ".join(cls.__name__ for cls in _ATTENTION)
            reasons.append(
                f"its attention is {type(attn).__module__}.{type(attn).__qualname__}, but only timm's own "
                f"{names} are known to carry token sizes"
            )
        elif "attn_mask" not in inspect.signature(known.forward).parameters:
            reasons.append("this timm's Attention takes no attn_mask: upgrade timm")
    return reasons


def _block_row(name: str, **seams: Any) -> list[BlockFamily]:
    cls = getattr(vision_transformer, name, None)
    return [] if cls is None else [BlockFamily(block=cls, **seams)]


BLOCKS: Sequence[BlockFamily] = (
    *_block_row(
        "Block",
        attention=_block_attention,
        mlp=_block_mlp,
        keys=lambda block: [block.attn.k_norm],
        cost=_block_cost,
        mask="attn_mask",
        refuse=lambda block: _refuse_attention(block.attn),
    ),
    *_block_row(
        "ResPostBlock",
        attention=_res_post_attention,
        mlp=_res_post_mlp,
        keys=lambda block: [block.attn.k_norm],
        cost=_block_cost,
        mask="attn_mask",
        refuse=lambda block: _refuse_attention(block.attn),
    ),
    *_block_row(
        "ParallelThingsBlock",
        attention=_things_attention,
        mlp=_things_mlp,
        keys=lambda block: [branch.attn.k_norm for branch in block.attns],
        cost=_things_cost,
        mask="attn_mask",
        refuse=lambda block: _refuse_attention(*(branch.attn for branch in block.attns)),
    ),
    *_block_row(
        "ParallelScalingBlock",
        attention=_parallel_attention,
        mlp=None,
        keys=lambda block: [block.k_norm],
        metric=head_mean_untransposed,
        cost=_parallel_cost,
        mask="attn_mask",
    ),
    *_block_row(
        "DiffParallelScalingBlock",
        attention=_parallel_attention,
        mlp=None,
        keys=lambda block: [block.k_norm],
        cost=_parallel_cost,
        mask="attn_mask",
    ),
)


# --- models -----------------------------------------------------------------------------------------------


class MergeVisionTransformer(MergeFeatures):
    """Mix-in for timm's VisionTransformer: it keeps upstream's forward, and weights pooling by size."""

    def pool(self: Any, x: Any, pool_type: str | None = None) -> Any:
        """Pool tokens as timm does, weighted by the number of patches that each stands for.

        Args:
            x: tokens `[B, N, C]` from the last block.
            pool_type: timm's name of a kind of pooling; `None` is the model's own.

        Returns:
            Pooled features `[B, C]`, or the tokens themselves if the model does not pool.

        Raises:
            PatchError: if x lost its sizes after the last block.
        """
        upstream: Any = super().pool  # type: ignore[misc]
        kind = _pool_kind(self, pool_type)
        if kind not in ("avg", "avgmax", "map", "prr"):
            return upstream(x, pool_type)
        reader = f"{kind} pooling"
        if isinstance(x, Proxy) and self._tokenmerge.settings.merges:
            return _traced_pool(self, x, upstream, pool_type, reader)
        state = needed_state(x, reader) if self._tokenmerge.settings.merges else state_of(x)
        prop_attn = state is None or state.run.settings.prop_attn
        counts = prop_attn or kind != "map"  # whether sizes matter; otherwise each token counts once
        if state is not None and state.run.padded and state.merged is None and counts:  # upstream pools padding, too
            return upstream(plans_needed(state, reader).unmerge(x), pool_type)
        if kind == "map" and not prop_attn and state is not None and state.merged is not None:
            return upstream(state.one_of_equals(x), pool_type)
        if state is None or state.size is None or state.merged is not None:
            return upstream(x, pool_type)
        if kind == "prr":  # its attention takes no bias; on unmerged tokens it is proportional without one
            return upstream(plans_needed(state, reader).unmerge(x), pool_type)
        first = 0 if self.pool_include_prefix else self.num_prefix_tokens
        tokens, size = x[:, first:], state.size[:, first:]
        if kind == "map":
            bias = size_bias(size, tokens) if prop_attn else None
            return self.attn_pool(tokens, attn_mask=bias)
        mean = weighted_mean(tokens, size)
        return mean if kind == "avg" else 0.5 * (tokens.amax(dim=1) + mean)


def _traced_pool(model: Any, x: Any, upstream: Any, pool_type: str | None, reader: str) -> Any:
    """Pool tokens in a graph of torch.fx, in which sizes are known only when the graph runs."""
    kind, first = _pool_kind(model, pool_type), 0 if model.pool_include_prefix else model.num_prefix_tokens
    if kind == "prr":
        return upstream(deferred(_unmerged, x, reader), pool_type)
    if kind == "map":
        bias = deferred(_bias_of, x, reader, first, model._tokenmerge.settings.prop_attn)
        return model.attn_pool(x[:, first:], attn_mask=bias)
    return deferred(_mean_of, x, reader, first, kind)


def _unmerged(x: Tensor, reader: str) -> Tensor:
    state = plans_needed(needed_state(x, reader), reader)
    return x if state.merged is not None else state.unmerge(x)


def _sizes_of(x: Tensor, reader: str, first: int) -> Tensor:
    state = state_of(x)
    ones = state is None or state.size is None or state.merged is not None
    return (
        torch.ones(x.shape[:2], device=x.device)[:, first:]
        if ones or state is None or state.size is None
        else state.size[:, first:]
    )


def _bias_of(x: Tensor, reader: str, first: int, prop_attn: bool) -> Tensor | None:
    if needed_state(x, reader).run.padded:
        raise PatchError(
            f"{reader} of padded inputs cannot be traced by torch.fx while tokens merge: run the model itself"
        )
    size = _sizes_of(x, reader, first)
    return size_bias(size if prop_attn else torch.ones_like(size), x)


def _mean_of(x: Tensor, reader: str, first: int, kind: str) -> Tensor:
    if needed_state(x, reader).run.padded:  # upstream pools padding, too
        x = _unmerged(x, reader)
    tokens, size = x[:, first:], _sizes_of(x, reader, first)
    mean = weighted_mean(tokens, size)
    return mean if kind == "avg" else 0.5 * (tokens.amax(dim=1) + mean)


def _pool_kind(model: Any, pool_type: str | None = None) -> str:
    if getattr(model, "attn_pool", None) is not None:
        return "map" if isinstance(model.attn_pool, AttentionPoolLatent) else "prr"
    return str(model.global_pool if pool_type is None else pool_type)


def _pooling(model: Any) -> str:
    kind = _pool_kind(model)
    words = {
        "token": "class token"
        if getattr(model, "dist_token", None) is None
        else "mean of class and distillation token",
        "": "none: weigh tokens by tokenmerge.token_sizes",
        "avg": "avg, weighted by size",
        "avgmax": "avgmax, mean weighted by size",
        "map": "map, sizes as attention bias",
        "prr": "prr, over unmerged tokens",
    }
    return words.get(kind, kind)


def stem_cost(model: Any) -> int:
    """Return the multiply-adds of the patch embedding."""
    embed = model.patch_embed
    if type(embed) is PatchEmbed:
        return int(embed.proj.weight.numel() * embed.num_patches)
    return _run_without_data(embed, embed.img_size)[1]  # convolutional stems (hybrids)


def image_shape(model: Any) -> tuple[int, int, int]:
    """Return channels, height and width of the images that the model takes."""
    height, width = model.patch_embed.img_size
    first = next(module for module in model.patch_embed.modules() if isinstance(module, nn.Conv2d))  # the stem's
    return first.in_channels, int(height), int(width)


def _grid_at(model: Any, sizes: Sequence[int]) -> tuple[int, ...] | None:
    """Return the grid of an image of the given size in pixels."""
    embed = model.patch_embed
    if tuple(sizes) == tuple(embed.img_size or ()):
        return tuple(embed.grid_size)
    if not getattr(model, "dynamic_img_size", not getattr(embed, "strict_img_size", True)):
        raise InputError(
            f"this model takes images of {'×'.join(map(str, embed.img_size))} pixels only, but {'×'.join(map(str, sizes))} was "
            "given: create it with dynamic_img_size=True, or another img_size"
        )
    if type(embed) is PatchEmbed:
        patches = zip(sizes, embed.patch_size, strict=True)
        return tuple(-(-size // patch) if embed.dynamic_img_pad else size // patch for size, patch in patches)
    return _run_without_data(embed, sizes)[0]


def _run_without_data(embed: Any, sizes: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Run a copy of an embedding on the meta device, and return the grid that it makes and its multiply-adds."""
    shapes: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in embed.parameters()}
    shapes |= {id(tensor): tensor.to("meta") for tensor in embed.buffers()}
    embed = copy_without_hooks(embed, shapes)  # hooks would record the grid of this run
    first = next(m for m in embed.modules() if isinstance(m, nn.Conv2d))
    seen: list[tuple[int, ...]] = []
    embed.proj.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[2:])))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        embed(torch.empty(1, first.in_channels, *sizes, device="meta"))
    return seen[-1], int(counter.get_total_flops()) // 2


SHAPES: dict[str, Any] = {
    "grid": lambda model: tuple(model.patch_embed.grid_size),
    "embed": lambda model: model.patch_embed.proj,
    "grid_at": _grid_at,
}
"""Fields of a row that give the grid: as configured, as recorded in a pass, and for images of any size."""


def model_cost(model: Any, stem: int) -> Ends:
    """Return the multiply-adds before and after the blocks, of which those of the patch embedding are `stem`."""
    heads = [getattr(model, name, None) for name in ("head", "head_dist")]
    head = linear_weights(*(m for m in heads if m is not None))
    pool, kind = getattr(model, "attn_pool", None), _pool_kind(model)
    if kind == "prr":  # attention without weights, over the unmerged tokens
        return Ends(stem, head, head_per_pair=2 * model.embed_dim)
    if kind == "":  # every token is classified
        return Ends(stem, head_per_token=head)
    if kind != "map" or pool is None:
        return Ends(stem, head)
    fixed, per_token = attention_pool(pool, pool.latent_len)
    if not model.pool_include_prefix:  # prefix tokens leave the blocks, but are not pooled
        fixed -= per_token * model.num_prefix_tokens
    return Ends(stem, head + fixed, per_token)


def _is_mae(model: Any) -> bool:
    """Return whether timm's metadata of the weights says MAE; the name of an architecture alone does not."""
    config = getattr(model, "pretrained_cfg", None) or {}
    tag = str(config.get("tag") or "")
    hub = str(config.get("hf_hub_id") or "").rpartition(".")[2]
    return any(name.startswith(("mae", "audiomae")) for name in (tag, hub))


def _refuse_model(model: Any) -> list[str]:
    if _pool_kind(model) not in ("", "token", "avg", "avgmax", "max", "map", "prr"):
        return [f"it pools by {_pool_kind(model)!r}, which is not known to weigh tokens right"]
    if _pool_kind(model) == "map" and "attn_mask" not in inspect.signature(AttentionPoolLatent.forward).parameters:
        return ["this timm's AttentionPoolLatent takes no attn_mask: upgrade timm"]
    if _pool_kind(model) == "map" and model.attn_pool.pos_embed is not None:
        return ["its attention pooling adds position embeddings to the tokens, which merged tokens no longer match"]
    return []


_VIT_SEAMS = (
    "forward",
    "_pos_embed",
    "forward_features",
    "forward_head",
    "forward_intermediates",
    "get_intermediate_layers",
    "pool",
)


VIT: dict[str, Any] = {
    "library": "timm",
    "seams": _VIT_SEAMS,
    "swap": MergeVisionTransformer,
    "blocks": lambda model: list(model.blocks),
    "protected": lambda model: int(model.num_prefix_tokens),
    "tokens": lambda model: int(model.patch_embed.num_patches + model.num_prefix_tokens),
    "pooling": _pooling,
    "channels": lambda model: int(model.embed_dim),
    "input_shape": image_shape,
    **SHAPES,
    "output": "merged",
    "norms": lambda model: [model.norm],
    "cost": lambda model: model_cost(model, stem_cost(model)),
    "mae": _is_mae,
    "needs_plans": lambda model: _pool_kind(model) == "prr",
    "refuse": _refuse_model,
}
"""Fields of the row of `VisionTransformer`, which its subclasses share."""

MODELS: Sequence[ModelFamily] = (
    ModelFamily(model=vision_transformer.VisionTransformer, **VIT),
    ModelFamily(model=deit.VisionTransformerDistilled, **VIT),
)
