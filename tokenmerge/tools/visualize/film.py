"""Films of videos: original and merged frames side by side, with one colour per token in all frames."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokenmerge.tools.media import pyav
from tokenmerge.tools.visualize.load import Shown
from tokenmerge.tools.visualize.looks import Look
from tokenmerge.tools.visualize.panels import painted, scale_of
from tokenmerge.tracing import View
from tokenmerge.tracing.sheet import contact_sheet, enlarged, to_image

_CODECS = ("libx264", "mpeg4")  # in the order of preference


def write_film(
    path: Path, shown: Sequence[Shown], looks: Sequence[Sequence[Look]], block: int, view: View, foot: str = ""
) -> None:
    """Write an .mp4 or .gif that shows the inputs one after the other, with one column per setting, and `foot` below.

    Raises:
        InputError: if PyAV is missing.
        OSError: if the file cannot be written.
    """
    rate = shown[0].rate
    if any(abs(one.rate - rate) > 0.01 * rate for one in shown):
        raise OSError("the videos have different frame rates; give one at a time")
    frames: list[Image.Image] = []
    for each, of_input in zip(shown, looks, strict=True):
        frames += _frames(each, of_input, block, view, foot)
    if path.suffix.lower() == ".gif":
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / rate), loop=0)
    else:
        _write_mp4(path, frames, rate)


def _frames(shown: Shown, looks: Sequence[Look], block: int, view: View, foot: str) -> list[Image.Image]:
    scale = scale_of(shown)
    films = [enlarged(shown.pixels, scale), *(painted(shown, look, block, view, scale) for look in looks)]
    titles = [
        shown.name,
        *(f"{look.title}: {look.trace.size().shape[1] - look.trace.protected} tokens" for look in looks),
    ]
    return [
        contact_sheet([[to_image(film[:, i]) for film in films]], titles, foot=foot) for i in range(films[0].shape[1])
    ]


def _write_mp4(path: Path, frames: Sequence[Image.Image], rate: float) -> None:
    av = pyav()
    codec = next((name for name in _CODECS if name in av.codecs_available), None)
    if codec is None:
        raise OSError("this PyAV has no encoder for it; .gif needs none")
    width, height = (side + side % 2 for side in frames[0].size)  # 4:2:0 subsampling needs even sides
    try:
        file = io.BytesIO()  # FFmpeg would not notice every failure of a disk
        with av.open(file, "w", format="mp4") as container:
            stream: Any = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1000))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.bit_rate = 8 * width * height  # high enough for sharp borders
            for frame in frames:
                padded = Image.new("RGB", (width, height), "white")
                padded.paste(frame)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(padded), format="rgb24")))
            container.mux(stream.encode(None))
    except av.FFmpegError as error:
        raise OSError(error.strerror or str(error)) from None
    path.write_bytes(file.getvalue())
