"""Sounds and videos, decoded by FFmpeg without letting a file make it open other files, with limits on length and size."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenmerge.tools.packages import needed
from tokenmerge.tools.reading.damage import check_file, damaged, decoding
from tokenmerge.tools.reading.wholeness import check_whole

SAMPLE_RATE = 16_000
"""Sample rate of decoded sounds in Hz, as AST, AudioMAE and AudioSet use it."""
MOST_BYTES = 64 * 2**30
"""Largest size of a file; it is read piece by piece."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a recording.

    Attributes:
        seconds: longest sound, because it is decoded as a whole; models look at seconds.
        pixels: most pixels of one frame of a video: 8K video has 33 million.
        clip: most bytes of the selected frames of a video together.
        frames: most frames that are decoded to find the selected ones: 46 hours at 60 frames per second.
    """

    seconds: int = 3600
    pixels: int = 36_000_000
    clip: int = 2**32
    frames: int = 10_000_000


OWN = Limits()
"""Limits of the user's own files."""
FOR_VISITORS = Limits(seconds=600, pixels=9_000_000, clip=2**29, frames=20_000)
"""Limits of files that strangers may choose, of which one is decoded at a time."""
MOST_OBLONG = 64
"""Largest aspect ratio of a frame, because its shorter side is resized to what the model takes."""
MOST_LOUD = 1e6
"""Loudest sample: integers that were stored as floats reach 32,768, and the spectra of far larger ones overflow."""
_RATES = (1000, 768_000)
# demuxers of the suffixes of SOUNDS and VIDEOS; none of these reads a list of other files
_DEMUXERS = "wav,flac,ogg,mp3,aac,mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegvideo,mpegts"
_OPTIONS = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}


def pyav() -> Any:
    """Import and return the module `av`.

    Raises:
        InputError: if it is not installed.
    """
    av = needed("av", "sounds and videos are decoded by it", "media", "PyAV")
    av.logging.set_level(None)  # the command itself lists damaged files
    return av


@contextlib.contextmanager
def _opened(path: Path, kind: str) -> Iterator[Any]:
    """Open a container with a stream of this kind; any error of the body becomes a `DamagedFileError`."""
    av = pyav()
    check_file(path, MOST_BYTES)
    with decoding(path):
        check_whole(path)
        try:
            # "file:" and an absolute path, because FFmpeg takes a name such as concat:a|b for a list of other files
            container = av.open(f"file:{path.absolute()}", options=dict(_OPTIONS), metadata_errors="replace")
        except av.ArgumentError:  # its word for a format that is not in the list
            raise damaged(path, f"it is in no format that is read here; known are {_DEMUXERS}") from None
        with container:
            if not getattr(container.streams, kind):
                raise damaged(path, f"it holds no {kind}")
            yield container


def read_sound(path: Path, rate: int = SAMPLE_RATE, limits: Limits = OWN) -> np.ndarray[Any, Any]:
    """Read the first audio stream of a file as `[samples]` float32 in [−1, 1], mono.

    Args:
        path: the file.
        rate: sample rate in Hz to resample to.
        limits: the limits.

    Raises:
        DamagedFileError: if it is no regular file, has no audio stream, cannot be decoded, or is longer than the limit.
        InputError: if PyAV is not installed.
    """
    parts: list[np.ndarray[Any, Any]] = []
    count = 0
    with _opened(path, "audio") as container:
        resampler = pyav().AudioResampler(format="fltp", rate=rate)
        for frame in _frames_then_none(container):
            if frame is not None and not _RATES[0] <= frame.sample_rate <= _RATES[1]:
                raise damaged(
                    path, f"its sample rate is {frame.sample_rate} Hz, and {_RATES[0]} to {_RATES[1]} are read"
                )
            for out in resampler.resample(frame):
                # channels are averaged here, because FFmpeg's downmix makes two equal channels louder
                parts.append(out.to_ndarray().mean(axis=0))
                count += len(parts[-1])
            if count > limits.seconds * rate:
                raise damaged(path, f"it is longer than {limits.seconds // 60} minutes, and no longer ones are decoded")
        if not count:
            raise damaged(path, "its audio is empty")
    samples = np.concatenate(parts)
    if not np.isfinite(samples).all():
        raise damaged(path, "some of its samples are not finite")
    loudest = float(np.abs(samples).max())
    if loudest > MOST_LOUD:
        raise damaged(
            path, f"its loudest sample is {loudest:.0e}, and at most {MOST_LOUD:.0e} is read, where 1 is full scale"
        )
    return samples


def _frames_then_none(container: Any) -> Iterator[Any]:
    yield from container.decode(audio=0)
    yield None  # flushes the resampler


def read_frames(path: Path, choose: Callable[[int], Sequence[int]], limits: Limits = OWN) -> np.ndarray[Any, Any]:
    """Read selected frames of the first video stream as `[frames, H, W, 3]` uint8 RGB.

    Args:
        path: the file.
        choose: function from the number of frames to the indices of the wanted frames, in order. It is called again with the true
            number if the file states more frames than it holds.
        limits: the limits.

    Raises:
        DamagedFileError: if it is no regular file, has no video stream, cannot be decoded, or has too large frames.
        InputError: if PyAV is not installed.
    """
    with _opened(path, "video") as container:
        total = container.streams.video[0].frames  # 0 if the container does not say
        total = total if total > 0 else sum(1 for packet in container.demux(video=0) if packet.size)
    wanted = list(choose(max(1, total)))
    found, count = _decoded(path, wanted, limits)
    if count is not None and count <= max(wanted):
        if not count:
            raise damaged(path, "no frame of it can be decoded")
        wanted = list(choose(count))
        found, _ = _decoded(path, wanted, limits)
    return np.stack([found[number] for number in wanted])


def _decoded(path: Path, wanted: Sequence[int], limits: Limits) -> tuple[dict[int, np.ndarray[Any, Any]], int | None]:
    """Return the wanted frames by index, and the number of all frames; `None` if more frames may follow the wanted ones."""
    found: dict[int, np.ndarray[Any, Any]] = {}
    number, last, chosen = -1, max(wanted), set(wanted)
    with _opened(path, "video") as container:
        stream = container.streams.video[0]
        _check_frame(path, stream.codec_context, len(chosen), limits)  # before anything is decoded
        for number, frame in enumerate(container.decode(video=0)):
            if number in chosen:
                _check_frame(path, frame, len(chosen), limits)
                found[number] = frame.to_ndarray(format="rgb24")
                if found[number].shape != next(iter(found.values())).shape:
                    raise damaged(path, "its frames change their size")
            if number >= last:
                return found, None
            if number >= limits.frames:
                raise damaged(path, f"it has more than {limits.frames:,} frames, and no more are decoded")
    return found, number + 1


def _check_frame(path: Path, frame: Any, count: int, limits: Limits) -> None:
    width, height = frame.width, frame.height
    if width * height > limits.pixels or 3 * width * height * count > limits.clip:
        raise damaged(path, f"its frames have {width}×{height} pixels, and {count} of them would not fit into memory")
    if width and height and max(width, height) > MOST_OBLONG * min(width, height):
        raise damaged(
            path,
            f"its frames have {width}×{height} pixels, and one side may be at most {MOST_OBLONG} times as long as the other, because "
            "the shorter one is resized to what the model takes",
        )


def frame_rate(path: Path) -> float:
    """Return the frames per second of the first video stream; 25 if the file does not state it.

    Raises:
        DamagedFileError: if there is no video stream, or its rate is not between 0.01 and 1000.
    """
    with _opened(path, "video") as container:
        rate = float(container.streams.video[0].average_rate or 25)
        if not 0.01 <= rate <= 1000:
            raise damaged(path, f"it states {rate:g} frames per second, and 0.01 to 1000 are read")
        return rate
