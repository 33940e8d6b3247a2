"""The one call of attention, answered in our way while a block's attention runs.

Upstream's attention calls PyTorch's `scaled_dot_product_attention` and is never touched. While it runs, a mode of torch
functions (`torch.overrides.TorchFunctionMode`) sees that call: it notes Q, K and V, and computes it in the form that was
chosen. Modes belong to one thread, pass Dynamo, fake tensors and `torch.export`, and change no tensor's class.
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
    """Within it, attention with a mask of sizes is computed in a form of `attention.forms.FORMS`.

    A mask that is more than one number for each key (it has a row for each query) is left to PyTorch.
    """

    def __init__(self, form: str = "mask", watch: bool = False, bias: Tensor | None = None) -> None:
        """Args:
        form: any but "auto".
        watch: whether to note Q, K and V (`attention.tap.Tap.inside`).
        bias: mask `[B, 1, 1, N]` for `nn.MultiheadAttention`, which is called without one.
        """
        super().__init__()
        self.form, self.watch, self.bias = form, watch, bias

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer attention; everything else is what it is."""
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
        """`scaled_dot_product_attention`, noted if wanted, in the chosen form where its mask is one of sizes."""
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
    """Whose `nn.MultiheadAttention` this thread is inside of."""

    def __init__(self) -> None:
        # in each thread from the start, or compiled code would depend on whether it is there yet
        self.call: AttentionCall | None = None


_answering = _Answering()


def _attend_in_multihead(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The call of attention inside `multi_head_attention_forward`, with the sizes as its mask."""
    call = _answering.call
    assert call is not None
    return call.attend(query, key, value, call.bias)


def _never(*_: Any) -> bool:
    return False


def _bound_anew(function: Any, names: dict[str, Any]) -> Any:
    """PyTorch's own function, as it is installed, in whose code some global names mean something else.

    The rest of the process keeps the original. Without `__name__` Dynamo looks names up in this very dict.
    """
    scope = {key: value for key, value in vars(F).items() if key != "__name__"} | names
    again = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    again.__kwdefaults__ = function.__kwdefaults__
    return again


# PyTorch suspends a mode inside the functions that it answers, so that it would not see the call inside this one
_multi_head_attention_forward = _bound_anew(
    F.multi_head_attention_forward,
    {"has_torch_function": _never, "scaled_dot_product_attention": _attend_in_multihead},
)
