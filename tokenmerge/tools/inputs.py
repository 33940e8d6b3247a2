"""Properties of classifiers that commands need: input shape, classes, preprocessing, logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.tools.media import IMAGES, SOUNDS, VIDEOS, Medium
from tokenmerge.tools.models import input_shape

_WANTED: dict[str, tuple[str, Callable[[tuple[int, ...]], bool]]] = {
    IMAGES.name: ("RGB images", lambda shape: len(shape) == 3 and shape[0] == 3),
    SOUNDS.name: ("one-channel spectrograms of sounds", lambda shape: len(shape) == 3 and shape[0] == 1),
    VIDEOS.name: ("videos", lambda shape: len(shape) == 4),
}


def classifier_input(model: Any, medium: Medium, command: str) -> tuple[int, ...]:
    """Return the shape of one input: `(C, H, W)`, `(1, frames, bands)` for sounds, `(frames, C, H, W)` for videos.

    Raises:
        InputError: if the model has no classifier, its preprocessing is unknown, or it does not take this medium.
    """
    known = hasattr(model, "pretrained_cfg") or medium is VIDEOS or (medium is IMAGES and hasattr(model, "weights"))
    if not known or (command == "train" and hasattr(model, "weights")):
        raise InputError(
            f"{type(model).__name__} is not a timm model, but {command} takes the preprocessing of {medium.name} from "
            "timm: use bench or inspect, or tokenmerge.patch in your own code"
        )
    what, fits = _WANTED[medium.name]
    shape = input_shape(model)
    if not fits(shape) or not num_classes(model):
        found = "has no classifier" if fits(shape) else f"takes inputs of the shape {shape}"
        hint = "choose one such as hf:videomae" if medium is VIDEOS else "choose another, or give --num-classes"
        raise InputError(f"the model {found}, but {command} needs one that classifies {what}: {hint}")
    return shape


def num_classes(model: Any) -> int:
    """Return the number of classes of a model, 0 without a classifier."""
    if hasattr(model, "pretrained_cfg"):
        return int(getattr(model, "num_classes", 0) or 0)
    if hasattr(model, "weights"):  # a torchvision model
        return int(model.num_classes)
    head = getattr(model, "classifier", None)
    return int(model.config.num_labels) if head is not None else 0


def class_names(model: Any) -> list[str] | None:
    """Return the class names of a model in the order of its outputs; `None` if it does not know them."""
    if hasattr(model, "pretrained_cfg"):
        names = (model.pretrained_cfg or {}).get("label_names")
        return None if names is None else list(names)
    if hasattr(model, "weights"):
        names = model.weights.meta["categories"]
        return list(names) if len(names) == model.num_classes else None
    labels = model.config.id2label
    return [str(labels[index]) for index in range(len(labels))]


def preprocessing(model: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the preprocessing of a model as timm's data config, with `overrides` applied."""
    from timm.data.config import resolve_data_config

    if not hasattr(model, "weights"):
        return dict(resolve_data_config(overrides, model=model))
    own = model.weights.transforms()  # torchvision resizes the shorter side, then crops the centre
    (crop,), (resize,) = own.crop_size, own.resize_size
    found = {"mean": tuple(own.mean), "std": tuple(own.std), "crop_pct": crop / resize, "crop_mode": "center"}
    return {**found, "interpolation": own.interpolation.value, **overrides}


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output, which is an object with `logits` for transformers."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits
