"""Transforms from decoded files to model inputs, with augmentation in training."""

from __future__ import annotations

from typing import Any

from tokenmerge.errors import InputError
from tokenmerge.tools.hf import origin_of
from tokenmerge.tools.inputs import preprocessing
from tokenmerge.tools.media import IMAGES, SOUNDS, VIDEOS, Medium
from tokenmerge.tools.processors import Processor, processor_of
from tokenmerge.tools.sounds import SoundAugmentation, Spectrogram
from tokenmerge.tools.train.options import TrainOptions
from tokenmerge.tools.transforms import clip_values, of_processor, of_timm
from tokenmerge.tools.videos import Clip, ClipAugmentation


def check_flags(args: TrainOptions, medium: Medium) -> None:
    """Raise `InputError` if a flag is given that does not apply to this medium."""
    for_images, for_sounds, for_both = (
        ("interpolation",),
        ("roll", "timem", "freqm"),
        ("aa", "reprob", "crop_pct", "mean", "std"),
    )
    misplaced: dict[str, dict[str, tuple[str, ...]]] = {
        IMAGES.name: {"sounds": for_sounds},
        SOUNDS.name: {"images": for_images, "images and videos": for_both},
        VIDEOS.name: {"images": for_images, "sounds": for_sounds},
    }
    for other, names in misplaced[medium.name].items():
        odd = next((name for name in names if getattr(args, name)), None)
        if odd is not None:
            raise InputError(
                f"--{odd.replace('_', '-')} is for {other}, but {str(args.data)!r} holds {medium.name}: leave it out"
            )


def make_transform(
    model: Any,
    args: TrainOptions,
    medium: Medium,
    training: bool,
    shape: tuple[int, ...],
    processor: Processor | None = None,
) -> Any:
    """Return the transform of a medium for the model, with augmentation in training.

    Args:
        model: the model.
        args: options of augmentation and preprocessing.
        medium: kind of the files.
        training: whether the transform is for training, and not for validation.
        shape: shape of one input.
        processor: the model's own processor, for a model of transformers.

    Raises:
        InputError: if timm refuses an option.
    """
    augments = training and not args.no_aug
    if processor is not None and not (training and medium is IMAGES) and not (augments and medium is VIDEOS):
        sounds = SoundAugmentation(args.roll, args.timem, args.freqm) if augments else None
        return of_processor(processor, shape, args.sampling_rate, sounds)
    if medium is IMAGES:
        return _image_transform(model, args, training, shape, processor)
    if medium is SOUNDS:
        return Spectrogram(shape, SoundAugmentation(args.roll, args.timem, args.freqm) if augments else None)
    return _clip_transform(model, args, augments, shape, processor)


def _clip_transform(
    model: Any, args: TrainOptions, augments: bool, shape: tuple[int, ...], processor: Processor | None
) -> Clip:
    """Return the transform of videos."""
    augmentation = ClipAugmentation(args.scale, args.ratio, args.hflip, args.reprob, args.aa) if augments else None
    if processor is not None:
        mean, std = processor.normalisation(shape)
        resizing = processor.interpolation
        return Clip(shape, args.sampling_rate, augmentation, mean=mean, std=std, interpolation=resizing)
    own = {name: getattr(args, name) for name in ("crop_pct", "mean", "std")}
    given = {name: value for name, value in own.items() if value is not None}
    return Clip(shape, args.sampling_rate, augmentation, **clip_values(model, given))


def processor_for(model: Any, args: TrainOptions) -> Processor | None:
    """Return the processor of a transformers model with the options of preprocessing; `None` for other models.

    Raises:
        InputError: if the model has trained weights, but no processor.
    """
    if origin_of(model) is None:
        return None
    own = {name: getattr(args, name) for name in ("crop_pct", "interpolation", "mean", "std")}
    return processor_of(model, {name: value for name, value in own.items() if value is not None})


def _image_transform(
    model: Any, args: TrainOptions, training: bool, shape: tuple[int, ...], processor: Processor | None
) -> Any:
    """Return timm's transform of images, with the normalization and interpolation of the model or its processor.

    Raises:
        InputError: if timm refuses an option.
    """
    if processor is None:
        own = {name: getattr(args, name) for name in ("crop_pct", "interpolation", "mean", "std")}
        config = preprocessing(model, {name: value for name, value in own.items() if value is not None})
    else:
        mean, std = processor.normalisation(shape)
        config = {"mean": mean, "std": std, "interpolation": processor.interpolation, "crop_pct": 1.0}
        shape = tuple(processor.probe(shape).shape)
    config["input_size"] = shape
    extra: dict[str, Any] = {}
    if training:
        extra = {"is_training": True, "no_aug": args.no_aug, "auto_augment": args.aa, "re_prob": args.reprob}
        extra |= {"hflip": args.hflip, "vflip": args.vflip, "color_jitter": args.color_jitter}
        extra |= {"scale": args.scale, "ratio": args.ratio, "interpolation": args.train_interpolation}
        extra |= {"train_crop_mode": args.train_crop_mode}
    flags = "--aa, --scale, --ratio, --reprob, --color-jitter, --train-interpolation and --interpolation"
    return of_timm({**config, **extra}, "augmentation", flags)
