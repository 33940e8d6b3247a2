"""Clips of video frames, the inputs of VideoMAE and similar models."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenmerge.errors import InputError, shown
from tokenmerge.tools.media import read_frames
from tokenmerge.tools.reading.recordings import OWN, Limits

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet, which VideoMAE, ViViT and V-JEPA 2 normalize with."""


_MOST_VIEWS = 1000


@dataclasses.dataclass(frozen=True)
class Views:
    """Views of each video in an evaluation, whose predictions are averaged.

    Attributes:
        crops: crops in space, along the longer side of the frames.
        clips: clips in time, from the first to the last that fits into the video.
    """

    crops: int = 1
    clips: int = 1

    @classmethod
    def parse(cls, text: str) -> Views:
        """Return the views that a text such as "3x7" spells: crops in space × clips in time.

        Raises:
            InputError: if it is no such text.
        """
        found = re.fullmatch(r"([1-9]\d{0,3})[x×]([1-9]\d{0,3})", text)
        views = cls(int(found[1]), int(found[2])) if found is not None else cls(0)
        if not 1 <= views.count <= _MOST_VIEWS:
            raise InputError(
                f"--views {shown(text):.40} was given, but CROPSxCLIPS with at most {_MOST_VIEWS} views was expected: try 3x7, three crops "
                "of seven clips"
            )
        return views

    @property
    def count(self) -> int:
        """Number of views of a video."""
        return self.crops * self.clips

    def __str__(self) -> str:
        return f"{self.crops}x{self.clips}"


ONE_VIEW = Views()


@dataclasses.dataclass(frozen=True)
class ClipAugmentation:
    """Random augmentation of clips, equal for all frames of a clip.

    Attributes:
        scale, ratio: area and aspect ratio of random crops.
        hflip: probability of a horizontal flip.
        reprob: probability of random erasing.
        policy: policy of automatic augmentation in timm's words, such as "rand-m9-mstd0.5-inc1"; `None` for none.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    reprob: float = 0.0
    policy: str | None = None


class Policy:
    """Automatic augmentation of timm with the same operations and magnitudes for all frames of a clip.

    Args:
        policy: policy in timm's words.
        size: height and width of the frames.
        mean: mean of each channel, which fills what an operation uncovers.
        interpolation: interpolation of geometric operations.

    Raises:
        InputError: if timm does not know the policy.
    """

    def __init__(self, policy: str, size: tuple[int, int], mean: Sequence[float], interpolation: str) -> None:
        from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
        from timm.data.transforms import str_to_pil_interp

        values = {
            "translate_const": int(min(size) * 0.45),  # as in timm's own transform of images
            "img_mean": tuple(min(255, round(255 * level)) for level in mean),
            "interpolation": str_to_pil_interp(interpolation),
        }
        make = rand_augment_transform if policy.startswith("rand") else auto_augment_transform
        try:
            self.operations: Any = make(policy, values)
        except Exception:  # an unknown policy fails in several ways
            raise InputError(
                f"--aa {shown(policy)} was given, which timm does not know: give one such as rand-m9-mstd0.5-inc1"
            ) from None

    def __call__(self, frames: Tensor) -> Tensor:
        """Return frames `[T, 3, H, W]` uint8, changed alike."""
        from PIL import Image

        key = int(torch.randint(2**31, ()))
        changed = []
        for frame in frames.permute(0, 2, 3, 1).numpy():
            random.seed(key)  # timm draws the operations with NumPy, and their magnitudes with Python's generator
            np.random.seed(key)
            changed.append(torch.from_numpy(np.array(self.operations(Image.fromarray(frame)))))
        return torch.stack(changed).permute(0, 3, 1, 2)


class Clip:
    """Transform from a video file to frames, from the middle or, in training, from a random start.

    Args:
        shape: `(frames, 3, H, W)` of the model's input.
        sampling_rate: stride between the sampled frames; frames of a shorter video are sampled evenly.
        augmentation: augmentation for training; `None` crops the centre of each frame.
        crop_pct: fraction of the shorter side that the centre crop keeps.
        mean, std: normalization of each channel.
        processor: function from frames `[frames, H, W, 3]` uint8 to the clip, instead of the centre crop and normalization here.
        interpolation: interpolation of resizing in training.
        limits: limits of the files.
        views: views of a video in evaluation; a processor makes no more than one crop of each clip.

    Attributes:
        stride: frames of the latest video between two frames of its clip.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        sampling_rate: int = 4,
        augmentation: ClipAugmentation | None = None,
        crop_pct: float = 1.0,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        processor: Callable[[Any], Tensor] | None = None,
        interpolation: str = "bilinear",
        limits: Limits = OWN,
        views: Views = ONE_VIEW,
    ) -> None:
        from torchvision.transforms import InterpolationMode, v2

        self.processor = processor if augmentation is None and views.crops == 1 else None
        self.limits, self.stride, self.views = limits, float(sampling_rate), views
        resizing = {"interpolation": InterpolationMode(interpolation), "antialias": True}
        self.frames, _, height, width = shape
        self.sampling_rate, self.training = sampling_rate, augmentation is not None
        steps: list[Any] = []
        if augmentation is None:
            bigger = [round(side / crop_pct) for side in (height, width)]
            steps += [v2.Resize(max(bigger), **resizing), Crops((height, width), views.crops)]
        else:
            steps += [v2.RandomResizedCrop((height, width), augmentation.scale, augmentation.ratio, **resizing)]
            steps += [v2.RandomHorizontalFlip(augmentation.hflip)]
            if augmentation.policy is not None:
                steps += [Policy(augmentation.policy, (height, width), mean, interpolation)]
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
        if augmentation is not None and augmentation.reprob:
            steps += [v2.RandomErasing(augmentation.reprob)]
        self.transform = v2.Compose(steps)

    def __call__(self, path: Path) -> Tensor:
        """Return the clip `[frames, 3, H, W]` float32; of several views `[clips·crops, frames, 3, H, W]`, clip by clip.

        Raises:
            DamagedFileError: if the file cannot be decoded.
        """
        decoded = read_frames(path, self._choose, self.limits)
        clips = [self._views(part) for part in np.split(decoded, self.views.clips)]
        return clips[0][0] if self.views.count == 1 else torch.cat(clips)

    def _views(self, decoded: np.ndarray[Any, Any]) -> Tensor:
        """Return the crops `[crops, frames, 3, H, W]` of a clip `[frames, H, W, 3]`."""
        if self.processor is not None:
            return self.processor(decoded)[None]
        changed: Tensor = self.transform(torch.from_numpy(decoded).permute(0, 3, 1, 2))
        crops: Tensor = changed.unflatten(0, (-1, self.frames))
        return crops

    def _choose(self, total: int) -> list[int]:
        span = (self.frames - 1) * self.sampling_rate + 1
        self.stride = float(self.sampling_rate) if total >= span else total / self.frames
        if total < span:
            return [step * total // self.frames for step in range(self.frames)] * self.views.clips
        surplus, clips = total - span, self.views.clips
        starts = evenly(surplus, clips)
        if self.training:
            starts = [int(torch.randint(surplus + 1, ())) for _ in range(clips)]
        return [start + step * self.sampling_rate for start in starts for step in range(self.frames)]


def evenly(surplus: int, count: int) -> list[int]:
    """Return `count` places from 0 to `surplus`, evenly spaced and with both ends; of one the middle."""
    return [surplus // 2] if count == 1 else [round(surplus * place / (count - 1)) for place in range(count)]


class Crops:
    """Crops of frames, evenly spaced along the side that is longer than the crop; of one the centre.

    Args:
        size: height and width of a crop in pixels, at most those of the frames.
        count: number of crops.
    """

    def __init__(self, size: tuple[int, int], count: int) -> None:
        self.size, self.count = size, count

    def __call__(self, frames: Tensor) -> Tensor:
        """Return `[count·T, C, h, w]`, crop by crop, from frames `[T, C, H, W]`."""
        height, width = self.size
        down, right = frames.shape[-2] - height, frames.shape[-1] - width
        rows, columns = (
            [round(surplus / 2)] * self.count for surplus in (down, right)
        )  # (the centre, as torchvision's)
        if self.count > 1 and down > right:
            rows = evenly(down, self.count)
        elif self.count > 1:
            columns = evenly(right, self.count)
        parts = zip(rows, columns, strict=True)
        return torch.cat([frames[..., row : row + height, column : column + width] for row, column in parts])
