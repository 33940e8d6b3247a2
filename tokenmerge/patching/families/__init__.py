"""The rows: one module per library, imported when the first model of that library is patched."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Protocol, cast

from torch import nn

from tokenmerge.errors import UnsupportedModelError
from tokenmerge.patching.families.family import BlockFamily, ModelFamily

LIBRARIES = {
    name: f"tokenmerge.patching.families.{name}" for name in ("timm", "transformers", "torchvision", "open_clip")
}


class _Rows(Protocol):
    """What a library's module offers; every function answers for one exact class, not for its bases."""

    NAMES: str
    """The supported models in words."""

    def model_row(self, cls: type[nn.Module]) -> ModelFamily | None:
        """The row of a model class."""
        ...

    def block_row(self, cls: type[nn.Module]) -> BlockFamily | None:
        """The row of a block class."""
        ...

    def why_not(self, cls: type[nn.Module]) -> str | None:
        """Why a model class that has no row has none, where that is known."""
        ...


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


def _library_of(cls: type) -> str | None:
    """The supported library that a class comes from."""
    root = cls.__module__.split(".")[0]
    return root if root in LIBRARIES else None


def model_family(cls: type[nn.Module]) -> ModelFamily | None:
    """The row of the nearest supported base of a model class, or `None`."""
    for base in cls.__mro__:
        library = _library_of(base)
        row = _rows(library).model_row(base) if library else None
        if row is not None:
            return row
    return None


def block_family(cls: type[nn.Module]) -> BlockFamily | None:
    """The row of the nearest supported base of a block class, or `None`."""
    for base in cls.__mro__:
        library = _library_of(base)
        row = _rows(library).block_row(base) if library else None
        if row is not None:
            return row
    return None


def why_not(cls: type[nn.Module]) -> str | None:
    """Why a model class has no row, where that is known."""
    for base in cls.__mro__:
        library = _library_of(base)
        reason = _rows(library).why_not(base) if library else None
        if reason is not None:
            return reason
    return None


def misread(cls: type[nn.Module]) -> str | None:
    """Why a module around a tower would misread merged tokens, where that is known."""
    library = _library_of(cls)
    known = getattr(_rows(library), "misread", None) if library else None
    return None if known is None else cast("str | None", known(cls))


def supported_models() -> str:
    """The supported models of every installed library, for messages."""
    names = [_rows(library).NAMES for library in LIBRARIES if importlib.util.find_spec(library) is not None]
    return " or ".join(names) or f"those of {', '.join(LIBRARIES)} (not installed here)"
