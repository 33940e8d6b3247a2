"""Validation of untrusted input: uploaded pictures, file names and settings."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from tokenmerge.errors import InputError
from tokenmerge.tools.settings import Setting, parse_setting

MOST_BYTES = 32 * 2**20
"""Largest size of an uploaded file."""
MOST_PIXELS = 64_000_000
"""Largest number of pixels of a picture, because more would take gigabytes once decoded."""
MOST_OBLONG = 32
"""Largest aspect ratio, because a picture one pixel high would be enlarged to gigabytes."""
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_MOST_SETTINGS = 4
_MOST_SAMPLES = 500
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def open_picture(data: bytes) -> Image.Image:
    """Decode an uploaded picture.

    Raises:
        InputError: if it is not a picture, is damaged, or would be too large in memory.
    """
    kinds = ", ".join(_FORMATS)
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:  # Pillow's own limit, which is higher
        raise InputError(
            f"the picture has far more pixels than the {MOST_PIXELS // 10**6} million that are decoded: make it smaller"
        ) from None
    except Exception:  # every decoder raises its own exception types
        raise InputError(f"the file is no picture that can be read here: give one of {kinds}") from None
    if image.width * image.height > MOST_PIXELS:
        raise InputError(
            f"the picture has {image.width}×{image.height} pixels, but at most {MOST_PIXELS // 10**6} million are decoded: "
            "make it smaller"
        )
    if max(image.size) > MOST_OBLONG * min(image.size):
        raise InputError(
            f"the picture has {image.width}×{image.height} pixels, but the shorter side is enlarged to what the model takes, and the "
            f"longer one would get too long: give one at most {MOST_OBLONG} times as long as it is wide"
        )
    try:
        image.load()
        return ImageOps.exif_transpose(image) or image
    except Exception as error:  # every decoder raises its own exception types
        raise InputError(f"the picture is damaged ({type(error).__name__}: {error}): give a whole file") from None


def plain_name(name: str) -> str:
    """Return a file name to display, without folders and control characters, at most 80 characters long."""
    last = re.split(r"[/\\]", name)[-1]
    shown = "".join(character for character in last if character.isprintable()).strip()
    return shown[:80] or "picture"


def settings_of(texts: Sequence[str]) -> list[Setting]:
    """Parse schedules as in `--r`, except config files, because a page must not read files of the server.

    Raises:
        InputError: if there are none, too many, or a config file.
        ConfigError: if a schedule is invalid.
    """
    if not 1 <= len(texts) <= _MOST_SETTINGS:
        raise InputError(f"{len(texts)} settings were given, but 1 to {_MOST_SETTINGS} can be shown: try 8 16")
    odd = next((text for text in texts if text.lower().endswith(".json") or len(text) > 400), None)
    if odd is not None:
        raise InputError(f"r={odd[:40]!r} is not taken here: give a schedule such as 8, 16:-1 or flops=0.5")
    return [parse_setting(text) for text in texts]


def samples_in(folder: Path) -> list[Path]:
    """Return the pictures below a folder in the order of their names, at most 500.

    Raises:
        InputError: if the folder does not exist, or has no pictures.
    """
    if not folder.is_dir():
        raise InputError(f"--data {str(folder)!r} is not a folder, but one with pictures was expected: check the path")
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        folders.sort()
        found += [Path(place, name) for name in sorted(files) if name.lower().endswith(_SUFFIXES)]
        if len(found) >= _MOST_SAMPLES:
            break
    if not found:
        raise InputError(f"--data {str(folder)!r} holds no pictures: name a folder with {', '.join(_SUFFIXES)} files")
    return found[:_MOST_SAMPLES]
