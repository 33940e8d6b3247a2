"""The spatiotemporal Vision Transformer of "Masked Autoencoders As Spatiotemporal Learners" (Feichtenhofer et al. 2022).

It is the video model of Token Merging (arXiv 2210.09461), and no library has it. Its blocks, pooling and head are timm's. Importing
this module registers its sizes in timm, so that `timm.create_model` makes, loads and saves them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenmerge.errors import InputError

PREFIX = "video_mae_"
"""Beginning of the names in timm's registry; `video_mae:NAME` on the command line is `video_mae_NAME` there."""


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(height), int(width)


class TubeletEmbed(nn.Module):
    """Embedding of tubelets: patches of `patch_size` × `patch_size` pixels in `tubelet_size` frames (arXiv 2205.09113, section 3).

    Attributes:
        grid_size: tubelets along time, height and width.
        num_patches: number of tubelets of a clip.
        num_frames: frames of a clip.
        img_size: height and width of the frames in pixels.
        patch_size: height and width of a tubelet in pixels.
        proj: the convolution, whose stride is its kernel.

    Raises:
        InputError: if frames or sides are no multiples of the tubelet's.
    """

    def __init__(
        self,
        img_size: Any = 224,
        patch_size: Any = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        num_frames: int = 16,
        tubelet_size: int = 2,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size, self.num_frames = _pair(img_size), _pair(patch_size), num_frames
        sizes, kernel = (num_frames, *self.img_size), (tubelet_size, *self.patch_size)
        if dynamic_img_pad or any(
            size < 1 or side < 1 or size % side for size, side in zip(sizes, kernel, strict=True)
        ):
            raise InputError(
                f"clips of {'×'.join(map(str, sizes))} (frames × height × width) were asked for with tubelets of "
                f"{'×'.join(map(str, kernel))}, but multiples of these were expected: change num_frames or img_size"
            )
        self.grid_size = tuple(size // side for size, side in zip(sizes, kernel, strict=True))
        self.num_patches = math.prod(self.grid_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel, kernel, bias=bias, device=device, dtype=dtype)

    def feat_ratio(self) -> tuple[int, int]:
        """Return the pixels between neighbouring tokens, as timm asks for it."""
        return self.patch_size

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens of clips.

        Args:
            x: clips `[B, T, C, H, W]`.

        Returns:
            Tokens `[B, t·h·w, embed_dim]`, in the order of time, rows, columns.

        Raises:
            InputError: if the clips have another shape than the model's.
        """
        expected = (self.num_frames, self.proj.in_channels, *self.img_size)
        if tuple(x.shape[1:]) != expected:
            raise InputError(
                f"clips of shape {tuple(x.shape)} were given, but (batch, frames, channels, height, width) = (batch, "
                f"{', '.join(map(str, expected))}) was expected: give such clips, or create the model with other num_frames or img_size"
            )
        tokens: Tensor = self.proj(x.transpose(1, 2)).flatten(2).transpose(1, 2)
        return tokens


class SpatiotemporalVisionTransformer(VisionTransformer):
    """timm's `VisionTransformer` on clips `[B, T, C, H, W]`.

    It differs from the image model in its patches (tubelets) and its positions: the sum of a learned embedding of space, one
    of time, and one of its own for the class token (arXiv 2205.09113, section 3). Its head reads the mean of the patch tokens, with
    LayerNorm after the mean, dropout and a linear layer (appendix).

    Args:
        img_size: side of the frames in pixels, or height and width.
        patch_size: side of a tubelet in pixels.
        num_frames: frames of a clip.
        tubelet_size: frames of a tubelet.
        global_pool: timm's name for the head's pooling.
        **kwargs: further arguments of timm's `VisionTransformer`.

    Raises:
        InputError: if frames or sides are no multiples of the tubelet's.

    Example:
        >>> import timm, torch, tokenmerge, tokenmerge.models.video_mae
        >>> model = timm.create_model("video_mae_vit_tiny_patch16_224", num_frames=4, img_size=64, num_classes=5).eval()
        >>> handle = tokenmerge.patch(model, r=2)
        >>> clip = torch.zeros(1, 4, 3, 64, 64)
        >>> model(clip).shape, model.forward_features(clip).shape  # 24 of 33 tokens merged away
        (torch.Size([1, 5]), torch.Size([1, 9, 192]))
    """

    cls_token: Any
    patch_embed: Any

    def __init__(
        self,
        img_size: Any = 224,
        patch_size: Any = 16,
        num_frames: int = 16,
        tubelet_size: int = 2,
        global_pool: str = "avg",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_layer=partial(TubeletEmbed, num_frames=num_frames, tubelet_size=tubelet_size),
            pos_embed="none",
            global_pool=global_pool,  # type: ignore[arg-type]  # timm checks it
            **kwargs,
        )
        moments, height, width = self.patch_embed.grid_size
        like: dict[str, Any] = {"device": self.cls_token.device, "dtype": self.cls_token.dtype}
        self.pos_embed_spatial = nn.Parameter(torch.zeros(1, height * width, self.embed_dim, **like))
        self.pos_embed_temporal = nn.Parameter(torch.zeros(1, moments, self.embed_dim, **like))
        self.pos_embed_class = nn.Parameter(torch.zeros(1, 1, self.embed_dim, **like))
        for positions in (self.pos_embed_spatial, self.pos_embed_temporal, self.pos_embed_class, self.cls_token):
            nn.init.trunc_normal_(positions, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that are trained without weight decay."""
        return {"cls_token", "pos_embed_spatial", "pos_embed_temporal", "pos_embed_class"}

    def _pos_embed(self, x: Tensor) -> Tensor:
        moments, space = self.pos_embed_temporal.unsqueeze(2), self.pos_embed_spatial.unsqueeze(1)
        first = (self.cls_token + self.pos_embed_class).expand(x.shape[0], -1, -1)
        dropped: Tensor = self.pos_drop(torch.cat((first, x + (moments + space).flatten(1, 2)), dim=1))
        return dropped

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Refuse: positions of other clips would have to be learned.

        Raises:
            InputError: always.
        """
        raise InputError("the size of clips belongs to the weights: create the model with other img_size or num_frames")

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: timm's maps of intermediate features are maps of images.

        Raises:
            InputError: always.
        """
        raise InputError(
            "forward_intermediates makes maps of images, but this model takes clips: use forward_features, or hooks on model.blocks"
        )

    def translated(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights with this model's names, from those that the model's authors published; see `from_published`."""
        return from_published(state, after_pooling=not isinstance(self.fc_norm, nn.Identity))


# --- the authors' checkpoints ------------------------------------------------------------------------------

_DECODER = ("decoder_", "decoder.", "mask_token", "pred_head.")
"""Beginnings of the names that only pre-training uses."""
_PARTS = ("q", "k", "v")


def from_published(state: Mapping[str, Tensor], after_pooling: bool = True) -> dict[str, Tensor]:
    """Return the weights of a checkpoint of the model's authors with the names of this module's model.

    Queries, keys and values are separate layers there and one layer in timm; the norm after pooling has timm's name `fc_norm`; and
    the decoder of pre-training is left out. Weights that have timm's names already stay as they are.

    Args:
        state: tensors by name.
        after_pooling: whether the model's last norm follows the pooling.

    Raises:
        InputError: if a block has only some of queries, keys and values.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(_DECODER):
            continue
        owner, _, kind = name.rpartition(".")
        block, _, part = owner.rpartition(".")
        if block.endswith(".attn") and part in _PARTS:
            parts = [state.get(f"{block}.{one}.{kind}") for one in _PARTS]
            if any(one is None for one in parts):
                raise InputError(
                    f"the checkpoint holds {name}, but not all of {block}.q, .k and .v, which were expected: give a whole one"
                )
            found[f"{block}.qkv.{kind}"] = torch.cat(parts)  # type: ignore[arg-type]
        else:
            found[_ours(name, after_pooling)] = tensor
    return found


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of this module's model with the names of the authors' fine-tuned checkpoints; the inverse of `from_published`."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        owner, _, kind = name.rpartition(".")
        if owner.endswith(".attn.qkv"):
            found |= {
                f"{owner.removesuffix('qkv')}{part}.{kind}": one
                for part, one in zip(_PARTS, tensor.chunk(3), strict=True)
            }
        else:
            found[f"norm.{kind}" if owner == "fc_norm" else name] = tensor
    return found


def _ours(name: str, after_pooling: bool) -> str:
    owner, _, kind = name.rpartition(".")
    if owner == "norm" and after_pooling:
        return f"fc_norm.{kind}"
    return f"head.{kind}" if owner == "head.projection" else name


# --- timm's registry ---------------------------------------------------------------------------------------

default_cfgs = {
    f"{PREFIX}vit_{size}_224": {
        "url": "",  # the authors' files are downloaded by the user, and given by --checkpoint
        "num_classes": 400,
        "input_size": (3, 224, 224),  # of one frame
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": (0.45, 0.45, 0.45),
        "std": (0.225, 0.225, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    for size in ("tiny_patch16", "small_patch16", "base_patch16", "large_patch16", "huge_patch14")
}
"""Preprocessing of each size, in timm's words."""


def _create(size: str, pretrained: bool, width: int, depth: int, heads: int, kwargs: dict[str, Any]) -> Any:
    sizes = {
        "patch_size": 14 if size.startswith("huge") else 16,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
    }
    return build_model_with_cfg(
        SpatiotemporalVisionTransformer, f"{PREFIX}vit_{size}_224", pretrained, **{**sizes, **kwargs}
    )


@register_model
def video_mae_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """Create a model of the sizes of ViT-Ti, which is not in the paper."""
    return _create("tiny_patch16", pretrained, 192, 12, 3, kwargs)


@register_model
def video_mae_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """Create a model of the sizes of ViT-S, which is not in the paper."""
    return _create("small_patch16", pretrained, 384, 12, 6, kwargs)


@register_model
def video_mae_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """Create ViT-B of the paper."""
    return _create("base_patch16", pretrained, 768, 12, 12, kwargs)


@register_model
def video_mae_vit_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """Create ViT-L of the paper, the video model of Token Merging."""
    return _create("large_patch16", pretrained, 1024, 24, 16, kwargs)


@register_model
def video_mae_vit_huge_patch14_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """Create ViT-H of the paper."""
    return _create("huge_patch14", pretrained, 1280, 32, 16, kwargs)


NAMES = tuple(name.removeprefix(PREFIX) for name in default_cfgs)
"""Names of the sizes, after `video_mae:`."""
