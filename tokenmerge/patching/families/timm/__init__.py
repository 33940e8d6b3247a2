"""Rows of timm's models; each module covers models that share a kind of block."""

from __future__ import annotations

import contextlib
import importlib

from torch import nn

from tokenmerge.patching.families.family import BlockFamily, ModelFamily
from tokenmerge.patching.families.timm import vit
from tokenmerge.patching.families.timm.refused import REFUSED

NAMES = "timm's plain vision transformers"

_MODULES = [vit]
for _name in ("eva", "relative", "cait", "naflex", "encoders"):
    with contextlib.suppress(ImportError, AttributeError):  # an older timm may lack the module or a class
        _MODULES.append(importlib.import_module(f"{__name__}.{_name}"))

_MODELS = {row.model: row for module in _MODULES for row in module.MODELS}
_BLOCKS = {row.block: row for module in _MODULES for row in module.BLOCKS}


def model_row(cls: type[nn.Module]) -> ModelFamily | None:
    """Return the row of a model class, or `None`."""
    return _MODELS.get(cls)


def block_row(cls: type[nn.Module]) -> BlockFamily | None:
    """Return the row of a block class, or `None`."""
    return _BLOCKS.get(cls)


def why_not(cls: type[nn.Module]) -> str | None:
    """Return why a model class has no row; `None` if the reason is not known."""
    return REFUSED.get(cls.__module__.rpartition(".")[2])


def misread(cls: type[nn.Module], tower: type[nn.Module], module: nn.Module) -> str | None:
    """Return `""` for timm's feature extractors, which read unmerged tokens; `None` for any other module around a model."""
    return "" if cls.__module__ in ("timm.models._features", "timm.models._features_fx") else None
