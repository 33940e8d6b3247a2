"""Pictures as 8-bit RGB, from files and uploads, with limits on size, number of pixels and aspect ratio."""

from __future__ import annotations

import dataclasses
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from tokenmerge.tools.reading.damage import bytes_of, damaged, decoding

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are read; others of Pillow's start programs (EPS) or are hardly ever tested."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one picture.

    Attributes:
        bytes: largest size of the file.
        pixels: largest number of pixels, because decoding more would take gigabytes.
        oblong: largest aspect ratio, because a picture one pixel high would be enlarged to gigabytes.
        formats: names of the formats that are read, as Pillow spells them.
    """

    bytes: int = 2**30
    pixels: int = 178_000_000
    oblong: int = 64
    formats: tuple[str, ...] = FORMATS


LIMITS = Limits()
"""Limits of files that the user names."""
_EXPECTED = "a whole picture"
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_picture(path: Path | str, limits: Limits = LIMITS, upright: bool = False) -> Image.Image:
    """Read the first frame of a picture file as 8-bit RGB.

    Grey values of 16 bits are divided by 257, and real numbers in [0, 1] are multiplied by 255; transparency is left out.

    Args:
        path: the file.
        limits: the limits.
        upright: whether to rotate it by its EXIF orientation; one that cannot be read does not rotate it.

    Raises:
        DamagedFileError: if it is no regular file, exceeds a limit, is no picture, is damaged, or has values of another range.
    """
    return decode_picture(bytes_of(path, limits.bytes, _EXPECTED), path, limits, upright)


def decode_picture(data: bytes, name: Path | str, limits: Limits = LIMITS, upright: bool = False) -> Image.Image:
    """Decode a picture from bytes; see `read_picture`.

    Args:
        data: the bytes of the file.
        name: name of the file, for messages.
        limits: the limits.
        upright: whether to rotate it by its EXIF orientation.
    """
    with decoding(name, _EXPECTED), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of palettes, EXIF and many pixels: what counts is an error here
        Image.init()
        known = [kind for kind in limits.formats if kind in Image.OPEN]
        try:
            opened = Image.open(io.BytesIO(data), formats=known)
        except UnidentifiedImageError:
            raise damaged(name, f"it is no picture that can be read here; known are {', '.join(known)}") from None
        except Image.DecompressionBombError:  # Pillow's own limit, before ours can be looked at
            raise damaged(name, f"it has more than {limits.pixels // 10**6} million pixels", _EXPECTED) from None
        with opened as image:
            _check_size(image, name, limits)
            turn = _TURNS.get(_orientation(image)) if upright else None
            image.load()
            _check_size(image, name, limits)  # some formats know better after decoding
            colour = _rgb(image, name)
        return colour if turn is None else colour.transpose(turn)


def _check_size(image: Image.Image, name: Path | str, limits: Limits) -> None:
    width, height = image.size
    if width * height > limits.pixels:
        most = limits.pixels // 10**6
        raise damaged(name, f"it has {width}×{height} pixels, and at most {most} million are decoded", _EXPECTED)
    if not min(width, height):
        raise damaged(name, "it has no pixels", _EXPECTED)
    if max(width, height) > limits.oblong * min(width, height):
        raise damaged(
            name,
            f"it has {width}×{height} pixels, and one side may be at most {limits.oblong} times as long as the other, because the "
            "shorter one is resized to what the model takes",
            _EXPECTED,
        )


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1, which rotates nothing, if the tags are damaged."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged tags raise many types, and the pixels can be whole all the same
        return 1


def _rgb(image: Image.Image, name: Path | str) -> Image.Image:
    """Return a decoded picture as RGB, with the range of its values kept, which Pillow would cut to 8 bits."""
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey(np.asarray(image), name)).convert("RGB")
    premultiplied = {"La": "LA", "RGBa": "RGBA"}
    return image.convert(premultiplied.get(image.mode, image.mode)).convert("RGB")


def _grey(values: np.ndarray[Any, Any], name: Path | str) -> np.ndarray[Any, Any]:
    """Return grey values of more than 8 bits as 8-bit ones; `DamagedFileError` if their range says no brightness."""
    least, most = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (least >= 0 and most <= 1):  # written this way so that NaN fails, too
            raise damaged(name, f"its values run from {least:g} to {most:g}, and real numbers from 0 to 1 are read")
        return (values.astype(np.float32) * 255).round().astype(np.uint8)
    if least < 0 or most > 65535:
        raise damaged(name, f"its values run from {least} to {most}, and whole numbers from 0 to 65535 are read")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
