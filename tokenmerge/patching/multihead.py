"""Seams of `torch.nn.MultiheadAttention`, which torchvision and open_clip build on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokenmerge.attention import fused_metric


def attend(attention: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Self-attention over `x [B, N, C]`; the sizes go in as a float key padding mask `[B, N]`, which is added."""
    mask = None if bias is None else bias[:, 0, 0].to(x.dtype).expand(x.shape[0], -1)
    out: Tensor = attention(x, x, x, need_weights=False, key_padding_mask=mask)[0]
    return out


def metric(attention: Any, noted: tuple[Tensor, ...]) -> Tensor:
    """The mean over heads of K `[B, N, D]`, from the tokens that K is made of."""
    return fused_metric(noted[0], attention.in_proj_weight, attention.in_proj_bias, attention.num_heads)


def refuse(attention: Any) -> list[str]:
    """Why this attention cannot carry sizes."""
    if not isinstance(attention, nn.MultiheadAttention) or type(attention).forward is not nn.MultiheadAttention.forward:
        return [f"its attention is {type(attention).__module__}.{type(attention).__qualname__}, not torch's own"]
    reasons = [] if attention.batch_first else ["its attention takes the tokens before the batch (batch_first=False)"]
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        reasons.append("its attention projects keys apart, or adds keys of its own")
    return reasons
