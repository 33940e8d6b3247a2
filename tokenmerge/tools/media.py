"""Media of class folders: images, sounds and videos, and how their files are found and read."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokenmerge.errors import InputError

SAMPLE_RATE = 16_000
"""Sample rate of decoded sounds in Hz, as AST, AudioMAE and AudioSet use it."""


_DAMAGED = (OSError, ValueError, SyntaxError, EOFError)


@dataclasses.dataclass(frozen=True)
class Medium:
    """One kind of file.

    Attributes:
        name: name for messages, in the plural.
        suffixes: file name suffixes in lower case; `None` means timm's for images.
        read: function that opens a file for the transform.
        unreadable: exceptions that `read` and the transform raise for truncated, mislabelled or foreign files.
    """

    name: str
    suffixes: tuple[str, ...] | None
    read: Callable[[Path], Any]
    unreadable: tuple[type[Exception], ...] = _DAMAGED


def _read_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def pyav() -> Any:
    """Import and return the module `av`.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import av
    except ImportError:
        raise InputError(
            "PyAV is not installed, but sounds and videos are decoded by it: pip install 'tokenmerge[media]'"
        ) from None
    av.logging.set_level(None)  # the command itself lists damaged files
    return av


@contextlib.contextmanager
def _opened(path: Path, kind: str) -> Iterator[Any]:
    """Open a container with a stream of this kind; FFmpeg's errors become a ValueError."""
    av = pyav()
    try:
        with av.open(str(path)) as container:
            if not getattr(container.streams, kind):
                raise ValueError(f"it holds no {kind}")
            yield container
    except av.FFmpegError as error:
        raise ValueError(error.strerror or str(error)) from None


def read_sound(path: Path) -> np.ndarray[Any, Any]:
    """Read the first audio stream of a file as `[samples]` float32 in [−1, 1], mono, at 16 kHz.

    Raises:
        ValueError: if there is no audio stream, or it cannot be decoded.
        InputError: if PyAV is not installed.
    """
    with _opened(path, "audio") as container:
        resampler = pyav().AudioResampler(format="fltp", rate=SAMPLE_RATE)
        frames = [*container.decode(audio=0), None]  # None flushes the resampler
        # channels are averaged here, because FFmpeg's downmix makes two equal channels louder
        parts = [out.to_ndarray().mean(axis=0) for frame in frames for out in resampler.resample(frame)]
    if not parts:
        raise ValueError("its audio is empty")
    return np.concatenate(parts)


def read_frames(path: Path, choose: Callable[[int], Sequence[int]]) -> np.ndarray[Any, Any]:
    """Read selected frames of the first video stream as `[frames, H, W, 3]` uint8 RGB.

    Args:
        path: the file.
        choose: function from the number of frames to the indices of the wanted frames, in order.

    Raises:
        ValueError: if there is no video stream, or it cannot be decoded.
        InputError: if PyAV is not installed.
    """
    with _opened(path, "video") as container:
        total = container.streams.video[0].frames  # 0 if the container does not say
        total = total or sum(1 for packet in container.demux(video=0) if packet.size)
    wanted = list(choose(max(1, total)))
    found: dict[int, np.ndarray[Any, Any]] = {}
    with _opened(path, "video") as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                found[number] = frame.to_ndarray(format="rgb24")
            if number >= max(wanted):
                break
    if not found:
        raise ValueError("no frame of it can be decoded")
    last = max(found)  # containers may state more frames than they hold
    return np.stack([found.get(number, found[last]) for number in wanted])


def frame_rate(path: Path) -> float:
    """Return the frames per second of the first video stream; 25 if the file does not state it.

    Raises:
        ValueError: if there is no video stream.
    """
    with _opened(path, "video") as container:
        return float(container.streams.video[0].average_rate or 25)


def _itself(path: Path) -> Path:
    """Return the path: the transform of videos decodes them, because it selects the frames."""
    return path


IMAGES = Medium("images", None, _read_image, (*_DAMAGED, Image.DecompressionBombError))
SOUNDS = Medium("sounds", (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac"), read_sound)
VIDEOS = Medium("videos", (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg"), _itself)


def medium_of(root: Path) -> Medium:
    """Return the medium of most files below a folder; images if the folder does not exist or no other medium prevails."""
    suffixes = [os.path.splitext(file)[1].lower() for _, _, files in os.walk(root, followlinks=True) for file in files]
    others = {
        medium.name: (medium, sum(suffix in (medium.suffixes or ()) for suffix in suffixes))
        for medium in (SOUNDS, VIDEOS)
    }
    medium, count = max(others.values(), key=lambda one: one[1])
    return medium if count > len(suffixes) // 2 else IMAGES
