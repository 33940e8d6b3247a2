"""Export of the demo's model and images as files, to try the other commands without a download."""

from __future__ import annotations

import filecmp
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save

from tokenmerge import files
from tokenmerge.errors import InputError
from tokenmerge.tools.demo.digits import ARCHITECTURE, IMAGE_SIZE, load_digits, load_model


def export_demo(folder: Path) -> tuple[Path, Path]:
    """Write the model in timm's hub format, and 1,437 training and 360 test images in one folder per class.

    The files are moved into the folder when all of them are written.

    Returns:
        The folder of the model, for `local-dir:`, and the folder of the test images, for `--data`.

    Raises:
        InputError: if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tokenmerge-", dir=folder) as made:
            place = folder / Path(made).name  # `made` itself is absolute from Python 3.12 on, even if `folder` is not
            _write_model(place / "model")
            export_images(place)
            _check_free(folder, place)
            for file in sorted(path for path in place.rglob("*") if path.is_file()):
                target = folder / file.relative_to(place)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise InputError(
            f"{str(folder)!r} cannot be written ({files.words_of(error)}): choose another folder"
        ) from None
    return folder / "model", folder / "val"


def _check_free(folder: Path, new: Path) -> None:
    """Raise `InputError` if a folder holds anything but what an earlier export of the demo wrote."""
    for path in sorted(folder.rglob("*")):
        if path == new or new in path.parents or (path.is_dir() and not path.is_symlink()):
            continue
        ours = new / path.relative_to(folder)
        if not (ours.is_file() and path.is_file() and filecmp.cmp(ours, path, shallow=False)):
            raise InputError(
                f"{str(folder)!r} holds {str(path.relative_to(folder))!r}, but an empty folder was expected for the demo's files: choose "
                "another one"
            )


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
    (folder / "model.safetensors").write_bytes(save(load_model().state_dict()))
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
    files.write_json(folder / "config.json", config, "the config")
