"""Loading of files as model inputs and as pixels to draw."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from tokenmerge.errors import InputError, TokenMergeError
from tokenmerge.tools.inputs import preprocessing
from tokenmerge.tools.media import IMAGES, SOUNDS, VIDEOS, Medium, frame_rate, read_sound
from tokenmerge.tools.models import input_shape
from tokenmerge.tools.pages import printable
from tokenmerge.tools.sounds import Spectrogram
from tokenmerge.tools.videos import Clip
from tokenmerge.tracing.paint import table
from tokenmerge.tracing.trace import Trace

_HALF = (0.5, 0.5, 0.5)
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


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
    """

    name: str
    medium: Medium
    batch: Tensor
    pixels: Tensor
    rate: float = 8.0

    def regions(self, trace: Trace, block: int | None) -> Tensor:
        """Return the token of every pixel after a block."""
        shape: Sequence[int] = self.pixels.shape[1:]
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

    Raises:
        InputError: if the model takes several inputs.
    """

    def __init__(self, model: Any, sampling_rate: int = 4) -> None:
        self.shape = input_shape(model)
        channels = self.shape[-3] if len(self.shape) > 2 else 1
        if channels not in (1, 3):
            raise InputError(f"the model takes {channels} channels, but pictures have three: it cannot be looked at so")
        self.sampling_rate = sampling_rate
        self.mean, self.std = _normalisation(model)
        self._model = model
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
        if not path.is_file():
            raise InputError(f"{str(path)!r} is not a file, but {self.medium.name} were expected: check the path")
        if found is not self.medium:
            raise InputError(f"{str(path)!r} holds {found.name}, but the model takes {self.medium.name}: give it those")
        try:
            if found is VIDEOS:
                return self._video(path)
            if found is SOUNDS:
                return self._sound(path)
            with Image.open(path) as image:
                return self.image(image, printable(path.name))
        except TokenMergeError:
            raise
        except Exception as error:  # every decoder raises its own exception types
            reason = str(error) or type(error).__name__
            raise InputError(f"{str(path)!r} cannot be read ({reason}): give a whole file of {found.name}") from None

    def image(self, image: Image.Image, name: str) -> Shown:
        """Preprocess an opened picture, rotated by its EXIF orientation."""
        colour: Image.Image = (ImageOps.exif_transpose(image) or image).convert("RGB")
        tensor: Tensor = self._image_transform(colour)
        return Shown(name, IMAGES, self._batch(tensor), self._pixels(tensor))

    @functools.cached_property
    def _image_transform(self) -> Any:
        if hasattr(self._model, "pretrained_cfg") or hasattr(self._model, "weights"):
            from timm.data.transforms_factory import create_transform

            config = preprocessing(self._model, {}) | {"input_size": self.shape}
            return create_transform(**config, is_training=False)
        from torchvision.transforms import v2

        _, height, width = self.shape
        return v2.Compose(
            [
                v2.Resize(max(height, width), antialias=True),
                v2.CenterCrop((height, width)),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(self.mean), list(self.std)),
            ]
        )

    def _video(self, path: Path) -> Shown:
        clip = Clip(self.shape, self.sampling_rate, mean=self.mean, std=self.std)(path)
        rate = frame_rate(path) / self.sampling_rate
        return Shown(printable(path.name), VIDEOS, self._batch(clip), self._pixels(clip.transpose(0, 1)), rate)

    def _sound(self, path: Path) -> Shown:
        frames, bands = self.shape[-2:]
        spectrum = Spectrogram((1, frames, bands))(read_sound(path))[0]
        level = (spectrum - spectrum.min()) / (spectrum.max() - spectrum.min()).clamp_min(1e-6)
        pixels = table("viridis")[(level.T * 255).round().long()].permute(2, 0, 1)
        return Shown(
            printable(path.name), SOUNDS, self._batch(spectrum if len(self.shape) == 2 else spectrum[None]), pixels
        )

    def _batch(self, tensor: Tensor) -> Tensor:
        return tensor[None].to(**self._place)

    def _pixels(self, tensor: Tensor) -> Tensor:
        shape = (3, *(1,) * (tensor.dim() - 1))
        return (tensor * torch.tensor(self.std).view(shape) + torch.tensor(self.mean).view(shape)).clamp(0, 1)


def _normalisation(model: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of the model's normalization."""
    if hasattr(model, "pretrained_cfg") or hasattr(model, "weights"):
        config = preprocessing(model, {})
        return tuple(config["mean"]), tuple(config["std"])
    tower = getattr(model, "visual", model)
    if hasattr(tower, "image_mean") and tower.image_mean is not None:  # an open_clip model
        return tuple(tower.image_mean), tuple(tower.image_std)
    return _of_transformers(model) or (_IMAGENET if len(input_shape(model)) == 4 else (_HALF, _HALF))


def _of_transformers(model: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the normalization in the image processor's config of the weights, or the usual one of the model type."""
    config = getattr(model, "config", None)
    file = Path(str(getattr(config, "_name_or_path", "")), "preprocessor_config.json")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return tuple(found["image_mean"]), tuple(found["image_std"])
    except (OSError, ValueError, KeyError, TypeError):
        kind = str(getattr(config, "model_type", ""))
    if "clip" in kind or kind.startswith(("llava", "blip")):
        return _CLIP
    return _IMAGENET if kind.startswith(("dino", "deit", "ijepa", "vit_msn")) else None


def mel_bands(count: int) -> list[float]:
    """Return the centre frequencies in Hz of the `count` bands of Kaldi's log-mel spectrum from 20 to 8,000 Hz."""
    low, high = (1127 * math.log1p(hertz / 700) for hertz in (20, 8000))
    return [700 * math.expm1((low + (high - low) * (i + 1) / (count + 1)) / 1127) for i in range(count)]
