"""Where MODEL on the command line comes from besides timm: transformers, torchvision, open_clip."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tokenmerge.errors import InputError, TokenMergeError
from tokenmerge.patching.target import find_target


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(
            f"{name} is not installed, but the model is one of its: pip install 'tokenmerge[{name}]'"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries log what they load; the command says it in its own words."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


_SCALES: dict[str, dict[str, int]] = {
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
}
"""Sizes that a model type may be asked for, beyond its default config (`hf:videomae-large`)."""


def _transformers(name: str, pretrained: bool, img_size: int | None, auto: str = "AutoModel", **values: Any) -> Any:
    """`hf:` + a folder of save_pretrained, a hub id, or a model type such as `vit` or `videomae-large`, random weights.

    Args:
        name: what follows `hf:`.
        pretrained: whether to load weights.
        img_size: side of the image, `None` for the model's own.
        auto: which of transformers' Auto classes makes it.
        values: further values of its config.
    """
    transformers = _library("transformers")
    made = getattr(transformers, auto)
    size = {**({} if img_size is None else {"image_size": img_size}), **values}
    types = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    kind, _, scale = name.rpartition("-") if name.rpartition("-")[2] in _SCALES else (name, "", "")
    if kind in types and not Path(name).exists():
        if pretrained:
            raise InputError(
                f"hf:{name} is a model type without weights: give a folder or a hub id, or no --pretrained"
            )
        config = types[kind](**size, **_SCALES.get(scale, {}))
    else:
        offline = {"local_files_only": True} if Path(name).exists() else {}
        config = transformers.AutoConfig.from_pretrained(name, **size, **offline)
        if pretrained:
            head = {} if auto == "AutoModel" else {"ignore_mismatched_sizes": True}  # another number of classes
            return made.from_pretrained(name, config=config, **offline, **head)
    return made.from_config(config)


def _torchvision(name: str, pretrained: bool, img_size: int | None) -> Any:
    """`torchvision:NAME` or `torchvision:NAME:WEIGHTS`, such as vit_b_16:IMAGENET1K_SWAG_E2E_V1.

    The weights, their preprocessing and class names among them, are noted as `model.weights`.
    """
    models = _library("torchvision").models
    name, _, tag = name.partition(":")
    known = models.get_model_weights(name)
    if tag and tag not in known.__members__:
        raise InputError(
            f"torchvision has no weights {tag!r} of {name}; it has {', '.join(known.__members__)}: choose one"
        )
    weights = known[tag or "DEFAULT"]
    size = {} if img_size is None else {"image_size": img_size}
    if tag and img_size is None:
        size = {"image_size": weights.transforms().crop_size[0]}
    model = models.get_model(name, weights=weights if pretrained else None, **size)
    model.weights = weights
    return model


def _open_clip(name: str, pretrained: bool, img_size: int | None) -> Any:
    """`open_clip:NAME` or `open_clip:NAME:TAG`, the tag naming pretrained weights; the image tower of it."""
    open_clip = _library("open_clip")
    architecture, _, tag = name.partition(":")
    if pretrained and not tag:
        tag = next((tag for model, tag in open_clip.list_pretrained() if model == architecture), "")
        if not tag:
            raise InputError(
                f"open_clip has no pretrained weights for {architecture!r}: check open_clip.list_pretrained()"
            )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    known = architecture in open_clip.list_models()
    if known and tag and tag not in tags and not Path(tag).is_file():
        raise InputError(
            f"open_clip knows no weights {tag!r:.60} for {architecture!r:.60}: give one of {', '.join(tags) or 'none'}, or a file of weights"
        )
    with torch.device("cpu"):  # it moves what it makes, which nothing on the meta device survives
        model = open_clip.create_model(architecture, pretrained=tag if pretrained else None, force_image_size=img_size)
    return model.visual


SOURCES: dict[str, Callable[[str, bool, int | None], Any]] = {
    "hf": _transformers,
    "torchvision": _torchvision,
    "open_clip": _open_clip,
}


def create(
    model: str,
    pretrained: bool,
    img_size: int | None,
    num_classes: int | None,
    of_videos: bool = False,
    **values: Any,
) -> Any:
    """A model of one of `SOURCES`, as `prefix:name`; of a transformers model with several parts, the vision tower.

    Args:
        model: prefix and name.
        pretrained: whether to load weights.
        img_size: side of the image, `None` for the model's own.
        num_classes: of the classifier.
        of_videos: whether to make transformers' classifier of videos, the tower with its head.
        values: further values of its config.

    Raises:
        InputError: if the library is missing, or the model cannot be made.
    """
    prefix, _, name = model.partition(":")
    head = of_videos and prefix == "hf"
    if not head and (num_classes is not None or values):
        flag = "--num-classes" if num_classes is not None else "--model-kwargs"
        raise InputError(f"{flag} is for timm models, but {model!r} was given: leave it out")
    try:
        with _quiet():
            if head:
                classes = {} if num_classes is None else {"num_labels": num_classes}
                return _transformers(name, pretrained, img_size, "AutoModelForVideoClassification", **classes, **values)
            made = SOURCES[prefix](name, pretrained, img_size)
    except TokenMergeError:
        raise
    except Exception as error:  # every library and hub client raises its own kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the model {model!r} cannot be made ({type(error).__name__}: {reason[:200]}): check the name, and that the "
            "network is there if it is to be downloaded"
        ) from None
    if prefix == "hf":
        with contextlib.suppress(TokenMergeError):  # what holds no tower is refused, with reasons, by the caller
            return find_target(made).model
    return made
