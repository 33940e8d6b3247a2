"""Rows of transformers' vision, video and audio towers, each built when its class is looked up.

No modelling file is imported for them, because transformers has hundreds and a user needs one.
"""

from __future__ import annotations

import inspect

from torch import nn

from tokenmerge.patching.families.family import BlockFamily, ModelFamily
from tokenmerge.patching.families.transformers.blocks import LAYERS, WITHOUT_MASK
from tokenmerge.patching.families.transformers.models import TOWERS
from tokenmerge.patching.families.transformers.readers import ONE_BY_ONE, READERS
from tokenmerge.patching.families.transformers.refused import REFUSED

NAMES = "transformers' plain vision, video and audio transformers"


def _key(cls: type) -> str:
    """Return `vit.ViTModel` for `transformers.models.vit.modeling_vit.ViTModel`."""
    return f"{cls.__module__.rpartition('.modeling_')[2]}.{cls.__name__}"


def _takes_no_mask(cls: type[nn.Module]) -> bool:
    """Return whether the layer of the installed version passes no mask on, as later versions do."""
    return "attention_mask" not in inspect.signature(cls.forward).parameters


def model_row(cls: type[nn.Module]) -> ModelFamily | None:
    """Return the row of a model class, or `None`."""
    seams = TOWERS.get(_key(cls))
    return None if seams is None else ModelFamily(library="transformers", model=cls, seams=("forward",), **seams)


def block_row(cls: type[nn.Module]) -> BlockFamily | None:
    """Return the row of a layer class, or `None`."""
    seams = LAYERS.get(_key(cls))
    if seams is not None and seams.get("mask") == "attention_mask" and _takes_no_mask(cls):
        seams = {**seams, **WITHOUT_MASK.get(_key(cls), {})}
    return None if seams is None else BlockFamily(block=cls, **seams)


def misread(cls: type[nn.Module], tower: type[nn.Module], module: nn.Module) -> str | None:
    """Return why a module around a tower would misread merged tokens; empty if it would not, `None` if unknown."""
    if _key(cls) in ONE_BY_ONE and "image_sizes" in inspect.signature(tower.forward).parameters:
        return "splits the tokens of several images by their sizes in pixels"
    if isinstance(getattr(getattr(module, "config", None), "vision_feature_layer", None), list | tuple):
        return "puts the tokens of several layers side by side, which merge to other numbers"
    return READERS.get(_key(cls))


def why_not(cls: type[nn.Module]) -> str | None:
    """Return why a model class has no row; `None` if the reason is not known."""
    return REFUSED.get(_key(cls).partition(".")[0])
