"""Creation of models by libraries other than timm: transformers, torchvision and open_clip."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from tokenmerge.errors import InputError, TokenMergeError, nearest, shown
from tokenmerge.files import words_of
from tokenmerge.tools.hf import create_transformers
from tokenmerge.tools.packages import needed
from tokenmerge.tools.zero_shot import ZeroShot


def _library(name: str) -> Any:
    return needed(name, "the model is one of its", name)


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


def _torchvision(name: str, pretrained: bool, img_size: int | None, num_classes: int | None, new_head: bool) -> Any:
    """Create a torchvision model from NAME or NAME:WEIGHTS, such as vit_b_16:IMAGENET1K_SWAG_E2E_V1.

    The attribute `weights` of the model is set to torchvision's entry for the weights, with preprocessing and class names.
    """
    models = _library("torchvision").models
    name, _, tag = name.partition(":")
    _check_known(name, models.list_models(), "torchvision")
    known = models.get_model_weights(name)
    if tag and tag not in known.__members__:
        raise InputError(
            f"torchvision has no weights {tag!r} of {name}; it has {', '.join(known.__members__)}: choose one"
        )
    weights = known[tag or "DEFAULT"]
    values = {} if img_size is None else {"image_size": img_size}
    if tag and img_size is None:
        values = {"image_size": weights.transforms().crop_size[0]}
    own = len(weights.meta["categories"])
    if num_classes is not None and not pretrained:
        values["num_classes"] = num_classes
    model = models.get_model(name, weights=weights if pretrained else None, **values)
    model.weights = weights
    if pretrained and num_classes not in (None, own):
        if not new_head:
            raise InputError(
                f"the weights of torchvision:{name} classify {own} classes, but --num-classes {num_classes} was given, whose head would "
                "be random: leave it out, or give --checkpoint FILE"
            )
        model.heads.head = torch.nn.Linear(model.heads.head.in_features, num_classes)
        model.num_classes = num_classes
    return model


def _check_known(name: str, known: Sequence[str], library: str) -> None:
    """Raise if a library has no model of this name."""
    if name not in known:
        near = nearest(name, known)
        hint = f"see {library}'s list_models()" if near is None else f"did you mean {library}:{near}?"
        raise InputError(f"{library} has no model {shown(name)}: {hint}")


def _open_clip(name: str, pretrained: bool, img_size: int | None, head: str | None) -> Any:
    """Create the image tower of an open_clip model from NAME or NAME:TAG, where TAG names pretrained weights.

    If a classifier of images is wanted, the tower is wrapped into one that compares images with texts.
    """
    open_clip = _library("open_clip")
    architecture, _, tag = name.partition(":")
    if not architecture.startswith(("hf-hub", "local-dir")):
        _check_known(architecture, open_clip.list_models(), "open_clip")
    if pretrained and not tag:
        tag = next((tag for model, tag in open_clip.list_pretrained() if model == architecture), "")
        if not tag:
            raise InputError(
                f"open_clip has no pretrained weights for {architecture!r}: check open_clip.list_pretrained()"
            )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    known = architecture in open_clip.list_models()
    if known and tag and tag not in tags and not os.path.isfile(tag):
        raise InputError(
            f"open_clip knows no weights {tag!r:.60} for {architecture!r:.60}: give one of {', '.join(tags) or 'none'}, or a file of weights"
        )
    with torch.device("cpu"):  # open_clip moves the model, which fails on the meta device
        model = open_clip.create_model(architecture, pretrained=tag if pretrained else None, force_image_size=img_size)
    return ZeroShot(model, architecture) if head == "images" else model.visual


SOURCES = ("hf", "torchvision", "open_clip")
"""Prefixes of MODEL that name a library other than timm."""


def create(
    model: str,
    pretrained: bool,
    img_size: int | None,
    num_classes: int | None,
    head: str | None = None,
    new_head: bool = False,
    values: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Create a model of one of `SOURCES`; of a transformers model with several towers, return the vision tower.

    Args:
        model: MODEL argument, `prefix:name`.
        pretrained: whether to load weights.
        img_size: side of the image, `None` for the model's own.
        num_classes: number of classes; `None` keeps the model's own.
        head: medium that the model must classify ("images", "videos" or "sounds"); `None` takes the model as it is.
        new_head: whether weights of another number of classes, or without a head, get a random one (for training).
        values: additional values of the config of a transformers model.

    Raises:
        InputError: if the library is missing, or the model cannot be created.
    """
    prefix, _, name = model.partition(":")
    odd = f"--model-kwargs {next(iter(values))}" if values and prefix != "hf" else ""
    rate = {"drop_rate": "--drop", "drop_path_rate": "--drop-path"}.get(
        next(iter(values), "")
    )  # as train passes them on
    odd = rate if odd and rate is not None else odd
    odd = "--num-classes" if num_classes is not None and prefix == "open_clip" else odd
    if odd:
        raise InputError(f"{odd} was given, but {model!r} has no such argument: leave it out")
    try:
        with _quiet():
            if prefix == "hf":
                return create_transformers(name, pretrained, img_size, num_classes, head, new_head, values)
            if prefix == "torchvision":
                return _torchvision(name, pretrained, img_size, num_classes, new_head)
            return _open_clip(name, pretrained, img_size, head)
    except TokenMergeError:
        raise
    except Exception as error:  # every library and hub client raises its own exception types
        absent = " (there is no folder of this name)" if prefix == "hf" and not os.path.exists(name) else ""
        raise InputError(
            f"the model {model!r} cannot be made ({type(error).__name__}: {words_of(error)}): check the name{absent}, and that the "
            "network is there if it is to be downloaded"
        ) from None
