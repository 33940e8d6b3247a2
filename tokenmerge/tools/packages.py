"""Packages that only some models and formats need."""

from __future__ import annotations

import importlib
from typing import Any

from tokenmerge.errors import InputError


def needed(module: str, reason: str, extra: str, name: str | None = None) -> Any:
    """Import and return a module.

    Args:
        module: name of the module.
        reason: what needs it, in words that follow "but", such as "exporting to ONNX needs it".
        extra: extra of this package that installs it.
        name: name of its package, if it has another one.

    Raises:
        InputError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"{name or module} is not installed, but {reason}: pip install 'tokenmerge[{extra}]'"
        ) from None
