"""Proportional attention: how token sizes reach upstream's own attention (paper, section 3).

A token that stands for s patches must draw as much attention as s equal tokens would:
`softmax(QKᵀ/√d + log s)`. Every attention that takes an additive mask can do that without being touched;
for the others a row names a module inside where it can be put in (`context`, below).
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
    """In which attention over `x` computes, and so wants its mask."""
    return autocast_dtype(x.device.type) or x.dtype


def size_bias(size: Tensor | None, x: Tensor, prop_attn: bool = True, log_size: Tensor | None = None) -> Tensor | None:
    """`log size` as an additive attention mask `[B, 1, 1, N]`; `None` while all sizes are 1.

    Padding has size 0, hence −inf: nothing attends to it, with or without proportional attention.

    Args:
        size: `[B, N]` float32, or `None` for all ones.
        x: the tokens `[B, N, C]`; the mask takes the dtype in which attention will compute on them.
        prop_attn: whether sizes weigh; without, only padding is masked.
        log_size: `[B, N]`, the logarithms, where the kernel that merged has written them; used if its dtype fits.
    """
    if size is None:
        return None
    dtype = attention_dtype(x)
    if prop_attn and log_size is not None and log_size.dtype == dtype:
        return log_size[:, None, None, :]
    weight = size if prop_attn else (size > 0).to(size.dtype)
    log = weight.log()
    if dtype != log.dtype:
        log = log.to(dtype)
    return log.clamp_min_(torch.finfo(dtype).min).view(size.shape[0], 1, 1, size.shape[1])


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionContext:
    """What hooks and mix-ins inside upstream's attention may need while one block runs it.

    Attributes:
        bias: `[B, 1, 1, N]` additive mask of the sizes, or `None`.
        pairs: brings biases between original tokens to the current ones, or `None` while none merged.
        positions: `[B, N, P]`, coordinates of the current tokens, where attention makes its own rotation.
    """

    bias: Tensor | None = None
    pairs: PairMap | None = None
    positions: Tensor | None = None


class _Current(threading.local):
    """The tap that is open in this thread, so that threads may share a model."""

    def __init__(self) -> None:
        # in each thread from the start, or compiled code would depend on whether it is there yet
        self.tap: Tap | None = None


_current = _Current()


class Tap:
    """Within it, this thread's attention is given a context, and shows its keys: `with Tap(context) as tap: …`.

    It is closed however the block ends, so that what one model's attention was given never reaches another's.

    Attributes:
        context: what hooks inside attention may read.
        keys: what the row's `keys` modules showed.
        inside: Q, K, V `[B, H, N, D]` as attention used them, and its scale; `None` where an `attention.call.AttentionCall`
            was not asked for them, or attention did not call `scaled_dot_product_attention`.
    """

    def __init__(self, context: AttentionContext | None = None) -> None:
        self.context = AttentionContext() if context is None else context
        self.keys: tuple[Tensor, ...] = ()
        self.inside: tuple[Tensor, Tensor, Tensor, float] | None = None
        self._before: Tap | None = None

    def __enter__(self) -> Tap:
        self._before, _current.tap = _current.tap, self
        return self

    def __exit__(self, *error: object) -> None:
        _current.tap, self._before = self._before, None


def open_tap() -> Tap | None:
    """The tap that is open in this thread, or `None`."""
    return _current.tap


def context() -> AttentionContext:
    """What the running block offers to hooks inside its attention; empty outside of one."""
    tap = _current.tap
    return AttentionContext() if tap is None else tap.context


def class_attention(query: Tensor, key: Tensor, scale: float, size: Tensor | None, class_token: bool) -> Tensor:
    """`[B, N]` float32: attention of the class token to every token, mean over heads; fused attention stays as it is.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H or fewer, N, D]`.
        scale: of their products.
        size: patches per token `[B, N]`; attention is proportional to them.
        class_token: whether the first token is one; without it, the mean attention of all tokens, N² numbers a head.
    """
    rows = query[:, :, :1] if class_token else query
    return attention_maps(rows, key, scale, size).mean(dim=1)


def attention_maps(query: Tensor, key: Tensor, scale: float, size: Tensor | None) -> Tensor:
    """`[B, M, N]` float32: attention of each query to every token, mean over heads; arguments as of `class_attention`."""
    heads = query.shape[1]
    with no_autocast(query.device.type):
        key = key.float() if key.shape[1] == heads else key.float().repeat_interleave(heads // key.shape[1], dim=1)
        scores = query.float() @ key.transpose(2, 3) * scale
        if size is not None:
            scores = scores + size.log()[:, None, None, :]
        return scores.softmax(dim=3).mean(dim=1)


def note_output(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """Forward hook of a module whose output holds K as attention uses it."""
    tap = _current.tap
    if tap is not None:
        tap.keys = (*tap.keys, output)


def note_input(module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention whose K is nowhere a module's output: notes the tokens it is made from."""
    tap = _current.tap
    if tap is not None:
        tap.keys = (*tap.keys, args[0] if args else next(iter(kwargs.values())))


def head_mean(block: Any, keys: tuple[Tensor, ...]) -> Tensor:
    """The paper's metric: K `[B, H, N, D]` averaged over all heads, `[B, N, D]`; more attentions are more heads."""
    return _mean(tuple(_over_heads(key, 1) for key in keys))


def head_mean_untransposed(block: Any, keys: tuple[Tensor, ...]) -> Tensor:
    """`head_mean` of K as `[B, N, H, D]`."""
    return _mean(tuple(_over_heads(key, 2) for key in keys))


def _over_heads(key: Tensor, dim: int) -> Tensor:
    """The mean over heads without gradient, in float32 or wider."""
    return sum_over_heads(key.detach(), dim).mul_(1 / key.shape[dim])


def heads_first(block: Any, keys: tuple[Tensor, ...]) -> Tensor | None:
    """K as `[B, H, N, D]`, as it was noted; `None` if there are several attentions."""
    return keys[0] if len(keys) == 1 else None


def heads_second(block: Any, keys: tuple[Tensor, ...]) -> Tensor | None:
    """The same, a view, of K as `[B, N, H, D]`."""
    return keys[0].transpose(1, 2) if len(keys) == 1 else None


def _mean(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0) / len(parts)


def projected_metric(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """The mean over heads of `K = x Wᵀ + b`, without making K: the mean commutes with the projection.

    Args:
        x: tokens `[B, N, C]`.
        weight: `[H·D, C]`, the rows of the projection that make K.
        bias: `[H·D]` or `None`.
        heads: H.

    Returns:
        `[B, N, D]`.
    """
    mean_weight = weight.reshape(heads, -1, weight.shape[1]).mean(dim=0)
    mean_bias = None if bias is None else bias.reshape(heads, -1).mean(dim=0)
    return F.linear(x, mean_weight, mean_bias)


def fused_metric(x: Tensor, projection: Any, heads: int) -> Tensor:
    """`projected_metric` for a linear layer that makes Q, K and V at once: its middle third makes K.

    Any other layer, quantised, with an adapter, or with weights that are elsewhere until it runs, runs as it is.
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
    """Forward pre-hook of the dropout after a softmax that takes no mask: `p·s / Σ p·s` is `softmax(… + log s)`."""
    bias = context().bias
    if bias is None:
        return None
    weighted = args[0] * bias.exp()
    return (weighted / weighted.sum(dim=-1, keepdim=True), *args[1:])
