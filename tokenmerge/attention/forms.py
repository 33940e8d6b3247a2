"""Proportional attention on fast kernels: several ways to compute `softmax(QKᵀ·scale + log size) V`, and a choice.

`attention/call.py` puts them in the place of upstream's call of `scaled_dot_product_attention`. Each takes the mask
`[B, 1 or H, 1, N]` apart in its own way; all compute the same.
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
"""Stands for log 0 where −inf times 0 would be NaN; e to its power is 0 in every dtype."""
_FLEX_CHANNELS = 16
"""The least head size that PyTorch compiles flex attention for."""
_CHANNELS = 64
"""Channels of a head for which our own kernel runs: no other size has been checked and timed on a GPU (docs/performance.md)."""
_kernel_choice = threading.Lock()
"""Which kernels PyTorch may choose from is a setting of the process: two threads must not change it at once."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which form runs, and why, in words."""

    form: str
    reason: str


def choose_form(
    form: str, device_type: str, hopper: bool, dtype: torch.dtype, learns: bool = False, kernels: bool = True
) -> Choice:
    """What "auto" means on a device; any other form is the user's.

    Args:
        form: one of `FORMS`.
        device_type: of the tokens, such as "cuda".
        hopper: whether it is an NVIDIA GPU of compute capability 9.0.
        dtype: in which attention computes.
        learns: whether a gradient will be wanted.
        kernels: whether Triton's kernels run there.

    What it says of CPUs was measured on two cores, of Hopper on an H200 (docs/performance.md).
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
    """Whether the device is an NVIDIA GPU of compute capability 9.0."""
    if device_type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return False  # (tensors without memory may be of a device that is not here)
    return torch.cuda.get_device_capability(index) == (9, 0)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kernels_run(device_type: str, index: int | None) -> bool:
    """Whether nothing is known against Triton's kernels on a device."""
    return device_refusal(torch.device(device_type) if index is None else torch.device(device_type, index)) is None


def choice_for(form: str, x: Tensor, dtype: torch.dtype | None = None, learns: bool = False) -> Choice:
    """`choose_form` for tokens like `x`, computed on in `dtype` (that of `x`).

    Raises:
        ConfigError: if the form cannot run on their device.
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
    """The form in which attention over `x` computes now; "mask" where there is nothing to choose."""
    if bias is None or form == "mask" or is_exporting():
        return "mask"  # exported programs hold PyTorch's own call
    if form == "auto" and x.device.type == "cpu":
        return "mask"  # as `choose_form` says; said here at once, because it is asked in every block
    return choice_for(form, x, bias.dtype, torch.is_grad_enabled() and x.requires_grad).form


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


def _triton(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout_p: float, scale: float) -> Tensor:
    """Our own kernel for heads that it was checked with on a GPU, in half precision; else PyTorch's kernels with a mask."""
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
"""`(query, key, value, mask, dropout_p, scale) -> output`, all `[B, H, N, D]`, by form; "mask" is PyTorch's own call."""
