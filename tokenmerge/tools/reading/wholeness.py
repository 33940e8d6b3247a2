"""Recordings that were cut off: a file that is shorter than it says. FFmpeg reads the rest, and says nothing."""

from __future__ import annotations

from pathlib import Path

from tokenmerge.tools.reading.damage import damaged

_STREAMED = 0xFFFFFF00
"""Sizes of RIFF from which on a writer did not know the size, because it wrote to a pipe."""
_HEAD = 4096
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def check_whole(path: Path) -> None:
    """Raise `DamagedFileError` if a WAV, AVI, Matroska or WebM file is shorter than its header says.

    Other containers hold no size of their own; a cut MP4 cannot be decoded anyway.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD)
        there = file.seek(0, 2)
    stated = _stated_size(head)
    if stated is not None and stated > there + 1:  # (a byte of padding may be missing)
        raise damaged(path, f"it is cut off: it states {stated:,} bytes, and {there:,} are there")


def _stated_size(head: bytes) -> int | None:
    """Return the size of a whole file by its first bytes; `None` if they do not say."""
    if head[:4] == b"RIFF":
        size = int.from_bytes(head[4:8], "little")
        return 8 + size if 0 < size < _STREAMED else None
    if head[:4] != _EBML:
        return None
    found = _number(head, 4)
    if found is None:
        return None
    start = found[1] + found[0]
    if head[start : start + 4] != _SEGMENT:
        return None
    found = _number(head, start + 4)
    return None if found is None else found[1] + found[0]


def _number(data: bytes, at: int) -> tuple[int, int] | None:
    """Return an EBML number of variable length and the position behind it; `None` if it is unknown or not there."""
    if at >= len(data) or not data[at]:
        return None
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big") & ~(1 << 7 * length)
    unknown = value == (1 << 7 * length) - 1
    return None if unknown or at + length > len(data) else (value, at + length)
