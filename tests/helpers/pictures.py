"""Models and files for tests of pictures, and the expected picture, computed pixel by pixel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
from PIL import Image
from safetensors.torch import save_file

from tests.helpers.browser import EVIL
from tests.helpers.tiny import randomize

SMALL = {"embed_dim": 48, "depth": 6, "num_heads": 3, "num_classes": 7}


def write_model(folder: Path, architecture: str = "vit_tiny_patch16_224", **arguments: Any) -> str:
    """Write a small random model in timm's hub format, and return its MODEL argument."""
    arguments = {**SMALL, **arguments}
    classes = arguments.pop("num_classes")
    model = timm.create_model(architecture, num_classes=classes, **arguments).eval()
    randomize(model)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    size = arguments["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    pretrained = {
        "input_size": [int(arguments.get("in_chans", 3)), height, width],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 1.0,
        "num_classes": classes,
        "interpolation": "bicubic",
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config = {
        "architecture": architecture,
        "num_classes": classes,
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def write_evil_model(folder: Path) -> str:
    """Write a small model with registers, whose classes have names that must be escaped, and return its MODEL argument."""
    name = write_model(folder, "vit_medium_patch16_reg4_gap_256", img_size=64, patch_size=8)
    config = json.loads((folder / "config.json").read_text())
    config["label_names"] = [f"{EVIL} {i}" for i in range(7)]
    (folder / "config.json").write_text(json.dumps(config))
    return name


def photo(path: Path, width: int = 64, height: int = 64, seed: int = 0) -> Path:
    """Return a picture of blobs of colour, in which some patches are similar and most are not."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    picture = small.resize((width, height), Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=95)
    return path


def expected(pixels: Any, names: Any, grid: tuple[int, int]) -> Any:
    """Return `[H, W, 3]` float: tokens in their mean colour with borders, by one loop over pixels without the library.

    Args:
        pixels: `[H, W, 3]`.
        names: `[h·w]`: the token of each patch.
    """
    height, width, _ = pixels.shape
    names = np.asarray(names).reshape(grid)
    token = np.array(
        [[names[y * grid[0] // height, x * grid[1] // width] for x in range(width)] for y in range(height)]
    )
    out = np.zeros(pixels.shape)
    for name in np.unique(token):
        out[token == name] = pixels[token == name].mean(axis=0)
    for y in range(height):
        for x in range(width):
            if (y and token[y, x] != token[y - 1, x]) or (x and token[y, x] != token[y, x - 1]):
                dark = (out[y, x] / 255) ** 2.2 @ [0.2126, 0.7152, 0.0722] < 0.18
                out[y, x] = out[y, x] * 0.25 + (255 * 0.75 if dark else 0)
    return out
