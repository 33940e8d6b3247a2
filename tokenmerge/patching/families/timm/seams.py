"""Parts shared by the rows of timm's other isotropic transformers, which use full output so that any head fits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from tokenmerge.attention.tap import context
from tokenmerge.errors import PatchError
from tokenmerge.flops import Ends
from tokenmerge.patching.families.family import ModelFamily
from tokenmerge.patching.families.linear import attention_pool, linear_weights
from tokenmerge.patching.families.timm.vit import SHAPES, image_shape, stem_cost
from tokenmerge.patching.root import MergeFeatures
from tokenmerge.patching.state import needed_state, state_of

WORDS = {
    "": "none",
    "token": "class token",
    "avg": "mean of unmerged tokens",
    "avgmax": "mean and maximum of unmerged tokens",
    "max": "maximum",
    "map": "attention pooling over unmerged tokens",
}


_ONE_BY_ONE = ("", "token", "max")
"""Kinds of pooling that need no sizes."""


class MergeHook(MergeFeatures):
    """Mix-in for models whose heads read unmerged tokens."""

    def forward_head(self, *args: Any, **kwargs: Any) -> Any:
        """Run timm's head, which users may also call on features of their own.

        Raises:
            PatchError: if it would pool merged tokens without their sizes.
        """
        _check_pooled(self, (*args, *kwargs.values())[0])
        return super().forward_head(*args, **kwargs)  # type: ignore[misc]  # upstream's class comes next


class MergePool(MergeHook):
    """Mix-in for models whose pooling is the method `pool`, which users may also call on features of their own."""

    def pool(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Run timm's pooling.

        Raises:
            PatchError: if it would read merged tokens without their sizes.
        """
        _check_pooled(self, x, *args, **kwargs)
        return super().pool(x, *args, **kwargs)  # type: ignore[misc]  # upstream's class comes next


class MergePaddedPool(MergeHook):
    """Mix-in for models whose pooling leaves out patches that are padding."""

    def _pool(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        _check_pooled(self, x, *args, **kwargs)
        return super()._pool(x, *args, **kwargs)  # type: ignore[misc]  # upstream's class comes next


def _check_pooled(model: Any, x: Any, pool_type: str | None = None, patch_valid: Tensor | None = None) -> None:
    settings = model._tokenmerge.settings
    kind = pool_kind(model) if pool_type is None or pool_kind(model) == "map" else pool_type
    by_position = patch_valid is not None and kind not in ("", "token")
    if settings.full_output or isinstance(x, Proxy) or (kind in _ONE_BY_ONE and not by_position):
        return
    reader = f"{kind} pooling"
    state = needed_state(x, reader) if settings.merges else state_of(x)
    if state is not None and state.size is not None and state.merged is None:
        what = "masks padding by position" if by_position else "knows nothing of sizes"
        raise PatchError(f"{reader} {what}, but was given merged tokens: use handle.update(output='full')")


def pool_kind(model: Any) -> str:
    """Return timm's name for the head's kind of pooling."""
    return "map" if getattr(model, "attn_pool", None) is not None else str(getattr(model, "global_pool", "token"))


def _merged_output(model: Any) -> list[str]:
    kind = pool_kind(model)
    return [] if kind in _ONE_BY_ONE else [f"its {kind} pooling would not weigh tokens by their sizes"]


def ends(model: Any, stem: int) -> Ends:
    """Return the multiply-adds before and after the blocks of a model whose head reads unmerged tokens.

    Args:
        model: the model.
        stem: multiply-adds of the patch embedding.
    """
    classify = linear_weights(*(part for part in [getattr(model, "head", None)] if part is not None))
    pool, kind = getattr(model, "attn_pool", None), pool_kind(model)
    if kind == "":  # every token is classified
        return Ends(stem, head_per_patch=classify)
    if pool is None:
        return Ends(stem, classify)
    fixed, per_patch = attention_pool(pool, pool.latent_len)
    if not getattr(model, "pool_include_prefix", True):  # prefix tokens leave the blocks, but are not pooled
        fixed -= per_patch * int(model.num_prefix_tokens)
    return Ends(stem, classify + fixed, head_per_patch=per_patch)


_POOLS = {"pool": MergePool, "_pool": MergePaddedPool}


def isotropic(model: type[nn.Module], **seams: Any) -> ModelFamily:
    """Return the row of a model with `patch_embed`, `blocks`, `norm` and timm's usual names for everything else.

    Args:
        model: the model's class.
        **seams: fields of `ModelFamily` that differ from the usual ones.
    """
    common: dict[str, Any] = {
        "blocks": lambda model: list(model.blocks),
        "channels": lambda model: int(model.embed_dim),
        "protected": lambda model: int(model.num_prefix_tokens),
        "tokens": lambda model: int(model.patch_embed.num_patches + model.num_prefix_tokens),
        **SHAPES,
        "input_shape": image_shape,
        "pooling": lambda model: WORDS.get(pool_kind(model), pool_kind(model)),
        "cost": lambda model: ends(model, stem_cost(model)),
        "norms": lambda model: [model.norm],
        "merged_output": _merged_output,
        "swap": next((mixin for name, mixin in _POOLS.items() if hasattr(model, name)), MergeHook),
    }
    methods = ("forward", "forward_features", "forward_head", "forward_intermediates", "pool", "_pos_embed")
    return ModelFamily(
        library="timm",
        model=model,
        seams=tuple(name for name in methods if hasattr(model, name)),
        **{**common, **seams},
    )


class FollowsTokens:
    """Mix-in for modules that compute a bias between original tokens: its rows and columns follow the merge."""

    def _get_rel_pos_bias(self) -> Tensor:
        return _moved(super()._get_rel_pos_bias())  # type: ignore[misc]

    def get_bias(self) -> Tensor:
        """Return upstream's bias `[1, H, N₀, N₀]`, moved to the current tokens, plus the bias of their sizes."""
        bias, sizes = _moved(super().get_bias()), context().bias  # type: ignore[misc]
        return bias if sizes is None else bias + sizes


def _moved(bias: Tensor) -> Tensor:
    pairs = context().pairs
    return bias if pairs is None else pairs(bias)
