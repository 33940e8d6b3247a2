"""One small model per kind of library and attention, with helpers for tests of passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tests.helpers.tiny import images_for, randomize, tiny
from tests.helpers.towers import BY_NAME


def _torchvision() -> Any:
    model = torchvision.models.VisionTransformer(96, 16, 3, 4, 48, 96).eval()
    randomize(model)
    return model


MAKE: dict[str, Callable[[], Any]] = {
    "timm": lambda: tiny("vit_tiny_patch16_224"),
    "timm, average": lambda: tiny("vit_small_patch16_224", global_pool="avg"),
    "timm, rotary": lambda: tiny("eva02_tiny_patch14_224"),
    "timm, relative": lambda: tiny("beit_base_patch16_224"),
    "timm, talking heads": lambda: tiny("cait_xxs24_224"),
    "transformers": lambda: BY_NAME["Dinov2Model"].build(),
    "transformers, softmax": lambda: BY_NAME["BlipVisionModel"].build(),
    "transformers, config": lambda: BY_NAME["VideoMAEModel"].build(),
    "torchvision": _torchvision,
}


EVERY = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())


def input_for(model: Any, seed: int = 1) -> Tensor:
    if hasattr(model, "patch_embed"):
        return images_for(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 4, 3, 64, 64) if "Video" in type(model).__name__ else (2, 3, 96, 96)
    return torch.randn(shape, generator=generator)


def out_of(model: Any, images: Tensor) -> Tensor:
    out = model(images)
    tokens: Tensor = out if isinstance(out, Tensor) else out.last_hidden_state
    return tokens


def blocks_of(model: Any) -> Any:
    """Return the module list of the blocks."""
    lists = [
        module for module in model.modules() if isinstance(module, nn.Sequential | nn.ModuleList) and len(module) == 3
    ]
    return next(module for module in lists if hasattr(module[0], "_tokenmerge") or "Layer" in type(module[0]).__name__
                or "Block" in type(module[0]).__name__)  # fmt: skip


def features_of(model: Any, images: Tensor) -> Tensor:
    """Return the tokens after the final norm, with the state that they carry."""
    if hasattr(model, "forward_features"):
        found: Tensor = model.forward_features(images)
        return found
    seen: list[Tensor] = []
    norm = model.encoder.ln if hasattr(model, "encoder") and hasattr(model.encoder, "ln") else None
    if norm is None:
        return out_of(model, images)
    hook = norm.register_forward_hook(lambda module, args, output: seen.append(output))
    model(images)
    hook.remove()
    return seen[0]
