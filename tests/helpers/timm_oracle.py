"""Hooks of the oracle in timm's other isotropic transformers: keys, positions, relative biases."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.tower_oracle import TowerOracle, tower_oracle


def second(block: Any) -> str:
    """Return the module before which tokens merge: the norm of the MLP, or the MLP in post-norm blocks."""
    return "mlp" if "Post" in type(block).__name__ else "norm2"


def keys(block: Any, note: Callable[[Tensor], None]) -> list[Any]:
    """Add hooks that record K `[B, N, H, D]`."""
    attn = block.attn
    if hasattr(attn, "k_norm"):
        return [attn.k_norm.register_forward_hook(lambda m, a, out: note(out.transpose(1, 2)))]

    def from_input(module: Any, args: Any) -> None:
        width = attn.qkv.weight.shape[0] // 3
        bias = None if attn.qkv.bias is None else attn.qkv.bias[width : 2 * width]
        if getattr(attn, "k_bias", None) is not None:
            bias = attn.k_bias
        note(F.linear(args[0], attn.qkv.weight[width : 2 * width], bias).unflatten(2, (attn.num_heads, -1)))

    return [attn.register_forward_pre_hook(from_input)]


def _grid(shape: list[int], swapped: bool, offset: float = 0.0, reference: Any = None, centred: bool = False) -> Tensor:
    """Return coordinates `[N, 2]` of patches in reading order: (row, column), or (column, row) if `swapped`.

    EVA scales indices to the grid of pre-training; DINOv3 spreads patch centres over [-1, 1].
    """
    places = []
    for axis, side in enumerate(shape):
        if centred:
            places.append(2 * (torch.arange(0.5, side) + offset) / side - 1)
        else:
            place = torch.arange(side) + offset
            places.append(place if reference is None else place / side * list(reference)[axis])
    grid = torch.stack(torch.meshgrid(*places, indexing="ij"), dim=-1).reshape(-1, 2)
    return grid.flip(-1) if swapped else grid


def _grid_and_frequencies(model: Any, index: int) -> tuple[Tensor, Tensor]:
    """Return coordinates `[N, 2]` of patches and frequencies `[2, F]` or `[2, H, F]`, as timm documents them."""
    rope, shape = model.rope, list(model.patch_embed.grid_size)
    kind = type(rope).__name__
    swapped, offset = getattr(rope, "grid_indexing", "ij") == "xy", float(getattr(rope, "grid_offset", 0.0))
    quarter = rope.dim // 4 if kind != "RotaryEmbeddingMixed" else 0
    zeros = torch.zeros(quarter)

    def axes(speeds: Tensor) -> Tensor:
        return torch.stack([torch.cat([speeds, zeros]), torch.cat([zeros, speeds])])

    if kind == "RotaryEmbeddingMixed":
        return _grid(shape, swapped), rope.freqs[:, index]
    if kind == "RotaryEmbeddingDinoV3":
        return _grid(shape, swapped, offset, centred=True), axes(2 * math.pi / rope.periods)
    if kind == "RotaryEmbeddingMRope":
        channel = rope.axis
        return _grid(shape, swapped=False), torch.stack(
            [torch.where(channel == 1 + axis, rope.inv_freq, 0.0) for axis in range(2)]
        )
    speeds = 1 / rope.temperature ** (torch.arange(quarter) / quarter)
    return _grid(shape, swapped, offset, rope.ref_feat_shape), axes(speeds)


def _turn(model: Any, prefix: int) -> Callable[..., Any]:
    half = getattr(model.rope, "rotate_half", False) or type(model.rope).__name__ == "RotaryEmbeddingMRope"
    blocks = list(model.blocks)

    def turn(oracle: TowerOracle, block: Any, args: Any, kwargs: Any) -> Any:
        grid, speeds = _grid_and_frequencies(model, blocks.index(block))
        where = oracle.place(torch.cat([torch.zeros(prefix, 2), grid]))[:, prefix:]
        if speeds.dim() == 3:
            angles = torch.einsum("bnp,phf->bhnf", where, speeds)
        else:
            angles = (where @ speeds).unsqueeze(1)
        twice = torch.cat([angles, angles], -1) if half else angles.repeat_interleave(2, -1)
        return args, {**kwargs, "rope": torch.cat([twice.sin(), twice.cos()], dim=-1)}

    return turn


def _relative(oracle: TowerOracle, block: Any, args: Any, kwargs: Any) -> Any:
    attn = block.attn
    for owner, name in ((attn, "_get_rel_pos_bias"), (getattr(attn, "rel_pos", None), "get_bias")):
        if owner is not None and hasattr(type(owner), name):
            if name == "_get_rel_pos_bias" and owner.relative_position_bias_table is None:
                continue
            upstream = getattr(type(owner), name)
            setattr(owner, name, lambda owner=owner, upstream=upstream: oracle.pairs(upstream(owner)))
    shared = {
        name: oracle.pairs(value)
        for name, value in kwargs.items()
        if name in ("shared_rel_pos_bias", "shared_rel_pos") and value is not None
    }
    return args, {**kwargs, **shared}


def timm_oracle(model: Any, schedule: tuple[int, ...], prefix: int, destination: bool = False) -> Any:
    """Return the oracle of an `Eva`, `Beit`, `Cait`, `VisionTransformerRelPos` or `NaFlexVit`."""
    blocks = list(model.blocks)
    on_block: Callable[..., Any] | None = None
    if getattr(model, "rope", None) is not None:
        on_block = _turn(model, prefix)
    elif type(model).__name__ in ("Beit", "VisionTransformerRelPos"):
        on_block = _relative
    return tower_oracle(blocks, second(blocks[0]), keys, schedule, prefix, on_block, destination)


def forget_overrides(model: Any) -> None:
    """Undo the changes that `_relative` made to modules."""
    for module in model.modules():
        for name in ("_get_rel_pos_bias", "get_bias"):
            vars(module).pop(name, None)
