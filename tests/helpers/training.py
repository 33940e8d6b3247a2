"""A small model and two classes for tests of training."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

MODEL = "vit_tiny_patch16_224"
KWARGS = ("--model-kwargs", "img_size=32", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2")


def write_classes(root: Path) -> Path:
    """Write two classes that differ in brightness, 16 images to train on and 6 to validate, and return their folder."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("dark", "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 100, (32, 32, 3), generator=generator) + 150 * label
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{number}.png")
    return root
