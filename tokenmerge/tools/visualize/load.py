"""Loading of files as model inputs and as pixels to draw."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenmerge.errors import DamagedFileError, InputError
from tokenmerge.tools.hf import origin_of
from tokenmerge.tools.inputs import preprocessing
from tokenmerge.tools.media import IMAGES, SAMPLE_RATE, SOUNDS, VIDEOS, Medium, frame_rate, read_sound
from tokenmerge.tools.models import input_shape
from tokenmerge.tools.pages import printable
from tokenmerge.tools.processors import Processor, lacks_processor, processor_of
from tokenmerge.tools.reading.pictures import read_picture
from tokenmerge.tools.reading.recordings import OWN, Limits
from tokenmerge.tools.sounds import Spectrogram
from tokenmerge.tools.transforms import clip_values, image_transform, of_processor
from tokenmerge.tools.videos import Clip
from tokenmerge.tools.zero_shot import clip_transform
from tokenmerge.tracing.paint import table
from tokenmerge.tracing.trace import Trace

FRAMES_PER_SECOND = 100
"""Frames of a spectrogram per second, in all models of sounds that are known."""
_HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True, eq=False)
class Shown:
    """One input.

    Attributes:
        name: name of the file without its folder.
        medium: images, sounds or videos.
        batch: model input, `[1, …]`.
        pixels: the same input to draw, float32 in [0, 1]: `[3, H, W]`, for videos `[3, T, H, W]`, for sounds
            `[3, bands, frames]` with the lowest band first.
        rate: frames per second of videos.
        bands: centre frequency of each band of sounds in Hz.
        heard: frames of a spectrogram that hold sound; the model sees padding after them.
        samples: samples of a sound in [−1, 1], at most as many as the model hears, and their number per second.
    """

    name: str
    medium: Medium
    batch: Tensor
    pixels: Tensor
    rate: float = 8.0
    bands: tuple[float, ...] = ()
    heard: int = 0
    samples: tuple[Any, int] | None = None

    def regions(self, trace: Trace, block: int | None) -> Tensor:
        """Return the token of every pixel after a block."""
        shape: Sequence[int] = self.pixels.shape[1:]
        if self.medium is SOUNDS and len(trace.known_grid) == 1:  # Whisper's positions are moments of all bands
            return trace.regions((shape[1],), block).expand(tuple(shape))
        if self.medium is SOUNDS and self.batch.dim() == 4:  # time is the first axis of timm's spectrograms
            return trace.regions((shape[1], shape[0]), block).T
        return trace.regions(shape, block)


def medium_of_file(path: Path) -> Medium:
    """Return the medium of a file by its suffix; images for unknown suffixes."""
    suffix = path.suffix.lower()
    return next((one for one in (SOUNDS, VIDEOS) if suffix in (one.suffixes or ())), IMAGES)


class Loader:
    """Loader of inputs for one model, with the preprocessing of its evaluation.

    Args:
        model: any supported model.
        sampling_rate: stride between the sampled frames of a video.
        limits: limits of sounds and videos.

    Raises:
        InputError: if the model takes several inputs.
    """

    def __init__(self, model: Any, sampling_rate: int = 4, limits: Limits = OWN) -> None:
        self.shape = input_shape(model)
        channels = self.shape[-3] if len(self.shape) > 2 else 1
        if channels not in (1, 3):
            raise InputError(f"the model takes {channels} channels, but pictures have three: it cannot be looked at so")
        self.sampling_rate, self._limits = sampling_rate, limits
        self._model = model
        self._processor = None if origin_of(model) is None else processor_of(model)
        self.note = _note(model)
        """Sentence to warn with, if the preprocessing is a guess; otherwise empty."""
        of_pixels = self.medium is not SOUNDS
        self.mean, self.std = _normalisation(model, self._processor, self.shape) if of_pixels else (_HALF, _HALF)
        first = next(model.parameters())
        self._place = {"device": first.device, "dtype": first.dtype}

    @property
    def medium(self) -> Medium:
        """Medium of the model's inputs."""
        if len(self.shape) == 4:
            return VIDEOS
        return SOUNDS if len(self.shape) == 2 or self.shape[0] == 1 else IMAGES

    def __call__(self, path: Path) -> Shown:
        """Read one file.

        Raises:
            InputError: if it is missing, damaged, or of another medium than the model takes.
        """
        found = medium_of_file(path)
        if not os.path.isfile(path):
            raise InputError(f"{str(path)!r} is not a file, but {self.medium.name} were expected: check the path")
        if self.medium is not IMAGES and path.suffix.lower() not in (
            *(SOUNDS.suffixes or ()),
            *(VIDEOS.suffixes or ()),
        ):
            known = ", ".join(self.medium.suffixes or ())
            raise InputError(f"{str(path)!r} is none of the {self.medium.name} that the model takes: give {known}")
        if found is not self.medium:
            raise InputError(f"{str(path)!r} holds {found.name}, but the model takes {self.medium.name}: give it those")
        try:
            if found is VIDEOS:
                return self._video(path)
            if found is SOUNDS:
                return self._sound(path)
            return self.image(read_picture(path, upright=True), printable(path.name))
        except DamagedFileError as error:
            raise InputError(
                f"{str(path)!r} cannot be read ({error.reason}): give a whole file of {found.name}"
            ) from None

    def image(self, image: Image.Image, name: str) -> Shown:
        """Preprocess an upright RGB picture."""
        tensor: Tensor = self._image_transform(image)
        return Shown(name, IMAGES, self._batch(tensor), self._pixels(tensor))

    @functools.cached_property
    def _image_transform(self) -> Any:
        if self._processor is not None:
            return self._processor
        if hasattr(self._model, "preprocess_cfg"):  # an image tower of open_clip
            return clip_transform(self._model, {})
        return image_transform(self._model, {})

    def _video(self, path: Path) -> Shown:
        own = {} if self._processor is not None else clip_values(self._model, {})
        read = Clip(self.shape, self.sampling_rate, processor=self._processor, limits=self._limits, **own)
        clip = read(path)
        rate = frame_rate(path) / read.stride
        return Shown(printable(path.name), VIDEOS, self._batch(clip), self._pixels(clip.transpose(0, 1)), rate)

    def _sound(self, path: Path) -> Shown:
        rate = SAMPLE_RATE if self._processor is None else self._processor.rate
        samples = read_sound(path, rate, self._limits)
        if self._processor is None:
            made = spectrum = Spectrogram((1, *self.shape[-2:]))(samples)[0]
        else:
            transform = of_processor(self._processor, self.shape, self.sampling_rate)
            made = transform(samples)
            spectrum = made if transform.time_axis == 0 else made.T
        by_whisper = self._processor is not None and not hasattr(self._processor.inner, "max_length")
        # Whisper pads the ends of a sound to frames of their own; Kaldi's frames of 25 ms lie within the sound
        inner = 0 if by_whisper else rate * 25 // 1000 - rate // FRAMES_PER_SECOND
        heard = min(len(spectrum), max(1, (len(samples) - inner) * FRAMES_PER_SECOND // rate))
        low, high = spectrum[:heard].min(), spectrum[:heard].max()  # padding must not take part of the scale
        level = ((spectrum - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
        pixels = table("viridis")[(level.T * 255).round().long()].permute(2, 0, 1)
        batch = self._batch(made if len(self.shape) == 2 else made[None])
        bands = slaney_bands(spectrum.shape[1]) if by_whisper else mel_bands(spectrum.shape[1])
        played = (samples[: heard * rate // FRAMES_PER_SECOND], rate)
        return Shown(printable(path.name), SOUNDS, batch, pixels, bands=tuple(bands), heard=heard, samples=played)

    def _batch(self, tensor: Tensor) -> Tensor:
        return tensor[None].to(**self._place)

    def _pixels(self, tensor: Tensor) -> Tensor:
        shape = (3, *(1,) * (tensor.dim() - 1))
        return (tensor * torch.tensor(self.std).view(shape) + torch.tensor(self.mean).view(shape)).clamp(0, 1)


def _normalisation(
    model: Any, processor: Processor | None, shape: tuple[int, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of the model's normalization."""
    if processor is not None:
        return processor.normalisation(shape)
    if getattr(model, "image_mean", None) is not None:  # an image tower of open_clip
        return tuple(model.image_mean), tuple(model.image_std)
    config = preprocessing(model, {})
    return tuple(config["mean"]), tuple(config["std"])


def _note(model: Any) -> str:
    if not lacks_processor(model):
        return ""
    return (
        f"{type(model).__name__} came without preprocessor_config.json, so its inputs are made by the default of its type: put the "
        "model's own file beside its weights"
    )


def slaney_bands(count: int) -> list[float]:
    """Return the centre frequencies in Hz of the `count` bands of Whisper's log-mel spectrum (Slaney's scale) up to 8,000 Hz."""
    audio = importlib.import_module("transformers.audio_utils")
    highest = audio.hertz_to_mel(8000.0, mel_scale="slaney")
    return [float(audio.mel_to_hertz(highest * (i + 1) / (count + 1), mel_scale="slaney")) for i in range(count)]


def mel_bands(count: int) -> list[float]:
    """Return the centre frequencies in Hz of the `count` bands of Kaldi's log-mel spectrum from 20 to 8,000 Hz."""
    low, high = (1127 * math.log1p(hertz / 700) for hertz in (20, 8000))
    return [700 * math.expm1((low + (high - low) * (i + 1) / (count + 1)) / 1127) for i in range(count)]
