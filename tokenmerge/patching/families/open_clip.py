"""Rows of open_clip's own `VisionTransformer`, with both kinds of attention; towers that wrap timm use timm's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from open_clip import transformer
from torch import Tensor, nn

from tokenmerge.errors import InputError
from tokenmerge.flops import BlockCost, Ends
from tokenmerge.patching.families import multihead
from tokenmerge.patching.families.family import BlockFamily, ModelFamily
from tokenmerge.patching.families.linear import attention_pool, linear_weights
from tokenmerge.patching.root import MergeRoot

NAMES = "open_clip's VisionTransformer"


class MergeOpenClip(MergeRoot):
    """Mix-in for open_clip's VisionTransformer, whose `forward_intermediates` pools the tokens of the last block itself."""

    def _pool(self, x: Tensor) -> Any:
        """Run upstream's pooling on the tokens that `forward` would pool."""
        return super()._pool(self._as_features(x))  # type: ignore[misc]  # upstream's class comes next


def _attention(block: Any, x: Tensor, bias: Tensor | None, **given: Any) -> Tensor:
    out: Tensor = x + block.ls_1(multihead.attend(block.attn, block.ln_1(x)))
    return out


def _custom_attention(block: Any, x: Tensor, bias: Tensor | None, **given: Any) -> Tensor:
    out: Tensor = x + block.ls_1(block.ln_attn(block.attn(block.ln_1(x), attn_mask=bias)))
    return out


def _mlp(block: Any, x: Tensor) -> Tensor:
    out: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return out


def _cost(block: Any) -> BlockCost:
    width = int(block.attn.out_proj.in_features)
    return BlockCost(4 * width * width, linear_weights(block.mlp), 2 * width)


def _refuse(block: Any) -> list[str]:
    reasons = multihead.refuse(block.attn)
    if hasattr(block, "ln_1_kv"):
        reasons.append("it attends to another sequence (cross-attention)")
    return reasons


def _refuse_custom(block: Any) -> list[str]:
    if type(block.attn).forward is not transformer.Attention.forward:
        return [f"its attention is {type(block.attn).__qualname__}, not open_clip's own"]
    if block.attn.logit_scale is not None:
        return ["its attention is scaled cosine, whose own code takes no batch of heads"]
    return []


def _pooling(model: Any) -> str:
    if model.attn_pool is not None:
        return "attention pooling over unmerged tokens"
    return {"tok": "class token", "avg": "mean of unmerged tokens"}.get(model.pool_type, "none")


def _merged_output(model: Any) -> list[str]:
    if model.attn_pool is None and model.pool_type != "avg":
        return []
    return [f"it reads its tokens by {_pooling(model).replace(' unmerged', '')}, without sizes"]


def _model_cost(model: Any) -> Ends:
    grid = model.grid_size[0] * model.grid_size[1]
    stem = int(model.conv1.weight.numel() * grid)
    project = 0 if model.proj is None else int(model.proj.numel())
    if model.attn_pool is None:
        return Ends(stem, project)
    queries = len(model.attn_pool.query)
    fixed, per_patch = attention_pool(model.attn_pool, queries)
    second = getattr(model, "attn_pool_contrastive", None)
    if second is not None:  # the second pool reads the tokens too, or the output of the first pool
        more, per_key = attention_pool(second, len(second.query))
        fixed += more + (0 if model.attn_pool_type == "parallel" else per_key * queries)
        per_patch += per_key if model.attn_pool_type == "parallel" else 0
    return Ends(stem, project + fixed, head_per_patch=per_patch)


def _grid_at(model: Any, sizes: Sequence[int]) -> tuple[int, ...]:
    if tuple(sizes) != tuple(model.image_size):
        raise InputError(
            f"this model takes images of {'×'.join(map(str, model.image_size))} pixels only, but {'×'.join(map(str, sizes))} was "
            "given: create it with force_image_size"
        )
    return tuple(model.grid_size)


_MODEL = ModelFamily(
    library="open_clip",
    model=transformer.VisionTransformer,
    seams=("forward", "forward_intermediates", "_embeds", "_pool", "_global_pool"),
    swap=MergeOpenClip,
    blocks=lambda model: list(model.transformer.resblocks),
    channels=lambda model: int(model.conv1.out_channels),
    protected=lambda model: 1,
    tokens=lambda model: int(model.grid_size[0] * model.grid_size[1] + 1),
    grid=lambda model: tuple(model.grid_size),
    embed=lambda model: model.conv1,
    grid_at=_grid_at,
    input_shape=lambda model: (3, *model.image_size),
    pooling=_pooling,
    cost=_model_cost,
    norms=lambda model: [model.ln_post],
    merged_output=_merged_output,
)

_BLOCKS = {
    transformer.ResidualAttentionBlock: BlockFamily(
        block=transformer.ResidualAttentionBlock,
        attention=_attention,
        mlp=_mlp,
        keys=lambda block: [],
        keys_at_call=True,
        cost=_cost,
        refuse=_refuse,
    ),
    transformer.CustomResidualAttentionBlock: BlockFamily(
        block=transformer.CustomResidualAttentionBlock,
        attention=_custom_attention,
        mlp=_mlp,
        keys=lambda block: [block.attn.ln_k],
        cost=_cost,
        refuse=_refuse_custom,
    ),
}


def model_row(cls: type[nn.Module]) -> ModelFamily | None:
    """Return the row of a model class, or `None`."""
    return _MODEL if cls is transformer.VisionTransformer else None


def block_row(cls: type[nn.Module]) -> BlockFamily | None:
    """Return the row of a block class, or `None`."""
    return _BLOCKS.get(cls)


def why_not(cls: type[nn.Module]) -> str | None:
    """Return why a model class has no row; `None` if the reason is not known."""
    if cls.__name__ in ("ModifiedResNet",):
        return "it is a convolutional network"
    return None


def misread(cls: type[nn.Module], tower: type[nn.Module], module: nn.Module) -> str | None:
    """Return `""` for open_clip's models, which read the pooled output of a tower; `None` for any other module."""
    return "" if cls.__name__ in ("CLIP", "CustomTextCLIP", "TimmModel") else None
