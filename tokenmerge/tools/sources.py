"""Creation of models by libraries other than timm: transformers, torchvision and open_clip."""

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
    """Silence the logging and progress bars of libraries; the command reports results itself."""
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
"""Config values of the named sizes that a model type accepts as a suffix, such as `hf:videomae-large`."""


def _transformers(name: str, pretrained: bool, img_size: int | None, auto: str = "AutoModel", **values: Any) -> Any:
    """Create a transformers model from a folder, a hub id, or a model type such as `vit` or `videomae-large`.

    Args:
        name: the part of MODEL after `hf:`; a folder is one that `save_pretrained` wrote.
        pretrained: whether to load weights; a model type has none.
        img_size: side of the image in pixels; `None` keeps the model's own.
        auto: name of the Auto class of transformers that creates the model.
        values: additional values of the config.
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
            head = {} if auto == "AutoModel" else {"ignore_mismatched_sizes": True}  # the number of classes may differ
            return made.from_pretrained(name, config=config, **offline, **head)
    return made.from_config(config)


def _torchvision(name: str, pretrained: bool, img_size: int | None) -> Any:
    """Create a torchvision model from NAME or NAME:WEIGHTS, such as vit_b_16:IMAGENET1K_SWAG_E2E_V1.

    The attribute `weights` of the model is set to torchvision's entry for the weights, with preprocessing and class names.
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
    """Create the image tower of an open_clip model from NAME or NAME:TAG, where TAG names pretrained weights."""
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
    with torch.device("cpu"):  # open_clip moves the model, which fails on the meta device
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
    """Create a model of one of `SOURCES`; of a transformers model with several towers, return the vision tower.

    Args:
        model: MODEL argument, `prefix:name`.
        pretrained: whether to load weights.
        img_size: side of the image, `None` for the model's own.
        num_classes: number of classes; `None` keeps the model's own.
        of_videos: whether to create the video classifier of transformers, which is the tower with its head.
        values: additional values of its config.

    Raises:
        InputError: if the library is missing, or the model cannot be created.
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
    except Exception as error:  # every library and hub client raises its own exception types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the model {model!r} cannot be made ({type(error).__name__}: {reason[:200]}): check the name, and that the "
            "network is there if it is to be downloaded"
        ) from None
    if prefix == "hf":
        with contextlib.suppress(TokenMergeError):  # the caller refuses models without a tower, with reasons
            return find_target(made).model
    return made
