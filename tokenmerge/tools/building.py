"""Limits on models that a config describes: one with absurd sizes is refused in a sentence, and does not fill the memory for minutes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.nn.modules.module import register_module_module_registration_hook

from tokenmerge.errors import InputError, shown

MOST_CLASSES = 1_000_000
"""Most classes of a head; the largest published ones have some 20,000."""
MOST_MODULES = 50_000
"""Most modules of a model; a ViT of 48 blocks has about 1,000."""


@contextlib.contextmanager
def limited(name: str) -> Iterator[None]:
    """Raise in the body when it builds a model of more than `MOST_MODULES` modules.

    Args:
        name: the model, for the message.

    Raises:
        InputError: if it does.
    """
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MOST_MODULES:
            raise InputError(
                f"the model {shown(name)} has over {MOST_MODULES:,} modules, but at most that many were expected: check its depth"
            )

    hook = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()
