"""`AttentionCall`: intercept upstream's call of `scaled_dot_product_attention` while a block's attention runs.

Upstream's attention is not modified. A `torch.overrides.TorchFunctionMode` sees its call of
`scaled_dot_product_attention`, records Q, K and V if they are needed, and computes the result in the chosen form. Such
a mode applies to one thread, works under Dynamo, fake tensors and `torch.export`, and changes no tensor's class.
"""

from __future__ import annotations

import threading
import types
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tokenmerge.attention.forms import ATTEND
from tokenmerge.attention.tap import open_tap


class AttentionCall(TorchFunctionMode):
    """Context manager in which attention with a mask of sizes runs in one of the forms of `attention.forms.FORMS`.

    Only a floating mask `[B, 1 or H, 1, N]`, one number per key, is handled; PyTorch computes all other calls.
    """

    def __init__(self, form: str = "mask", watch: bool = False, bias: Tensor | None = None) -> None:
        """Create the mode.

        Args:
            form: one of `FORMS` except "auto".
            watch: whether to record Q, K and V in the open tap (`attention.tap.Tap.inside`).
            bias: mask `[B, 1, 1, N]` for the attention inside `nn.MultiheadAttention`, which is called without a mask.
        """
        super().__init__()
        self.form, self.watch, self.bias = form, watch, bias

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Handle attention functions; call every other function unchanged."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            _answering.call = self
            try:
                return _multi_head_attention_forward(*args, **kwargs)
            finally:
                _answering.call = None
        return func(*args, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Compute `scaled_dot_product_attention` (same arguments and result), recorded if `watch`, in the chosen form."""
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        tap = open_tap() if self.watch else None
        if tap is not None:
            tap.inside = (query, key, value, factor)
        plain = attn_mask is None or attn_mask.dim() != 4 or attn_mask.shape[2] != 1 or attn_mask.dtype == torch.bool
        if self.form == "mask" or plain or is_causal or enable_gqa:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        return ATTEND[self.form](query, key, value, attn_mask, dropout_p, factor)


class _Answering(threading.local):
    """Thread-local holder of the mode that handles the running `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        # set in every thread from the start: Dynamo would guard on whether the attribute exists
        self.call: AttentionCall | None = None


_answering = _Answering()


def _attend_in_multihead(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replace the attention call inside `multi_head_attention_forward`, with the sizes as its mask."""
    call = _answering.call
    assert call is not None
    return call.attend(query, key, value, call.bias)


def _never(*_: Any) -> bool:
    return False


def _bound_anew(function: Any, names: dict[str, Any]) -> Any:
    """Return a copy of one of PyTorch's functions in whose code the given global names refer to other objects.

    The original stays unchanged. `__name__` is left out of the globals so that Dynamo looks names up in this dict.
    """
    scope = {key: value for key, value in vars(F).items() if key != "__name__"} | names
    again = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    again.__kwdefaults__ = function.__kwdefaults__
    return again


# PyTorch disables a mode inside the functions that it handles, so the mode would not see the attention call in this one
_multi_head_attention_forward = _bound_anew(
    F.multi_head_attention_forward,
    {"has_torch_function": _never, "scaled_dot_product_attention": _attend_in_multihead},
)
