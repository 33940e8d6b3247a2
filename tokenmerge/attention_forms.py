"""Proportional attention on fast kernels: several ways to compute `softmax(QKᵀ·scale + log size) V`, and a choice.

Upstream's attention calls PyTorch's `scaled_dot_product_attention` with our mask and is never touched. The mask
itself knows how it wants to be applied: it is a tensor whose class answers that one call (`__torch_function__`,
the protocol PyTorch has for this), and a plain additive mask for everything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenmerge.attention import note_inside
from tokenmerge.errors import ConfigError

AttentionForm = Literal["auto", "mask", "cudnn", "efficient", "math", "flex", "key_channel", "value_channel"]
FORMS = ("auto", "mask", "cudnn", "efficient", "math", "flex", "key_channel", "value_channel")
_NEED_CUDA = ("cudnn", "efficient", "flex")  # flex: on CPUs Inductor has it for inference only, and not for every N
_LEAST_LOG = -1000.0
"""Stands for log 0 where −inf times 0 would be NaN; e to its power is 0 in every dtype."""
_FLEX_CHANNELS = 16
"""The least head size that PyTorch compiles flex attention for."""
_kernel_choice = threading.Lock()
"""Which kernels PyTorch may choose from is a setting of the process: two threads must not change it at once."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which form runs, and why, in words."""

    form: str
    reason: str


def choose_form(form: str, device_type: str, hopper: bool, dtype: torch.dtype) -> Choice:
    """What "auto" means on a device; any other form is the user's.

    Args:
        form: one of `FORMS`.
        device_type: of the tokens, such as "cuda".
        hopper: whether it is an NVIDIA GPU of compute capability 9.0.
        dtype: in which attention computes.

    What it says of CPUs was measured on two cores (docs/performance.md); of GPUs it is what their makers publish.
    """
    if form != "auto":
        return Choice(form, "as the config asks")
    if hopper and dtype in (torch.float16, torch.bfloat16):
        return Choice("cudnn", "cuDNN's kernel takes a bias and is the fastest on Hopper")
    if device_type == "cuda":
        return Choice("mask", "PyTorch's memory-efficient kernel takes a bias; handle.tune(inputs) measures all forms")
    if device_type == "cpu":
        return Choice("mask", "PyTorch's CPU kernel takes it at 3 % above no mask; other forms cost more")
    return Choice("mask", "PyTorch chooses the kernel on this device")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_hopper(device_type: str, index: int | None) -> bool:
    """Whether the device is an NVIDIA GPU of compute capability 9.0."""
    if device_type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(index) == (9, 0)


def choice_for(form: str, x: Tensor, dtype: torch.dtype | None = None) -> Choice:
    """`choose_form` for tokens like `x`, computed on in `dtype` (that of `x`)."""
    if form in _NEED_CUDA and not x.is_cuda and not x.is_meta:
        raise ConfigError(
            f"attention={form!r} needs a CUDA device, but the tokens are on {x.device.type!r}: use attention='auto'"
        )
    return choose_form(form, x.device.type, is_hopper(x.device.type, x.device.index), dtype or x.dtype)


def with_form(bias: Tensor, form: str, watch: bool = False) -> Tensor:
    """The mask `[B, 1, 1, N]`, made to be applied in that way.

    Args:
        bias: log sizes.
        form: one of `FORMS`.
        watch: whether it shall note Q, K and V on the way (`attention.take_inside`).

    Raises:
        ConfigError: if the form cannot run on its device.
    """
    if watch:
        form = choice_for(form, bias).form
        return bias.as_subclass(watching("mask" if torch.compiler.is_exporting() else form))
    if form == "auto" and bias.device.type == "cpu":
        return bias  # as choose_form says; said here at once, because it is asked in every block
    form = choice_for(form, bias).form
    if form == "mask" or torch.compiler.is_exporting():
        return bias
    return bias.as_subclass(MASKS[form])


class SizedMask(Tensor):
    """`log size` as an additive mask that attention takes in the way of its class.

    Views of it stay what they are, so that upstream may reshape its mask; all other results are plain tensors.
    """

    form: ClassVar[str] = "mask"
    watches: ClassVar[bool] = False

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer attention; leave everything else to the tensor's own function."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return cls.attend(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        return out.as_subclass(cls) if func in _VIEWS else out

    @classmethod
    def attend(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`scaled_dot_product_attention` with this mask."""
        with torch._C.DisableTorchFunctionSubclass():
            mask = attn_mask.view(attn_mask.shape)  # a plain tensor again, in a way that Dynamo traces
            if cls.watches:
                note_inside(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
            if (
                is_causal or enable_gqa or mask.dim() != 4 or mask.shape[2] != 1
            ):  # more than sizes: not ours to take apart
                return F.scaled_dot_product_attention(
                    query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
                )
            return _ATTEND[cls.form](
                query, key, value, mask, dropout_p, query.shape[-1] ** -0.5 if scale is None else scale
            )


_VIEWS = {
    Tensor.view,
    Tensor.reshape,
    Tensor.expand,
    Tensor.__getitem__,
    Tensor.unsqueeze,
    Tensor.squeeze,
    Tensor.contiguous,
    Tensor.to,
    Tensor.clone,
    Tensor.detach,
}


def _kernel(first: SDPBackend, *others: SDPBackend) -> Callable[..., Tensor]:
    """PyTorch's attention on the first of these kernels that can."""
    order = [first, *others]

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout_p: float, scale: float) -> Tensor:
        alone = contextlib.nullcontext() if torch.compiler.is_compiling() else _kernel_choice
        with alone, sdpa_kernel(order, set_priority=True):
            return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale)

    return attend


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _padded(channels: int, more: int) -> int:
    """How many channels to add for `more` of them to fit and the sum to be a multiple of 8, as fast kernels want it."""
    return -(channels + more) % 8 + more


def _key_channel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout_p: float, scale: float) -> Tensor:
    """`log size` as further channels of K where Q is 1: no mask, so that kernels without masks can run.

    There is room for two: the second holds what rounding took from the first.
    """
    dtype, more = query.dtype, _padded(query.shape[-1], 2)
    log = _widened(mask.squeeze(2)).clamp_min(_LEAST_LOG) / scale
    coarse = log.clamp_min(torch.finfo(dtype).min / 2).to(dtype)
    fine = (log - _widened(coarse)).clamp_min(torch.finfo(dtype).min / 2).to(dtype)
    of_keys = F.pad(torch.stack([coarse, fine], dim=-1), (0, more - 2)).expand(*key.shape[:-1], more)
    of_queries = F.pad(query.new_ones(2), (0, more - 2)).expand(*query.shape[:-1], more)
    out = F.scaled_dot_product_attention(
        torch.cat([query, of_queries], dim=-1),
        torch.cat([key, of_keys], dim=-1),
        F.pad(value, (0, more)),
        dropout_p=dropout_p,
        scale=scale,
    )
    return out[..., : value.shape[-1]]


def _value_channel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout_p: float, scale: float) -> Tensor:
    """`softmax(QKᵀ) [s·V, s]`, its last channel dividing the others: the sizes leave the softmax altogether.

    Q, K and V get as many channels, since fused kernels want heads of one size. The largest size is taken out of all: it
    cancels, and half precision does not overflow.
    """
    if dropout_p:  # it would drop from the divisor, too
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale)
    channels = value.shape[-1]
    more = _padded(channels, 1)
    log = _widened(mask.squeeze(2).unsqueeze(-1))
    size = (log - log.amax(dim=-2, keepdim=True)).exp().to(value.dtype)
    of_values = F.pad(size, (0, more - 1)).expand(*value.shape[:-1], more)
    weighted = torch.cat([value * size, of_values], dim=-1)
    out = F.scaled_dot_product_attention(F.pad(query, (0, more)), F.pad(key, (0, more)), weighted, scale=scale)
    total = _widened(out[..., channels : channels + 1]).clamp_min(torch.finfo(torch.float32).tiny)
    return (_widened(out[..., :channels]) / total).to(value.dtype)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout_p: float, scale: float) -> Tensor:
    """FlexAttention with `log size` added per key; the mask where flex cannot: with dropout, and for very small heads."""
    if dropout_p or min(query.shape[-1], value.shape[-1]) < _FLEX_CHANNELS:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale)
    from torch.nn.attention.flex_attention import flex_attention

    log = mask[:, 0, 0]

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + log[b, j]

    run: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    out: Tensor = run(query, key, value, score_mod=score_mod, scale=scale)
    return out


def _mask(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout_p: float, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale)


_ATTEND: dict[str, Callable[..., Tensor]] = {
    "mask": _mask,
    "cudnn": _kernel(SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "efficient": _kernel(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "math": _kernel(SDPBackend.MATH),
    "flex": _flex,
    "key_channel": _key_channel,
    "value_channel": _value_channel,
}


class CudnnMask(SizedMask):
    """cuDNN's kernel, or the next best where it cannot."""

    form = "cudnn"


class EfficientMask(SizedMask):
    """The memory-efficient kernel."""

    form = "efficient"


class MathMask(SizedMask):
    """Plain products and a softmax."""

    form = "math"


class FlexMask(SizedMask):
    """FlexAttention."""

    form = "flex"


class KeyChannelMask(SizedMask):
    """Further channels in Q and K."""

    form = "key_channel"


class ValueChannelMask(SizedMask):
    """One further channel in V."""

    form = "value_channel"


MASKS: dict[str, type[SizedMask]] = {
    mask.form: mask for mask in (CudnnMask, EfficientMask, MathMask, FlexMask, KeyChannelMask, ValueChannelMask)
}


def _watching(base: type[SizedMask]) -> type[SizedMask]:
    return type(f"Watching{base.__name__}", (base,), {"watches": True, "__doc__": f"{base.__doc__} Notes Q, K and V."})


_FORMS: dict[str, type[SizedMask]] = {"mask": SizedMask, **MASKS}
_WATCHING = {form: _watching(mask) for form, mask in _FORMS.items()}


def watching(form: str) -> type[SizedMask]:
    """The mask of that form that notes Q, K and V as attention uses them."""
    return _WATCHING[form]
