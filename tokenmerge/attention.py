"""Proportional attention: how token sizes reach upstream's own attention (paper, section 3).

A token that stands for s patches must draw as much attention as s equal tokens would:
`softmax(QKᵀ/√d + log s)`. Every attention that takes an additive mask can do that without being touched.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from tokenmerge.precision import autocast_dtype


def size_bias(size: Tensor | None, x: Tensor) -> Tensor | None:
    """`log size` as an additive attention mask `[B, 1, 1, N]`; `None` while all sizes are 1.

    Args:
        size: `[B, N]` float32, or `None` for all ones.
        x: the tokens `[B, N, C]`; the mask takes the dtype in which attention will compute on them.
    """
    if size is None:
        return None
    return size.log().to(autocast_dtype(x.device.type) or x.dtype)[:, None, None, :]


class _Tap(threading.local):
    """Keys noted while one block runs its attention; one per thread, so that threads may share a model."""

    keys: tuple[Tensor, ...] | None = None


_tap = _Tap()


def open_tap() -> None:
    """Start noting the keys of this thread's attention."""
    _tap.keys = ()


def close_tap() -> tuple[Tensor, ...]:
    """Stop noting; the keys since `open_tap`, each `[B, H, N, D]`."""
    keys, _tap.keys = _tap.keys, None
    return keys or ()


def note_keys(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """Forward hook of the module whose output is K as attention uses it (`[B, H, N, D]`)."""
    if _tap.keys is not None:
        _tap.keys = (*_tap.keys, output)


def note_untransposed_keys(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """Like `note_keys`, for blocks that normalise K as `[B, N, H, D]`."""
    if _tap.keys is not None:
        _tap.keys = (*_tap.keys, output.transpose(1, 2))


def head_mean(keys: tuple[Tensor, ...]) -> Tensor:
    """The paper's metric: K averaged over all heads, `[B, N, D]`; several attentions count as more heads."""
    mean = keys[0].mean(dim=1)
    for more in keys[1:]:
        mean = mean + more.mean(dim=1)
    return mean / len(keys) if len(keys) > 1 else mean
