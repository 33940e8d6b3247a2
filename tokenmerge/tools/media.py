"""Media of class folders: images, sounds and videos, and how their files are found and read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenmerge.tools.reading.pictures import read_picture
from tokenmerge.tools.reading.recordings import SAMPLE_RATE, frame_rate, pyav, read_frames, read_sound
from tokenmerge.tools.reading.walk import Walk

__all__ = [
    "IMAGES",
    "SAMPLE_RATE",
    "SOUNDS",
    "VIDEOS",
    "Medium",
    "frame_rate",
    "medium_of",
    "pyav",
    "read_frames",
    "read_sound",
]


@dataclasses.dataclass(frozen=True)
class Medium:
    """One kind of file.

    Attributes:
        name: name for messages, in the plural.
        suffixes: file name suffixes in lower case; `None` means timm's for images.
        read: function that opens a file for the transform; it raises `DamagedFileError` for a file that cannot be decoded.
        rate: samples per second of what `read` returns, for sounds.
    """

    name: str
    suffixes: tuple[str, ...] | None
    read: Callable[[Path], Any]
    rate: int = SAMPLE_RATE


def _itself(path: Path) -> Path:
    """Return the path: the transform of videos decodes them, because it selects the frames."""
    return path


IMAGES = Medium("images", None, read_picture)
SOUNDS = Medium("sounds", (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac"), read_sound)
VIDEOS = Medium("videos", (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg"), _itself)


def medium_of(root: Path) -> Medium:
    """Return the medium of most files below a folder; images if the folder does not exist or no other medium prevails."""
    suffixes = [path.suffix.lower() for path in Walk(root)]
    others = {
        medium.name: (medium, sum(suffix in (medium.suffixes or ()) for suffix in suffixes))
        for medium in (SOUNDS, VIDEOS)
    }
    medium, count = max(others.values(), key=lambda one: one[1])
    return medium if count > len(suffixes) // 2 else IMAGES
