"""Model and data of the demo: a small ViT with 196 patch tokens on the digits of scikit-learn.

The 8×8 digits are enlarged to 56×56 pixels and cut into patches of 4×4, so that the model has as many tokens as a ViT at 224
pixels, and neighbouring tokens are similar, as in photographs.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenmerge.errors import InputError

WEIGHTS = "vit_digits.safetensors"
IMAGE_SIZE = 56
ARCHITECTURE: dict[str, Any] = {
    "img_size": IMAGE_SIZE,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
}


def build_model(channels: int = 1) -> nn.Module:
    """Return the model with random weights: 6 blocks, 96 channels, 3 heads, 197 tokens.

    Args:
        channels: channels of the images; it was trained on 1, and the demo shows it on 3, as `load_model` returns it.
    """
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(num_classes=10, **{**ARCHITECTURE, "in_chans": channels})


def load_model() -> nn.Module:
    """Return the trained model in evaluation mode, for RGB images; on grey ones it computes what was trained.

    Raises:
        InputError: if the shipped weights are missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    model = build_model(3)
    try:
        data = resources.files(__package__).joinpath(WEIGHTS).read_bytes()
        state = {name: tensor.float() for name, tensor in load(data).items()}
        kernel = state["patch_embed.proj.weight"]
        state["patch_embed.proj.weight"] = kernel.expand(-1, 3, -1, -1).contiguous() / 3
        model.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the demo's weights cannot be read ({reason}), but they ship with the package: reinstall tokenmerge"
        ) from None
    return model.eval()


def as_stored(images: Tensor) -> Tensor:
    """Return grey images `[n, 1, H, W]` as a reader of their 8-bit files gets them: rounded, `[n, 3, H, W]` float32."""
    pixels = ((images + 1) * 127.5).round()
    return ((pixels / 255 - 0.5) / 0.5).expand(-1, 3, -1, -1).contiguous()


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images, training labels, test images and test labels.

    Images are `[n, 1, 56, 56]` float32 in [−1, 1]; a fifth of each class (360 images) is held out for testing.
    """
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    digits = sklearn_digits()
    pixels = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    images = F.interpolate(pixels, size=IMAGE_SIZE, mode="bicubic", align_corners=False).clamp(-1, 1)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=digits.target)
    return images[train], labels[train], images[test], labels[test]
