"""Export of the demo's model and images as files, to try the other commands without a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from tokenmerge.errors import InputError
from tokenmerge.tools.demo.digits import ARCHITECTURE, IMAGE_SIZE, load_digits, load_model


def export_demo(folder: Path) -> tuple[Path, Path]:
    """Write the model in timm's hub format, and 1,437 training and 360 test images in one folder per class.

    The exported model takes RGB images, as timm loads them; for grey images its outputs are those of the demo's model.

    Returns:
        The folder of the model, for `local-dir:`, and the folder of the test images, for `--data`.

    Raises:
        InputError: if the folder cannot be written.
    """
    try:
        _write_model(folder / "model")
        export_images(folder)
    except OSError as error:
        raise InputError(
            f"{str(folder)!r} cannot be written ({error.strerror or error}): choose another folder"
        ) from None
    return folder / "model", folder / "val"


def export_images(folder: Path) -> None:
    """Write the images to `folder/train/CLASS` and `folder/val/CLASS`."""
    train, train_labels, test, test_labels = load_digits()
    for split, images, labels in (("train", train, train_labels), ("val", test, test_labels)):
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            pixels = ((image[0] + 1) * 127.5).round().to(torch.uint8)
            place = folder / split / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(place / f"{number:04}.png")


def _write_model(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = load_model().state_dict()
    kernel = state["patch_embed.proj.weight"]
    state["patch_embed.proj.weight"] = kernel.expand(-1, 3, -1, -1).contiguous() / 3
    save_file(state, folder / "model.safetensors")
    half = [0.5, 0.5, 0.5]
    preprocessing: dict[str, Any] = {
        "input_size": [3, IMAGE_SIZE, IMAGE_SIZE],
        "mean": half,
        "std": half,
        "crop_pct": 1.0,
    }
    layers = {"first_conv": "patch_embed.proj", "classifier": "head"}
    config = {
        "architecture": "vit_tiny_patch16_224",  # timm needs a known name; the arguments below replace its sizes
        "num_classes": 10,
        "global_pool": "token",
        "model_args": {**ARCHITECTURE, "in_chans": 3},
        "label_names": [str(digit) for digit in range(10)],
        "pretrained_cfg": {**preprocessing, **layers, "num_classes": 10, "interpolation": "bicubic"},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
