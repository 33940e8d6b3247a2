"""What the files of a class folder hold: how they are found, and read."""

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
"""Hz, of every sound once it is read: that of AST, AudioMAE and AudioSet's recipes."""


_DAMAGED = (OSError, ValueError, SyntaxError, EOFError)


@dataclasses.dataclass(frozen=True)
class Medium:
    """One kind of files.

    Attributes:
        name: in the plural, for messages.
        suffixes: by which they are found, in lower case; `None` are timm's for images.
        read: opens one as a transform takes it.
        unreadable: what `read` and the transform raise for files that are cut, mislabelled, or something else.
    """

    name: str
    suffixes: tuple[str, ...] | None
    read: Callable[[Path], Any]
    unreadable: tuple[type[Exception], ...] = _DAMAGED


def _read_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def pyav() -> Any:
    """The module `av`.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import av
    except ImportError:
        raise InputError(
            "PyAV is not installed, but sounds and videos are decoded by it: pip install 'tokenmerge[media]'"
        ) from None
    av.logging.set_level(None)  # damaged files are named by the command, once
    return av


@contextlib.contextmanager
def _opened(path: Path, kind: str) -> Iterator[Any]:
    """A container with a stream of this kind; whatever is wrong with it or happens inside is a ValueError."""
    av = pyav()
    try:
        with av.open(str(path)) as container:
            if not getattr(container.streams, kind):
                raise ValueError(f"it holds no {kind}")
            yield container
    except av.FFmpegError as error:
        raise ValueError(error.strerror or str(error)) from None


def read_sound(path: Path) -> np.ndarray[Any, Any]:
    """The first audio stream, whatever its container: `[samples]` float32 in [−1, 1], mono, 16 kHz.

    Raises:
        ValueError: if there is none, or it cannot be decoded.
        InputError: if PyAV is not installed.
    """
    with _opened(path, "audio") as container:
        resampler = pyav().AudioResampler(format="fltp", rate=SAMPLE_RATE)
        frames = [*container.decode(audio=0), None]  # None: what the resampler still holds
        # the mean over channels here, because FFmpeg's own makes two equal ones louder
        parts = [out.to_ndarray().mean(axis=0) for frame in frames for out in resampler.resample(frame)]
    if not parts:
        raise ValueError("its audio is empty")
    return np.concatenate(parts)


def read_frames(path: Path, choose: Callable[[int], Sequence[int]]) -> np.ndarray[Any, Any]:
    """Some frames of the first video stream: `[frames, H, W, 3]`, uint8, RGB.

    Args:
        path: the file.
        choose: number of frames in it -> the wanted ones, in order.

    Raises:
        ValueError: if there is none, or it cannot be decoded.
        InputError: if PyAV is not installed.
    """
    with _opened(path, "video") as container:
        total = container.streams.video[0].frames  # 0 where the container does not say
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
    last = max(found)  # containers may promise more than they hold
    return np.stack([found.get(number, found[last]) for number in wanted])


def frame_rate(path: Path) -> float:
    """Frames per second of the first video stream; 25 where the file does not say.

    Raises:
        ValueError: if there is none.
    """
    with _opened(path, "video") as container:
        return float(container.streams.video[0].average_rate or 25)


def _itself(path: Path) -> Path:
    """Videos are decoded by their transform, which knows the frames it wants."""
    return path


IMAGES = Medium("images", None, _read_image, (*_DAMAGED, Image.DecompressionBombError))
SOUNDS = Medium("sounds", (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac"), read_sound)
VIDEOS = Medium("videos", (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg"), _itself)


def medium_of(root: Path) -> Medium:
    """What most files below a folder are; images if it is not there, or holds nothing else that is known."""
    suffixes = [os.path.splitext(file)[1].lower() for _, _, files in os.walk(root, followlinks=True) for file in files]
    others = {
        medium.name: (medium, sum(suffix in (medium.suffixes or ()) for suffix in suffixes))
        for medium in (SOUNDS, VIDEOS)
    }
    medium, count = max(others.values(), key=lambda one: one[1])
    return medium if count > len(suffixes) // 2 else IMAGES
