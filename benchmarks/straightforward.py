"""Straightforward implementation of token merging, the baseline of `models.py`.

It implements the paper's equations for a plain timm Vision Transformer step by step in PyTorch, without fused kernels: attention
that writes its N × N weights, all similarities, a full sort, and gathers with expanded indices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def attention(attn: Any, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax(QKᵀ/√d + log size) V after the projection, and K averaged over heads `[B, N, D]`."""
    batch, tokens, channels = x.shape
    q, k, v = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = q * attn.scale @ k.transpose(-2, -1) + size.log()[:, None, None, :]
    mixed = (weights.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, channels)
    return attn.proj(mixed), k.mean(dim=1)


def match(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Match tokens by bipartite soft matching (paper, section 3) with one class token.

    Returns:
        Indices of the A tokens that stay `[B, |A| − r]` and that merge `[B, r]`, and of the B tokens they merge into `[B, r]`.
    """
    metric = metric / metric.norm(dim=-1, keepdim=True)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    similarity[:, 0] = -torch.inf  # the class token never merges
    best, partner = similarity.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    merged, alone = order[:, :r], order[:, r:].sort(dim=-1).values
    return alone, merged, partner.gather(1, merged)


def combine(x: Tensor, size: Tensor, alone: Tensor, merged: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return merged tokens as means weighted by size, and their sizes."""

    def apply(values: Tensor) -> Tensor:
        def at(index: Tensor) -> Tensor:
            return index.unsqueeze(-1).expand(-1, -1, values.shape[-1])

        a, b = values[:, ::2], values[:, 1::2]
        b = b.scatter_add(1, at(target), a.gather(1, at(merged)))
        return torch.cat([a.gather(1, at(alone)), b], dim=1)

    weighted, sizes = apply(x * size.unsqueeze(-1)), apply(size.unsqueeze(-1))
    return weighted / sizes, sizes.squeeze(-1)


def straightforward(model: Any, r: int) -> Callable[[Tensor], Tensor]:
    """Run an unpatched timm `VisionTransformer` with a class token, merging r tokens per block."""

    def forward(images: Tensor) -> Tensor:
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        size = torch.ones(x.shape[:2], device=x.device, dtype=x.dtype)
        for block in model.blocks:
            mixed, metric = attention(block.attn, block.norm1(x), size)
            x = x + mixed
            x, size = combine(x, size, *match(metric, min(r, (x.shape[1] - 1) // 2)))
            x = x + block.mlp(block.norm2(x))
        logits: Tensor = model.forward_head(model.norm(x))
        return logits

    return forward
