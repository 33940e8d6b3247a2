"""Properties of classifiers that commands need: input shape, classes, preprocessing, logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tokenmerge.errors import InputError, shown
from tokenmerge.tools.hf import classified_medium, origin_of
from tokenmerge.tools.media import IMAGES, SOUNDS, VIDEOS, Medium
from tokenmerge.tools.models import input_shape
from tokenmerge.tools.zero_shot import ZeroShot

_CROPS = ("center", "squash", "border", None)
"""Values of `crop_mode` that timm knows."""
_WANTED: dict[str, tuple[str, Callable[[tuple[int, ...]], bool]]] = {
    IMAGES.name: ("RGB images", lambda shape: len(shape) == 3 and shape[0] == 3),
    SOUNDS.name: (
        "one-channel spectrograms of sounds",
        lambda shape: shape[0] == 1 if len(shape) == 3 else len(shape) == 2,
    ),
    VIDEOS.name: ("videos", lambda shape: len(shape) == 4),
}


def classifier_input(model: Any, medium: Medium, command: str) -> tuple[int, ...]:
    """Return the shape of one input: `(C, H, W)`, `(frames, C, H, W)` for videos; for sounds `(1, frames, bands)`, or with
    transformers `(frames, bands)` or `(bands, frames)`.

    Raises:
        InputError: if the model has no classifier, its preprocessing is unknown, or it does not take this medium.
    """
    known = hasattr(model, "pretrained_cfg") or (medium.name == IMAGES.name and hasattr(model, "weights"))
    if not known and origin_of(model) is None and not isinstance(model, ZeroShot):
        raise InputError(
            f"the preprocessing of {medium.name} for {type(model).__name__} is unknown, but {command} needs it: use bench or inspect, or "
            "tokenmerge.patch in your own code"
        )
    what, fits = _WANTED[medium.name]
    shape = input_shape(model)
    if not fits(shape) or not (num_classes(model) or isinstance(model, ZeroShot)):
        found = "has no classifier" if fits(shape) else f"takes inputs of the shape {shape}"
        hint = (
            "choose one such as hf:videomae" if medium.name == VIDEOS.name else "choose another, or give --num-classes"
        )
        raise InputError(f"the model {found}, but {command} needs one that classifies {what}: {hint}")
    return shape


def num_classes(model: Any) -> int:
    """Return the number of classes of a model, 0 without a classifier."""
    if hasattr(model, "pretrained_cfg"):
        return int(getattr(model, "num_classes", 0) or 0)
    if hasattr(model, "weights") or isinstance(model, ZeroShot):  # a torchvision model, or open_clip's
        return int(model.num_classes)
    return int(model.config.num_labels) if classified_medium(model) is not None else 0


_SEVERAL = "several labels per input"
"""Note in the config of a timm model, which has no entry for it; transformers has `problem_type`."""


def note_several_labels(model: Any, several: bool) -> None:
    """Note in the config of a model whether its outputs are independent of each other, because one input may have several labels."""
    if several == has_several_labels(model):
        return
    if hasattr(model, "pretrained_cfg"):
        notes = tuple(one for one in (model.pretrained_cfg or {}).get("notes") or () if one != _SEVERAL)
        model.pretrained_cfg = {**model.pretrained_cfg, "notes": (*notes, *([_SEVERAL] if several else []))}
    elif hasattr(model, "config"):
        model.config.problem_type = "multi_label_classification" if several else None


def has_several_labels(model: Any) -> bool:
    """Return whether the config of a model says that an input may have several labels."""
    if hasattr(model, "pretrained_cfg"):
        return _SEVERAL in ((model.pretrained_cfg or {}).get("notes") or ())
    return getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"


def class_names(model: Any) -> list[str] | None:
    """Return the class names of a model in the order of its outputs; `None` if it does not know them."""
    if hasattr(model, "pretrained_cfg"):
        names = (model.pretrained_cfg or {}).get("label_names")
        if names is None:
            return None
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise InputError(
                f"label_names of the model is {shown(names):.80}, but a list of names was expected: correct its config"
            )
        return list(names)
    if hasattr(model, "weights"):
        names = getattr(model, "label_names", None) or model.weights.meta["categories"]
        return list(names) if len(names) == model.num_classes else None
    if isinstance(model, ZeroShot):
        return list(model.names)
    labels = model.config.id2label
    if sorted(labels) != list(range(len(labels))):
        raise InputError(
            f"id2label of the model names the classes {shown(sorted(labels, key=str)):.80}, but 0 to {len(labels) - 1} were expected: "
            "correct its config"
        )
    return [str(labels[index]) for index in range(len(labels))]


def preprocessing(model: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the preprocessing of a model as timm's data config, with `overrides` applied."""
    from timm.data.config import resolve_data_config

    if not hasattr(model, "weights"):
        stored = (
            getattr(model, "pretrained_cfg", None) or {}
        )  # timm passes over a value such as 0, and takes its default
        _checked({name: value for name, value in stored.items() if value is not None and name not in overrides})
        return _checked(dict(resolve_data_config(overrides, model=model)))
    own = model.weights.transforms()  # torchvision resizes the shorter side, then crops the centre
    (crop,), (resize,) = own.crop_size, own.resize_size
    found = {"mean": tuple(own.mean), "std": tuple(own.std), "crop_pct": crop / resize, "crop_mode": "center"}
    stored = getattr(model, "stored_preprocessing", {})  # of a checkpoint that train wrote
    return _checked({**found, "interpolation": own.interpolation.value, **stored, **overrides})


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    """Return a data config of timm; raise `InputError` if a value of it, such as one from a model's folder, cannot be right."""
    odd = None
    for name in ("mean", "std"):
        values = config.get(name, (1.0,))
        usual = isinstance(values, list | tuple) and values and all(isinstance(one, int | float) for one in values)
        if not usual or not all(math.isfinite(one) and (name == "mean" or one > 0) for one in values or ()):
            odd = name
    crop = config.get("crop_pct", 1.0)
    if not isinstance(crop, int | float) or not 0.1 <= crop <= 2:
        odd = "crop_pct"
    if config.get("crop_mode", "center") not in _CROPS:
        odd = "crop_mode"
    if odd is not None:
        raise InputError(
            f"the preprocessing of the model has {odd}={shown(config.get(odd)):.60}, which no images are made with: correct its config, or "
            f"give --{odd.replace('_', '-')}"
        )
    return config


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output, which is an object with `logits` for transformers."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def check_finite(logits: Tensor, setting: str) -> None:
    """Check the outputs of a model, because the classes that NaN or infinities rank mean nothing.

    Args:
        logits: `[B, classes]`.
        setting: what the model ran with, for the message, such as "r=8".

    Raises:
        InputError: if an output is NaN or infinite.
    """
    if bool(logits.isfinite().all()):
        return
    bad = int((~logits.isfinite().all(dim=1)).sum())
    kind = "NaN" if bool(logits.isnan().any()) else "infinite"
    raise InputError(
        f"the model's outputs at {setting} are {kind} for {bad} of {len(logits)} inputs of a batch, but finite numbers were "
        "expected: check the weights and the inputs, or compute in another dtype, such as bfloat16 instead of float16"
    )
