"""Transforms from decoded files to model inputs, with augmentation in training."""

from __future__ import annotations

from typing import Any

from PIL import Image

from tokenmerge.errors import InputError
from tokenmerge.tools.media import IMAGES, SOUNDS, VIDEOS, Medium
from tokenmerge.tools.sounds import SoundAugmentation, Spectrogram
from tokenmerge.tools.train.args import TrainArgs
from tokenmerge.tools.videos import MEAN, STD, Clip, ClipAugmentation


def check_flags(args: TrainArgs, medium: Medium) -> None:
    """Raise `InputError` if a flag is given that does not apply to this medium."""
    for_images, for_sounds, for_both = (
        ("aa", "interpolation"),
        ("roll", "timem", "freqm"),
        ("reprob", "crop_pct", "mean", "std"),
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


def make_transform(model: Any, args: TrainArgs, medium: Medium, training: bool, shape: tuple[int, ...]) -> Any:
    """Return the transform of a medium for the model.

    Raises:
        InputError: if timm refuses an option.
    """
    if medium is IMAGES:
        return _image_transform(model, args, training, shape)
    return (_sound_transform if medium is SOUNDS else _clip_transform)(args, training, shape)


def _sound_transform(args: TrainArgs, training: bool, shape: tuple[int, ...]) -> Spectrogram:
    """Return the transform of sounds, with augmentation in training."""
    if not training or args.no_aug:
        return Spectrogram(shape)
    return Spectrogram(shape, SoundAugmentation(args.roll, args.timem, args.freqm))


def _clip_transform(args: TrainArgs, training: bool, shape: tuple[int, ...]) -> Clip:
    """Return the transform of videos, with augmentation in training."""
    augmentation = ClipAugmentation(args.scale, args.ratio, args.hflip, args.reprob) if training else None
    if args.no_aug:
        augmentation = None
    return Clip(shape, args.sampling_rate, augmentation, args.crop_pct or 1.0, args.mean or MEAN, args.std or STD)


def _image_transform(model: Any, args: TrainArgs, training: bool, shape: tuple[int, ...]) -> Any:
    """Return timm's transform of images for the model.

    Raises:
        InputError: if timm refuses an option.
    """
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    config = resolve_data_config({}, model=model)
    config["input_size"] = shape
    extra: dict[str, Any] = {}
    if training:
        extra = {"is_training": True, "no_aug": args.no_aug, "auto_augment": args.aa, "re_prob": args.reprob}
        extra |= {"hflip": args.hflip, "vflip": args.vflip, "color_jitter": args.color_jitter}
        extra |= {"scale": args.scale, "ratio": args.ratio, "interpolation": args.train_interpolation}
        extra |= {"train_crop_mode": args.train_crop_mode}
    try:
        transform = create_transform(**{**config, **extra})
        transform(Image.new("RGB", (shape[2], shape[1])))
    except Exception as error:  # timm and torchvision raise many exception types for invalid values
        raise InputError(
            f"the augmentation does not work ({type(error).__name__}: {error}): check --aa, --scale, --ratio, --reprob, "
            "--color-jitter, --train-interpolation and --interpolation"
        ) from None
    return transform
