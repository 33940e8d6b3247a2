"""A terminal of a given width, as a person sees it: the screen and everything that has scrolled off it."""

from __future__ import annotations

import os
import pty
import re
import struct
import termios
import time
from collections.abc import Mapping, Sequence
from fcntl import ioctl
from typing import NamedTuple

_CODE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b.")


class Seen(NamedTuple):
    """What a command left on a terminal."""

    code: int
    lines: list[str]
    overwritten: list[str]
    """Lines that were erased or written over, in part or as a whole, with other text."""
    raw: str


def screen(raw: str, columns: int, rows: int = 24) -> tuple[list[str], list[str]]:
    """The lines that remain after all control codes, and those that were lost; long lines wrap, as in a terminal."""
    lines: list[list[str]] = [[]]
    lost: list[str] = []
    row = column = 0

    def put(text: str) -> None:
        nonlocal row, column
        for sign in text:
            if column == columns:
                row, column = row + 1, 0
                if row == len(lines):
                    lines.append([])
            line = lines[row]
            line.extend(" " * (column + 1 - len(line)))
            if line[column] not in (" ", sign):
                lost.append("".join(line))
            line[column] = sign
            column += 1

    place = 0
    while place < len(raw):
        match, sign = _CODE.match(raw, place), raw[place]
        place = match.end() if match else place + 1
        if match is None:
            if sign == "\n":
                row += 1
                if row == len(lines):
                    lines.append([])
            elif sign == "\r":
                column = 0
            elif sign >= " ":
                put(sign)
        elif match[2] == "A":
            row = max(len(lines) - rows, 0, row - int(match[1] or 1))
        elif match[2] == "K":
            assert match[1] in ("2", "0", ""), match[0]
            kept = 0 if match[1] == "2" else column
            if "".join(lines[row][kept:]).strip():
                lost.append("".join(lines[row]))
            del lines[row][kept:]
        else:
            assert match[2] in ("m", "h", "l", None), match[0]  # colours, and the cursor shown or hidden
    return ["".join(line).rstrip() for line in lines], lost


def run(words: Sequence[str], columns: int, environment: Mapping[str, str] = os.environ, seconds: float = 120) -> Seen:
    """Run a command in a terminal."""
    process, master = pty.fork()
    if not process:
        ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.execvpe(
            words[0], list(words), {**environment, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "24"}
        )
    raw, end = b"", time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        raw += part
    os.close(master)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    text = raw.decode("utf-8", "replace")
    return Seen(code, *screen(text, columns), text)
