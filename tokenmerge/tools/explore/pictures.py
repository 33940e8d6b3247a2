"""What comes from outside: pictures of unknown origin, names, settings. Nothing of it is trusted."""

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
"""Of an uploaded file."""
MOST_PIXELS = 64_000_000
"""Of a picture: more would take gigabytes once decoded, whatever its file takes."""
MOST_OBLONG = 32
"""Longer side ÷ shorter side: a picture one pixel high would be enlarged to gigabytes."""
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_MOST_SETTINGS = 4
_MOST_SAMPLES = 500
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def open_picture(data: bytes) -> Image.Image:
    """An uploaded picture, decoded.

    Raises:
        InputError: if it is none, is damaged, or would be too large in memory.
    """
    kinds = ", ".join(_FORMATS)
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:  # Pillow's own limit, which is higher
        raise InputError(
            f"the picture has far more pixels than the {MOST_PIXELS // 10**6} million that are decoded: make it smaller"
        ) from None
    except Exception:  # every decoder raises its own kinds
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
    except Exception as error:  # every decoder raises its own kinds
        raise InputError(f"the picture is damaged ({type(error).__name__}: {error}): give a whole file") from None


def plain_name(name: str) -> str:
    """A file's name to show: without folders and control characters, and not long. No file is ever opened by it."""
    last = re.split(r"[/\\]", name)[-1]
    shown = "".join(character for character in last if character.isprintable()).strip()
    return shown[:80] or "picture"


def settings_of(texts: Sequence[str]) -> list[Setting]:
    """Schedules as `--r` takes them, but no config files: a page must not name files of this machine.

    Raises:
        InputError: if there are none or too many.
        ConfigError: if one means nothing.
    """
    if not 1 <= len(texts) <= _MOST_SETTINGS:
        raise InputError(f"{len(texts)} settings were given, but 1 to {_MOST_SETTINGS} can be shown: try 8 16")
    odd = next((text for text in texts if text.lower().endswith(".json") or len(text) > 400), None)
    if odd is not None:
        raise InputError(f"r={odd[:40]!r} is not taken here: give a schedule such as 8, 16:-1 or flops=0.5")
    return [parse_setting(text) for text in texts]


def samples_in(folder: Path) -> list[Path]:
    """Pictures below a folder, by name; at most 500.

    Raises:
        InputError: if there is no such folder, or no picture in it.
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
