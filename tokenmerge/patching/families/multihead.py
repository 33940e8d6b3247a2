"""Support for `torch.nn.MultiheadAttention`, which torchvision and open_clip use."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def attend(attention: Any, x: Tensor) -> Tensor:
    """Run self-attention on `x [B, N, C]`; sizes enter, and K is recorded, in its call of `scaled_dot_product_attention`.

    The sizes do not enter as its key padding mask, because that mask would be copied for every head.
    """
    out: Tensor = attention(x, x, x, need_weights=False)[0]
    return out


def refuse(attention: Any) -> list[str]:
    """Return reasons why this attention cannot carry token sizes."""
    if not isinstance(attention, nn.MultiheadAttention) or type(attention).forward is not nn.MultiheadAttention.forward:
        return [f"its attention is {type(attention).__module__}.{type(attention).__qualname__}, not torch's own"]
    reasons = [] if attention.batch_first else ["its attention takes the tokens before the batch (batch_first=False)"]
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        reasons.append("its attention projects keys apart, or adds keys of its own")
    return reasons
