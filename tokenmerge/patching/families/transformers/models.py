"""Rows of transformers' towers; heads and language models around them are not changed.

Unmerged tokens leave the last layer unless the user asks for merged ones. Every head, decoder, pooler or language model
therefore reads tokens in upstream's shapes and needs no sizes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from torch import nn

from tokenmerge.errors import InputError
from tokenmerge.patching.families.transformers.costs import around, tower_ends
from tokenmerge.patching.families.transformers.grids import (
    Grid,
    any_shape,
    clip_frames,
    clip_grid,
    frames,
    image_grid,
    mel,
    pair,
    several,
    sound_grid,
    spectrogram_grid,
    spectrum,
    video_grid,
    with_registers,
)
from tokenmerge.patching.families.transformers.rotary import dinov3_rotary, dinov3_table, pixtral_rotary, pixtral_table


def _convolutions(model: Any) -> list[Any]:
    """Return the convolutions that make the patches of an input, in order."""
    if hasattr(model, "conv1"):  # Whisper, whose second convolution halves the length
        return [model.conv1, model.conv2]
    blocks = [m for layer in model.modules() if isinstance(layer, nn.ModuleList) for m in layer.modules()]
    inside_blocks = {id(m) for m in blocks}
    kinds = nn.Conv1d | nn.Conv2d | nn.Conv3d
    return [m for m in model.modules() if isinstance(m, kinds) and id(m) not in inside_blocks][:1]


def _grid_at(model: Any, sizes: Sequence[int]) -> tuple[int, ...] | None:
    """Return the grid of an input of the given sizes, computed from the convolutions; `None` without convolutions."""
    convolutions, grid = _convolutions(model), tuple(sizes)
    for convolution in convolutions:
        padding = convolution.padding if isinstance(convolution.padding, tuple) else (0,) * len(grid)
        numbers = zip(grid, convolution.kernel_size, convolution.stride, padding, convolution.dilation, strict=True)
        grid = tuple(
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, pad, dilation in numbers
        )
    return grid if convolutions else None


def _stem_cost(model: Any, patches: int) -> int:
    """Return the multiply-adds of the embedding's convolutions."""
    convolutions = _convolutions(model)
    if len(convolutions) == 2:
        return int(convolutions[0].weight.numel() * 2 * patches + convolutions[1].weight.numel() * patches)
    return int(sum(m.weight.numel() for m in convolutions) * patches)


def tower(
    blocks: str = "layers",
    prefix: int | Callable[[Any], int] = 1,
    grid: Callable[[Any], Grid] = image_grid,
    inputs: Callable[[Any], tuple[int, ...] | None] = lambda config: (config.num_channels, *pair(config.image_size)),
    pooling: str = "class token",
    tokens: Callable[[Any], int] | None = None,
    readers: Sequence[str] = (),
    merged_output: Sequence[str] | Callable[[Any], list[str]] = (),
    norm: str = "",
    fixed: Callable[[Any], bool] = lambda config: False,
    **seams: Any,
) -> dict[str, Any]:
    """Return the fields of the row of a model that holds its layers in a list and everything else in its config.

    Args:
        blocks: path to the list of layers.
        prefix: number of prefix tokens, or a function of the config.
        grid: patches along each axis at the config's own size.
        inputs: shape of one input without the batch; `None` for several inputs.
        pooling: how heads read the tokens, in words.
        tokens: patches at the config's own size, if there is no grid.
        readers: modules that must get unmerged tokens even if merged tokens leave the last layer.
        merged_output: reasons why the model's own modules would misread merged tokens.
        norm: module after the last layer, through which the state passes.
        fixed: whether the position embeddings fit only one number of patches, as a function of the config.
        seams: further fields of `ModelFamily`.
    """

    def protected(model: Any) -> int:
        return prefix if isinstance(prefix, int) else prefix(model.config)

    def patches(model: Any) -> int:
        return tokens(model.config) if tokens is not None else math.prod(grid(model.config) or (0,))

    def at(model: Any, sizes: Sequence[int]) -> tuple[int, ...] | None:
        found, own = _grid_at(model, sizes), grid(model.config)
        if fixed(model.config) and found and own and math.prod(found) != math.prod(own):
            mine, asked = ("×".join(map(str, numbers)) for numbers in (own, found))
            raise InputError(
                f"this model takes inputs of one size only, of {mine} patches, not of {asked}: create it for that size"
            )
        return found

    def collectors(model: Any) -> list[nn.Module]:
        parts = blocks.split(".")[:-1]
        return [model, *(attrgetter(".".join(parts[: i + 1]))(model) for i in range(len(parts)))]

    def present(model: Any, names: Sequence[str]) -> list[nn.Module]:
        found = [
            functools.reduce(lambda at, part: getattr(at, part, None), name.split("."), model) for name in names if name
        ]
        return [module for module in found if module is not None]

    return {
        "blocks": lambda model: list(attrgetter(blocks)(model)),
        "channels": lambda model: int(getattr(model.config, "hidden_size", 0) or model.config.d_model),
        "protected": protected,
        "tokens": lambda model: patches(model) + protected(model),
        "grid": lambda model: grid(model.config),
        "input_shape": lambda model: inputs(model.config),
        "pooling": lambda model: pooling,
        "embed": lambda model: next(reversed(_convolutions(model)), None),
        "grid_at": at if tokens is None else None,  # unknown if patches are masked out or lie on no grid
        "cost": lambda model: tower_ends(model, _stem_cost(model, patches(model))),
        "around": around,
        "collectors": collectors,
        "readers": lambda model: present(model, readers),
        "norms": lambda model: present(model, [norm]),
        "merged_output": merged_output if callable(merged_output) else lambda model: list(merged_output),
        **seams,
    }


def _first_token_pooler(model: Any) -> list[str]:
    return [] if getattr(model, "pooler", None) is None else ["its pooler takes the first patch for a class token"]


def _averaging_pooler(model: Any) -> list[str]:
    pooler = getattr(model, "pooler", None)
    averages = pooler is not None and getattr(pooler, "layernorm", None) is not None
    return ["its pooler averages its tokens without sizes"] if averages else []


_MAPS = "it gives its tokens out as maps, on their grid"
_POOLER: dict[str, Any] = {"norm": "layernorm"}
_CLIP: dict[str, Any] = {"blocks": "encoder.layers", "norm": "post_layernorm"}
_SIGLIP: dict[str, Any] = {
    **_CLIP,
    "prefix": 0,
    "pooling": "attention pooling over unmerged tokens",
    "readers": ("head",),
}
_DINO: dict[str, Any] = {
    "pooling": "class token, and mean of unmerged tokens",
    "norm": "layernorm",
}

TOWERS: dict[str, dict[str, Any]] = {
    "vit.ViTModel": tower(**_POOLER),
    "deit.DeiTModel": tower(prefix=2, **_POOLER),
    "vit_msn.ViTMSNModel": tower(**_POOLER),
    "vit_mae.ViTMAEModel": tower(
        grid=lambda config: None,  # it shuffles its patches, even if it masks none of them
        embed=lambda model: None,
        tokens=lambda config: int(math.prod(image_grid(config) or (0,)) * (1 - config.mask_ratio)),
        merged_output=["its decoder puts the tokens back in place"],
        mae=lambda model: True,
        grid_at=lambda model, sizes: _grid_at(model, sizes) if model.config.mask_ratio == 0 else None,
        **_POOLER,
    ),
    "ijepa.IJepaModel": tower(
        prefix=0, pooling="mean of unmerged tokens", merged_output=_first_token_pooler, **_POOLER
    ),
    "dinov2.Dinov2Model": tower(blocks="encoder.layer", **_DINO),
    "dinov2.Dinov2Backbone": tower(blocks="encoder.layer", always_collects=True, merged_output=[_MAPS], **_DINO),
    "dinov2_with_registers.Dinov2WithRegistersModel": tower(blocks="encoder.layer", prefix=with_registers, **_DINO),
    "dinov2_with_registers.Dinov2WithRegistersBackbone": tower(
        blocks="encoder.layer", prefix=with_registers, always_collects=True, merged_output=[_MAPS], **_DINO
    ),
    "dinov3_vit.DINOv3ViTModel": tower(
        blocks="model.layer",
        prefix=with_registers,
        rotary=dinov3_rotary,
        rotary_example=dinov3_table,
        **{**_DINO, "norm": "norm"},
    ),
    "dinov3_vit.DINOv3ViTBackbone": tower(
        blocks="model.layer",
        prefix=with_registers,
        rotary=dinov3_rotary,
        rotary_example=dinov3_table,
        always_collects=True,
        merged_output=[_MAPS],
        **{**_DINO, "norm": "norm"},
    ),
    "beit.BeitModel": tower(
        pooling="class token or mean of unmerged tokens",
        merged_output=_averaging_pooler,
        **_POOLER,
    ),
    "data2vec_vision.Data2VecVisionModel": tower(
        blocks="encoder.layer",
        pooling="class token or mean of unmerged tokens",
        merged_output=_averaging_pooler,
        **_POOLER,
    ),
    "clip.CLIPVisionModel": tower(**_CLIP),
    "metaclip_2.MetaClip2VisionModel": tower(**_CLIP),
    "chinese_clip.ChineseCLIPVisionModel": tower(**_CLIP),
    "altclip.AltCLIPVisionModel": tower(**_CLIP),
    "git.GitVisionTransformer": tower(**_CLIP),
    "siglip.SiglipVisionModel": tower(**_SIGLIP),
    "siglip2.Siglip2VisionModel": tower(
        **{**_SIGLIP, "readers": ()},
        grid=any_shape,
        inputs=several,
        tokens=lambda config: int(config.num_patches),
        merged_output=["its head masks padding by position"],
    ),
    "idefics2.Idefics2VisionTransformer": tower(**{**_CLIP, "prefix": 0, "pooling": "none"}),
    "idefics3.Idefics3VisionTransformer": tower(**{**_CLIP, "prefix": 0, "pooling": "none"}),
    "smolvlm.SmolVLMVisionTransformer": tower(**{**_CLIP, "prefix": 0, "pooling": "none"}),
    "janus.JanusVisionModel": tower(
        **{**_CLIP, "prefix": 0, "pooling": "first patch"}, merged_output=["it takes the first patch for a class token"]
    ),
    "blip.BlipVisionModel": tower(**_CLIP),
    "blip_2.Blip2VisionModel": tower(**_CLIP),
    "instructblip.InstructBlipVisionModel": tower(**_CLIP),
    "aimv2.Aimv2VisionModel": tower(
        **{**_SIGLIP, "norm": "rms_norm"},
        fixed=lambda config: not config.is_native,
    ),
    "pixtral.PixtralVisionModel": tower(
        blocks="transformer.layers",
        prefix=0,
        pooling="none",
        rotary=pixtral_rotary,
        rotary_example=pixtral_table,
    ),
    "internvl.InternVLVisionModel": tower(blocks="encoder.layer", pooling="none"),
    "vivit.VivitModel": tower(grid=video_grid, inputs=frames, **_POOLER),
    "videomae.VideoMAEModel": tower(
        blocks="encoder.layer",
        prefix=0,
        grid=video_grid,
        inputs=frames,
        pooling="mean of unmerged tokens",
        mae=lambda model: True,
        fixed=lambda config: True,
        **_POOLER,
    ),
    "vjepa2.VJEPA2Model": tower(
        blocks="encoder.layer",
        prefix=0,
        grid=clip_grid,
        inputs=clip_frames,
        pooling="attention pooling over unmerged tokens",
        norm="encoder.layernorm",
        # upstream repeats the frames of a video that is shorter than one tubelet
        grid_at=lambda model, sizes: _grid_at(model, (max(sizes[0], model.config.tubelet_size), *sizes[1:])),
        merged_output=["its predictor and its pooler read all tokens"],
    ),
    "audio_spectrogram_transformer.ASTModel": tower(
        prefix=2,
        grid=spectrogram_grid,
        inputs=spectrum,
        pooling="mean of class and distillation token",
        fixed=lambda config: True,
        **_POOLER,
    ),
    "whisper.WhisperEncoder": tower(
        prefix=0,
        grid=sound_grid,
        inputs=mel,
        norm="layer_norm",
        fixed=lambda config: True,
        pooling="the decoder's cross-attention over unmerged tokens",
    ),
}
"""Fields of the rows, by model class as `module.Class` below `transformers.models`."""
