"""Validation of untrusted input: uploaded pictures, file names and settings."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tokenmerge.errors import DamagedFileError, InputError
from tokenmerge.tools.media import IMAGES, Medium
from tokenmerge.tools.reading.pictures import Limits, decode_picture, read_picture
from tokenmerge.tools.reading.walk import Walk
from tokenmerge.tools.settings import Setting, parse_setting

MOST_BYTES = 32 * 2**20
"""Largest size of an uploaded file."""
LIMITS = Limits(MOST_BYTES, 64_000_000, 32, ("JPEG", "PNG", "WEBP", "GIF", "BMP"))
"""Limits of a picture that a visitor chooses, which are stricter than those for the user's own files."""
_MOST_SETTINGS = 4
_MOST_SAMPLES = 500
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def open_picture(data: bytes) -> Image.Image:
    """Decode an uploaded picture as RGB, upright.

    Raises:
        InputError: if it is not a picture, is damaged, or would be too large in memory.
    """
    try:
        return decode_picture(data, "the picture", LIMITS, upright=True)
    except DamagedFileError as error:
        raise InputError(f"the picture cannot be shown ({error.reason}): give another one") from None


def open_sample(path: Path) -> Image.Image:
    """Decode a sample picture as RGB, upright, with the limits of uploads, because anybody can choose it.

    Raises:
        InputError: if it is not a picture, is damaged, or would be too large in memory.
    """
    return read_picture(path, LIMITS, upright=True)


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


def samples_in(folder: Path, medium: Medium) -> tuple[list[Path], list[str]]:
    """Return the files of a medium below a folder in the order of their names, at most 500, and "path: reason" of what was left out.

    Raises:
        InputError: if the folder does not exist, or has no such files.
    """
    if not os.path.isdir(folder):
        raise InputError(
            f"--data {str(folder)!r} is not a folder, but one with {medium.name} was expected: check the path"
        )
    suffixes = _SUFFIXES if medium is IMAGES else medium.suffixes or ()
    walk = Walk(folder, suffixes, follow=False)  # visitors must not see what lies elsewhere
    found = list(itertools.islice(walk, _MOST_SAMPLES))
    if not found:
        raise InputError(
            f"--data {str(folder)!r} holds no {medium.name}: name a folder with {', '.join(suffixes)} files"
        )
    return found, walk.left_out
