"""The rows: one module per library, imported when the first model of that library is patched."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from functools import cache
from typing import Protocol, cast

from torch import nn

from tokenmerge.errors import UnsupportedModelError
from tokenmerge.patching.family import BlockFamily, ModelFamily

LIBRARIES = {"timm": "tokenmerge.patching.families.timm"}


class _Rows(Protocol):
    MODELS: Sequence[ModelFamily]
    BLOCKS: Sequence[BlockFamily]


@cache
def _rows(library: str) -> _Rows:
    """The rows of a library, whose import failing means that it is another version than the rows know."""
    try:
        return cast("_Rows", importlib.import_module(LIBRARIES[library]))
    except ImportError as error:
        version = getattr(importlib.import_module(library), "__version__", "unknown")
        raise UnsupportedModelError(
            f"{library} {version} is installed, but it lacks what tokenmerge builds on ({error}): "
            f"pip install --upgrade 'tokenmerge[{library}]'"
        ) from None


def _libraries_of(cls: type) -> list[str]:
    """Supported libraries that a class or one of its bases comes from, nearest first."""
    roots = (base.__module__.split(".")[0] for base in cls.__mro__)
    return [root for root in dict.fromkeys(roots) if root in LIBRARIES]


def model_family(cls: type[nn.Module]) -> ModelFamily | None:
    """The row of the nearest supported base of a model class, or `None`."""
    rows = {row.model: row for library in _libraries_of(cls) for row in _rows(library).MODELS}
    return next((rows[base] for base in cls.__mro__ if base in rows), None)


def block_family(cls: type[nn.Module]) -> BlockFamily | None:
    """The row of the nearest supported base of a block class, or `None`."""
    rows = {row.block: row for library in _libraries_of(cls) for row in _rows(library).BLOCKS}
    return next((rows[base] for base in cls.__mro__ if base in rows), None)


def supported_models() -> str:
    """The supported model classes of every installed library, for messages."""
    names = []
    for library in LIBRARIES:
        with contextlib.suppress(ImportError, UnsupportedModelError):
            names += [f"{library}'s {row.model.__name__}" for row in _rows(library).MODELS]
    return " and ".join(names) or f"those of {', '.join(LIBRARIES)} (not installed here)"
