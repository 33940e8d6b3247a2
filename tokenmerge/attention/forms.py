"""Forms of proportional attention: several ways to compute `softmax(QKᵀ·scale + log size) V`, and the choice of one.

`tokenmerge/attention/call.py` runs a form in place of upstream's call of `scaled_dot_product_attention`. Every form
takes the sizes as the mask `[B, 1 or H, 1, N]`, and all forms compute the same result up to rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenmerge.config import AttentionForm
from tokenmerge.errors import ConfigError
from tokenmerge.ops.basics import is_exporting
from tokenmerge.ops.choice import device_refusal, triton_refusals

FORMS: tuple[str, ...] = get_args(AttentionForm)
_NEED_CUDA = ("cudnn", "efficient", "flex")  # flex: on CPUs Inductor has it for inference only, and not for every N
_LEAST_LOG = -1000.0
"""Replacement of log 0 where −inf · 0 would be NaN; its exponential is 0 in every dtype."""
_FLEX_CHANNELS = 16
"""Smallest D for which PyTorch compiles FlexAttention."""
_CHANNELS = 64
"""The D for which tokenmerge's own kernel runs; no other has been verified and timed on a GPU (docs/performance.md)."""
_kernel_choice = threading.Lock()
"""Lock around PyTorch's choice of attention kernels, which is a setting of the whole process."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The form of attention that runs, and the reason as a sentence.

    Attributes:
        form: one of `FORMS` except "auto".
        reason: why, for `Handle.summary`.
    """

    form: str
    reason: str


def choose_form(
    form: str, device_type: str, hopper: bool, dtype: torch.dtype, learns: bool = False, kernels: bool = True
) -> Choice:
    """Choose the form of attention for `form="auto"`; return any other form unchanged.

    The choice for CPUs was measured on two cores, the choice for Hopper on an H200 (docs/performance.md).

    Args:
        form: one of `FORMS`.
        device_type: device type of the tokens, such as "cuda".
        hopper: whether the device is an NVIDIA GPU of compute capability 9.0.
        dtype: dtype in which attention computes.
        learns: whether attention needs a gradient.
        kernels: whether tokenmerge's Triton kernels run on the device.
    """
    if form != "auto":
        return Choice(form, "as the config asks")
    if hopper and dtype in (torch.float16, torch.bfloat16):
        if learns:
            return Choice("efficient", "cuDNN's gradient with a mask was reported to be NaN for some numbers of tokens")
        if kernels:
            return Choice(
                "triton",
                "our own kernel, which adds sizes on the chip: for heads of 64 channels on an H200 0.68 to 0.86 of the time of "
                "PyTorch's attention with a mask; that one runs for other heads, and efficient where gradients are wanted",
            )
    if device_type == "cuda":
        return Choice("mask", "PyTorch's memory-efficient kernel takes a bias; handle.tune(inputs) measures all forms")
    if device_type == "cpu":
        return Choice("mask", "PyTorch's CPU kernel takes it at 3 % above no mask; other forms cost more")
    return Choice("mask", "PyTorch chooses the kernel on this device")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_hopper(device_type: str, index: int | None) -> bool:
    """Return whether a device is an NVIDIA GPU of compute capability 9.0."""
    if device_type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return False  # fake tensors may name a device that this machine lacks
    return torch.cuda.get_device_capability(index) == (9, 0)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kernels_run(device_type: str, index: int | None) -> bool:
    """Return whether no reason is known why the Triton kernels cannot run on a device."""
    return device_refusal(torch.device(device_type) if index is None else torch.device(device_type, index)) is None


def choice_for(form: str, x: Tensor, dtype: torch.dtype | None = None, learns: bool = False) -> Choice:
    """Choose the form of attention for tokens on the device of `x`.

    Args:
        form: one of `FORMS`.
        x: tokens; only their device and dtype count.
        dtype: dtype in which attention computes; `None` is the dtype of `x`.
        learns: whether attention needs a gradient.

    Raises:
        ConfigError: if the form cannot run on the device.
    """
    kernels = x.is_meta or _kernels_run(x.device.type, x.device.index)
    if form == "triton" and not kernels:
        raise ConfigError(f"attention='triton' cannot run: {device_refusal(x.device)}: use attention='auto'")
    if form in _NEED_CUDA and not x.is_cuda and not x.is_meta:
        raise ConfigError(
            f"attention={form!r} needs a CUDA device, but the tokens are on {x.device.type!r}: use attention='auto'"
        )
    hopper = is_hopper(x.device.type, x.device.index)
    return choose_form(form, x.device.type, hopper, dtype or x.dtype, learns, kernels)


def running_form(form: str, x: Tensor, bias: Tensor | None) -> str:
    """Return the form in which attention over tokens `x` runs in this pass; "mask" if there is nothing to choose."""
    if bias is None or form == "mask" or is_exporting():
        return "mask"  # exported programs contain PyTorch's own call
    if form == "auto" and x.device.type == "cpu":
        return "mask"  # the answer of `choose_form`, without its cost in every block
    return choice_for(form, x, bias.dtype, torch.is_grad_enabled() and x.requires_grad).form


def _kernel(first: SDPBackend, *others: SDPBackend) -> Callable[..., Tensor]:
    """Return a form that calls PyTorch's attention on the first of these kernels that supports the inputs."""
    order = [first, *others]

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout_p: float, scale: float) -> Tensor:
        alone = contextlib.nullcontext() if torch.compiler.is_compiling() else _kernel_choice
        with alone, sdpa_kernel(order, set_priority=True):
            return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale)

    return attend


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _padded(channels: int, more: int) -> int:
    """Return the channels to add: at least `more`, and so many that the sum is a multiple of 8, as fast kernels require."""
    return -(channels + more) % 8 + more


def _key_channel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout_p: float, scale: float) -> Tensor:
    """Compute attention without a mask: `log size` as additional channels of K, where Q has ones.

    Kernels that take no mask, such as flash attention, can then run. Two channels are used: the second holds the
    rounding error of the first.
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
    """Compute attention without a mask as `softmax(QKᵀ) [s·V, s]`, where the last channel divides the others.

    Q and K are padded to as many channels as V, because fused kernels require one head size. All sizes are divided by
    the largest one, which cancels in the quotient and avoids overflow in half precision.
    """
    if dropout_p:  # dropout would also apply to the divisor
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
    """Compute attention by FlexAttention with `log size` per key; with dropout or D < 16, by PyTorch with the mask."""
    if dropout_p or min(query.shape[-1], value.shape[-1]) < _FLEX_CHANNELS:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale)
    from torch.nn.attention.flex_attention import flex_attention

    log = mask[:, 0, 0]

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + log[b, j]

    run: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    out: Tensor = run(query, key, value, score_mod=score_mod, scale=scale)
    return out


def _triton(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout_p: float, scale: float) -> Tensor:
    """Compute attention by tokenmerge's Triton kernel (half precision, D = 64); else by PyTorch's kernels with a mask."""
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if dropout_p or learns:
        return ATTEND["efficient"](query, key, value, mask, dropout_p, scale)
    fits = query.dtype == key.dtype == value.dtype and query.dtype in (torch.float16, torch.bfloat16)
    fits = fits and query.shape[-1] == value.shape[-1] == _CHANNELS
    if not fits or triton_refusals(query, "attend", warn=query.is_cuda):
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    from tokenmerge.ops import attending

    return attending.attend(query, key, value, mask.squeeze(2).expand(*query.shape[:2], -1), scale)


ATTEND: dict[str, Callable[..., Tensor]] = {
    "triton": _triton,
    "cudnn": _kernel(SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "efficient": _kernel(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "math": _kernel(SDPBackend.MATH),
    "flex": _flex,
    "key_channel": _key_channel,
    "value_channel": _value_channel,
}
"""Functions by form: `(query, key, value, mask, dropout_p, scale) -> output [B, H, N, D]`; "mask" is PyTorch's own call."""
