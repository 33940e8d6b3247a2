"""Pictures, written whole or not at all; other files are written by `tokenmerge.files`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tokenmerge import files
from tokenmerge.errors import InputError, TokenMergeError, shown


def picture_suffixes() -> frozenset[str]:
    """Return the suffixes of the picture formats that can be written, in lower case."""
    Image.init()
    return frozenset(name for name, kind in Image.registered_extensions().items() if kind in Image.SAVE)


@contextlib.contextmanager
def drawing(path: Path, what: str) -> Iterator[Path]:
    """Give a temporary path for an encoder to write to, and move the file to `path`, whole or not at all.

    Args:
        path: the file to write.
        what: what it is, for messages, such as "the picture".

    Raises:
        InputError: if it cannot be written, or the encoder fails, for instance because a format has no pictures so large.
    """
    with files.replacing(path, what) as beside:
        try:
            yield beside
        except (TokenMergeError, OSError, MemoryError):
            raise
        except Exception as error:  # every encoder raises its own types
            raise InputError(
                f"{what} {shown(str(path))} cannot be written ({type(error).__name__}: {files.words_of(error)}): "
                "choose another format, such as .png"
            ) from None


def save_picture(picture: Any, path: Path, what: str) -> None:
    """Save a Pillow image in the format of the suffix.

    Raises:
        InputError: if it cannot be written.
    """
    with drawing(path, what) as beside:
        picture.save(beside)
