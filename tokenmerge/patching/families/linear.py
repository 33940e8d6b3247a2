"""Multiply-adds of linear layers and of attention-pooling heads, for all libraries."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def channels_of(block: nn.Module, otherwise: int) -> int:
    """Return C of a block's tokens from its norms, because layers may have been pruned, quantised or given adapters since.

    Args:
        block: the block.
        otherwise: result for blocks without a norm that has weights.
    """
    norms: list[Any] = [module for module in block.modules() if "Norm" in type(module).__name__]
    weights = (getattr(norm, "weight", None) for norm in norms)
    weight = next((weight for weight in weights if isinstance(weight, Tensor) and weight.dim() == 1), None)
    return otherwise if weight is None else len(weight)


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def linear_weights(*modules: nn.Module) -> int:
    """Return the multiply-adds per token of all linear layers in the modules; quantised layers count by their shape."""
    found: list[Any] = [m for module in modules for m in module.modules() if _is_linear(m)]
    # a layer that wraps another one (an adapter) counts by its parts
    linear = [m for m in found if not any(_is_linear(part) for part in m.modules() if part is not m)]
    return sum(int(m.in_features) * int(m.out_features) for m in linear)


_OF_KEYS = ("k", "v", "kv", "k_proj", "v_proj", "key", "value")
"""Names of the linear layers of an attention that compute keys or values, in all libraries."""


def attention_pool(pool: nn.Module, queries: int = 1) -> tuple[int, int]:
    """Return the multiply-adds of a head in which a few learned queries attend to all tokens, its MLP included.

    Args:
        pool: the head, with one attention inside: `nn.MultiheadAttention`, or linear layers with names of `_OF_KEYS`.
        queries: number of queries.

    Returns:
        Multiply-adds that do not depend on the number of tokens, and multiply-adds per token.
    """
    keys: list[Any] = [module for name, module in pool.named_modules() if name.rpartition(".")[2] in _OF_KEYS]
    fixed = queries * (linear_weights(pool) - linear_weights(*keys))
    per_key = linear_weights(*keys)
    # both products of attention have the width of the keys and of the values; a joint layer for both has twice that
    width = sum(int(module.out_features) for module in keys if _is_linear(module))
    for attention in (module for module in pool.modules() if isinstance(module, nn.MultiheadAttention)):
        packed = attention.in_proj_weight
        query, key, value = packed.chunk(3) if packed is not None else _apart(attention)
        fixed += queries * query.numel()
        per_key += key.numel() + value.numel()
        width += key.shape[0] + value.shape[0]
    return fixed, per_key + queries * width


def _apart(attention: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three projections of an attention whose keys and queries differ in channels."""
    return attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
