"""Proportional attention (arXiv 2210.09461, section 3) inside upstream's unmodified attention, and access to its keys.

A token that stands for s patches must receive as much attention as s equal tokens: `softmax(QKᵀ/√D + log s)`. An
attention module that takes an additive mask gets `log s` as that mask. For other attention modules the model family names
a submodule whose hook applies it; such hooks read the mask from `context()`.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenmerge.attention.pairs import PairMap
from tokenmerge.ops.basics import autocast_dtype, no_autocast, sum_over_heads


def attention_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which attention computes on tokens `x` and expects its mask: autocast's dtype, or `x.dtype`."""
    return autocast_dtype(x.device.type) or x.dtype


def size_bias(size: Tensor | None, x: Tensor, prop_attn: bool = True, log_size: Tensor | None = None) -> Tensor | None:
    """Return `log size` as an additive attention mask (proportional attention, paper, section 3).

    Padding has size 0 and gets the least number of the dtype, so that no token attends to it, with or without
    proportional attention.

    Args:
        size: patches per token `[B, N]` float32, or `None` if all are 1.
        x: the tokens `[B, N, C]`; the mask has the dtype in which attention computes on them.
        prop_attn: whether attention is proportional to size; if not, only padding is masked.
        log_size: `[B, N]` logarithms of the sizes as the merge kernel wrote them; used if the dtype matches.

    Returns:
        The mask `[B, 1, 1, N]`, or `None` if all sizes are 1.
    """
    if size is None:
        return None
    dtype = attention_dtype(x)
    if prop_attn and log_size is not None and log_size.dtype == dtype:
        return log_size.view(size.shape[0], 1, 1, size.shape[1])
    weight = size if prop_attn else (size > 0).to(size.dtype)
    log = weight.log()
    if dtype != log.dtype:
        log = log.to(dtype)
    return log.clamp_min_(torch.finfo(dtype).min).view(size.shape[0], 1, 1, size.shape[1])


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionContext:
    """Inputs for the hooks and mix-ins inside upstream's attention while one block runs.

    Attributes:
        bias: additive mask of the sizes `[B, 1, 1, N]`, or `None`.
        pairs: maps biases between original tokens to the current tokens; `None` before the first merge.
        positions: coordinates of the current tokens `[B, N, P]`, for attention that computes its own rotary embedding.
    """

    bias: Tensor | None = None
    pairs: PairMap | None = None
    positions: Tensor | None = None


_NOTHING = AttentionContext()


class _Current(threading.local):
    """Thread-local holder of the open tap, so that several threads can run one model."""

    def __init__(self) -> None:
        # set in every thread from the start: Dynamo would guard on whether the attribute exists
        self.tap: Tap | None = None


_current = _Current()


class Tap:
    """Context manager around one call of upstream's attention: it offers a context to hooks and records the keys.

    `with Tap(context) as tap: …` applies to the current thread. The tap closes even if the block raises, so that the
    context of one model never reaches the attention of another.

    Attributes:
        context: the inputs for hooks inside attention.
        keys: outputs of the modules that the model family names as its source of keys.
        inside: Q, K and V `[B, H, N, D]` as attention used them, and the scale of QKᵀ; `None` unless an
            `attention.call.AttentionCall` with `watch=True` saw a call of `scaled_dot_product_attention`.
    """

    def __init__(self, context: AttentionContext | None = None) -> None:
        self.context = _NOTHING if context is None else context
        self.keys: tuple[Tensor, ...] = ()
        self.inside: tuple[Tensor, Tensor, Tensor, float] | None = None
        self._before: Tap | None = None

    def forget(self) -> None:
        """Let go of all tensors."""
        self.context, self.keys, self.inside = _NOTHING, (), None

    def __enter__(self) -> Tap:
        self._before, _current.tap = _current.tap, self
        return self

    def __exit__(self, *error: object) -> None:
        _current.tap, self._before = self._before, None


def open_tap() -> Tap | None:
    """Return the tap that is open in this thread, or `None`."""
    return _current.tap


def context() -> AttentionContext:
    """Return the context of the running block for hooks inside its attention; an empty one outside of a block."""
    tap = _current.tap
    return _NOTHING if tap is None else tap.context


def class_attention(query: Tensor, key: Tensor, scale: float, size: Tensor | None, class_token: bool) -> Tensor:
    """Compute the attention from the class token to every token, averaged over heads.

    It is computed beside upstream's attention, which may therefore stay a fused kernel.

    Args:
        query: `[B, H, N, D]`, any floating dtype.
        key: `[B, H, N, D]`, or with fewer heads (grouped-query attention).
        scale: factor of QKᵀ.
        size: patches per token `[B, N]` for proportional attention, or `None`.
        class_token: whether the first token is a class token. Without one, the result is the mean over all N queries,
            which takes N² numbers per head.

    Returns:
        `[B, N]` float32, which sums to 1 for each image.
    """
    rows = query[:, :, :1] if class_token else query
    return attention_maps(rows, key, scale, size).mean(dim=1)


def attention_maps(query: Tensor, key: Tensor, scale: float, size: Tensor | None) -> Tensor:
    """Compute attention weights averaged over heads, `[B, M, N]` float32, for M queries; see `class_attention`."""
    heads = query.shape[1]
    with no_autocast(query.device.type):
        key = key.float() if key.shape[1] == heads else key.float().repeat_interleave(heads // key.shape[1], dim=1)
        scores = query.float() @ key.transpose(2, 3) * scale
        if size is not None:
            scores = scores + size.log()[:, None, None, :]
        return scores.softmax(dim=3).mean(dim=1)


def note_output(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """Record the output of a module in the open tap; a forward hook for modules that output K as attention uses it."""
    tap = _current.tap
    if tap is not None:
        tap.keys = (*tap.keys, output)


def note_input(module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
    """Record the input of attention in the open tap; a forward pre-hook for attention whose K is no module's output."""
    tap = _current.tap
    if tap is not None:
        tap.keys = (*tap.keys, args[0] if args else next(iter(kwargs.values())))


def head_mean(block: Any, keys: tuple[Tensor, ...]) -> Tensor:
    """Average K over heads, the paper's metric: `[B, H, N, D]` to `[B, N, D]`; several attentions count as more heads."""
    return _mean(tuple(_over_heads(key, 1) for key in keys))


def head_mean_untransposed(block: Any, keys: tuple[Tensor, ...]) -> Tensor:
    """Average K over heads, for K laid out as `[B, N, H, D]`; the result is `[B, N, D]`."""
    return _mean(tuple(_over_heads(key, 2) for key in keys))


def _over_heads(key: Tensor, dim: int) -> Tensor:
    """Average over the heads in dimension `dim`, without gradient, in float32 (float64 for float64)."""
    return sum_over_heads(key.detach(), dim).mul_(1 / key.shape[dim])


def heads_first(block: Any, keys: tuple[Tensor, ...]) -> Tensor | None:
    """Return K `[B, H, N, D]` as recorded, for K in that layout; `None` if the block has several attentions."""
    return keys[0] if len(keys) == 1 else None


def heads_second(block: Any, keys: tuple[Tensor, ...]) -> Tensor | None:
    """Return K `[B, H, N, D]` as a view, for K recorded as `[B, N, H, D]`; `None` if the block has several attentions."""
    return keys[0].transpose(1, 2) if len(keys) == 1 else None


def _mean(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0) / len(parts)


def projected_metric(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Compute the mean over heads of `K = x Wᵀ + b` without computing K: averaging commutes with the projection.

    Args:
        x: tokens `[B, N, C]`.
        weight: `[H·D, C]`, the rows of the projection that produce K.
        bias: `[H·D]`, or `None`.
        heads: H.

    Returns:
        `[B, N, D]` in the dtype of the projection.
    """
    mean_weight = weight.reshape(heads, -1, weight.shape[1]).mean(dim=0)
    mean_bias = None if bias is None else bias.reshape(heads, -1).mean(dim=0)
    return F.linear(x, mean_weight, mean_bias)


def fused_metric(x: Tensor, projection: Any, heads: int) -> Tensor:
    """Compute `projected_metric` from a fused QKV layer, whose middle third of rows produces K.

    A layer that is not a plain `nn.Linear` (quantised, with an adapter, or with offloaded weights) is called instead.
    """
    weight: Any = getattr(projection, "weight", None)
    bias: Any = getattr(projection, "bias", None)
    plain = type(projection) is torch.nn.Linear and type(weight) in (Tensor, torch.nn.Parameter)
    if not plain or weight.device != x.device:
        keys: Tensor = projection(x).chunk(3, dim=-1)[1]
        return head_mean_untransposed(None, (keys.unflatten(-1, (heads, -1)),))
    width = weight.shape[0] // 3
    rows = slice(width, 2 * width)
    return projected_metric(x, weight[rows], None if bias is None else bias[rows], heads)


def weigh_probabilities(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Apply sizes to attention weights; a forward pre-hook of the dropout after a softmax that takes no mask.

    `p·s / Σ p·s` for weights p and sizes s equals `softmax(… + log s)`.
    """
    bias = context().bias
    if bias is None:
        return None
    weighted = args[0] * bias.exp()
    return (weighted / weighted.sum(dim=-1, keepdim=True), *args[1:])
