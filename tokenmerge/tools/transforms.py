"""Transforms of evaluation: from a decoded file to a model's input, with the preprocessing of the model's own library."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from PIL import Image

from tokenmerge.errors import InputError
from tokenmerge.tools.hf import origin_of
from tokenmerge.tools.inputs import preprocessing
from tokenmerge.tools.media import IMAGES, SOUNDS, VIDEOS, Medium, read_sound
from tokenmerge.tools.models import input_shape
from tokenmerge.tools.processors import Processor, processor_of
from tokenmerge.tools.sounds import Features, SoundAugmentation, Spectrogram
from tokenmerge.tools.videos import ONE_VIEW, Clip, Views
from tokenmerge.tools.zero_shot import ZeroShot, clip_transform


def evaluation_transform(
    model: Any,
    medium: Medium,
    overrides: dict[str, Any],
    sampling_rate: int,
    data: Path | str,
    views: Views = ONE_VIEW,
) -> tuple[Any, Medium]:
    """Return the transform of files of a medium, and the medium with the way that its files are read.

    Args:
        model: a classifier of the medium.
        medium: kind of the files.
        overrides: values that replace the model's own preprocessing, by their names in timm's config.
        sampling_rate: stride between the sampled frames of a video.
        data: the data, for messages.
        views: views of each video.

    Raises:
        InputError: if an override or views are not for this medium, or does not work.
    """
    if medium is not IMAGES:
        taken = () if medium is SOUNDS else ("crop_pct", "mean", "std")
        odd = next((name for name in overrides if name not in taken), None)
        if odd is not None:
            flag = odd.replace("_", "-")
            raise InputError(f"--{flag} is for images, but {data} holds {medium.name}: leave it out")
    if views.count > 1 and medium is not VIDEOS:
        raise InputError(f"--views {views} is for videos, but {data} holds {medium.name}: leave it out")
    if origin_of(model) is not None:
        processor = processor_of(model, overrides)
        return of_processor(processor, input_shape(model), sampling_rate, views=views), read_for(processor, medium)
    if isinstance(model, ZeroShot):
        return clip_transform(model.visual, overrides), medium
    shape = input_shape(model)
    if medium is SOUNDS:
        return Spectrogram(shape), medium
    if medium is IMAGES:
        return image_transform(model, overrides), medium
    return Clip(shape, sampling_rate, views=views, **clip_values(model, overrides)), medium


def clip_values(model: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Clip` that the preprocessing of a timm model gives, with `overrides` applied."""
    config = preprocessing(model, overrides)
    return {name: config[name] for name in ("crop_pct", "mean", "std", "interpolation")}


def of_processor(
    processor: Processor,
    shape: tuple[int, ...],
    sampling_rate: int,
    augmentation: SoundAugmentation | None = None,
    views: Views = ONE_VIEW,
) -> Any:
    """Return the transform of a processor for files of its medium; `augmentation` is for sounds in training, `views` for videos."""
    if processor.medium == "images":
        return processor
    if processor.medium == "videos":
        if views.crops == 1:
            return Clip(shape, sampling_rate, processor=processor, views=views)
        mean, std = processor.normalisation(shape)  # a processor crops the centre
        return Clip(shape, sampling_rate, mean=mean, std=std, interpolation=processor.interpolation, views=views)
    time_axis = 0 if hasattr(processor.inner, "max_length") else 1
    return Features(processor, processor.rate, time_axis, augmentation)


def read_for(processor: Processor, medium: Medium) -> Medium:
    """Return the medium whose sounds are read at the sample rate of the processor."""
    if processor.medium != "sounds":
        return medium
    return dataclasses.replace(medium, read=functools.partial(read_sound, rate=processor.rate), rate=processor.rate)


def image_transform(model: Any, overrides: dict[str, Any]) -> Any:
    """Return timm's transform of images with the preprocessing of a timm or torchvision model.

    Raises:
        InputError: if timm refuses a value.
    """
    config = preprocessing(model, overrides)
    config["input_size"] = input_shape(model)
    flags = "--crop-pct, --crop-mode, --interpolation, --mean and --std"
    return of_timm(config, f"preprocessing {overrides or config}", flags)


def of_timm(config: dict[str, Any], name: str, flags: str) -> Any:
    """Return timm's transform of images, tried on an empty one.

    Args:
        config: arguments of timm's `create_transform`.
        name: name of the config, for the error.
        flags: flags that can be wrong, for the error.

    Raises:
        InputError: if timm refuses a value.
    """
    from timm.data.transforms_factory import create_transform

    _, height, width = config["input_size"]
    try:
        transform = create_transform(**config)
        transform(Image.new("RGB", (width, height)))
    except Exception as error:  # timm and torchvision raise many exception types for invalid values
        raise InputError(f"the {name} does not work ({type(error).__name__}: {error}): check {flags}") from None
    return transform
