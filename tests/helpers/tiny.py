"""Small models with random weights in which every parameter affects the outputs."""

from __future__ import annotations

import re
from typing import Any

import timm
import torch
from torch import Tensor, nn

GRID = 6  # patches along each side


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Randomize every parameter, because initializations leave some, such as LayerScale, near zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                fan_in = parameter[0].numel() if "token" not in name and "pos" not in name else 4
                parameter.copy_(noise * fan_in**-0.5)
            else:
                parameter.copy_(0.3 * noise + (1.0 if name.endswith(("weight", "gamma")) else 0.0))


def tiny(name: str, **overrides: Any) -> Any:
    """Return a timm ViT with its own kind of blocks, tokens and head, but 3 blocks of 48 channels and 6×6 patches."""
    match = re.search(r"patch(\d+)", name)
    patch = int(match.group(1)) if match else 16
    kwargs: dict[str, Any] = {"embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": GRID * patch, "num_classes": 7}
    if "naflex" in name:
        del kwargs["img_size"]
    if name in timm.list_models(module="eva"):
        kwargs["num_heads"] = 4  # rotary positions use a quarter of a head per axis, twice
    if "sapiens2" in name:
        kwargs["num_kv_heads"] = (4, 2, 2)
    if name.startswith(("qwen3", "deepseek")):
        kwargs["num_heads"] = 4
        kwargs["img_size"] = GRID * (14 if "deepseek" in name else 16)
        if "_enc" in name or "_merge" in name or "_align" in name:
            del kwargs["num_classes"]
    if name in timm.list_models(module="vision_transformer_hybrid"):
        kwargs["img_size"] = 96
        if "mci" in name:  # its stem has its own width
            kwargs.update(embed_dim=768, num_heads=12)
    model = timm.create_model(name, **{**kwargs, **overrides}).eval()
    randomize(model)
    return model


def images_for(model: Any, batch: int = 2, seed: int = 1) -> Tensor:
    """Return random images of the size that the model takes."""
    model = getattr(model, "encoder", model)
    if not hasattr(model, "patch_embed"):  # NaFlexViT takes any size
        return torch.randn(batch, 3, 96, 96, generator=torch.Generator().manual_seed(seed))
    height, width = model.patch_embed.img_size
    channels = next(m for m in model.patch_embed.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    count = channels.in_channels if isinstance(channels, nn.Conv2d) else 3
    return torch.randn(batch, count, height, width, generator=torch.Generator().manual_seed(seed))
