"""The logger "tokenmerge": what patches decide, and why, at level INFO; nothing is printed unless a program asks for it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tokenmerge.schedule import Schedule

if TYPE_CHECKING:
    from tokenmerge.patching.record import Settings

logger = logging.getLogger("tokenmerge")
logger.addHandler(logging.NullHandler())

_seen: set[tuple[int, int]] = set()


def log_cut(settings: Settings, tokens: int, asked: Schedule, possible: Schedule) -> None:
    """Log that blocks merge fewer tokens than they were asked to, once for each number of tokens.

    Args:
        settings: settings of the model.
        tokens: number of tokens that enter the first block.
        asked: requested r per block.
        possible: r per block after it was cut to what the blocks can merge.
    """
    if asked == possible or (settings.number, tokens) in _seen or not logger.isEnabledFor(logging.INFO):
        return
    _seen.add((settings.number, tokens))
    logger.info(
        "r was cut for inputs of %d tokens, because too few are left to merge: it is %s",
        tokens,
        ", ".join(map(str, possible)),
    )
