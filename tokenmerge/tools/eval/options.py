"""Options of `tokenmerge eval`."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from tokenmerge.tools.common import (
    DataOptions,
    DeviceOptions,
    MergeOptions,
    PageOptions,
    TuneOptions,
    batch_size,
    sampling_rate,
)
from tokenmerge.tools.options import only_one, option
from tokenmerge.tools.videos import Views


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions(DeviceOptions, DataOptions, MergeOptions, TuneOptions, PageOptions):
    """Options of `tokenmerge eval`.

    Attributes:
        limit: number of files to use, evenly spaced in the data; `None` uses all.
        batch_size: images per forward pass.
        sampling_rate: stride between the sampled frames of a video.
        views: views of each video, crops in space × clips in time, whose predictions are averaged.
        labels: file with several labels for each file of `data`, in the form of AudioSet's segments, instead of class folders.
        crop_pct, crop_mode, interpolation, mean, std: preprocessing, by their names in timm; `None` is the model's own.
        strict: whether unreadable files make the exit code 1.

    Example:
        >>> from tokenmerge.tools.eval import EvalOptions
        >>> EvalOptions(model="vit_tiny_patch16_224", pretrained=True, data="imagenet/val", r=[0, 13]).r
        ('0', '13')
    """

    limit: int | None = option(
        None, "use only N files, evenly spaced in the data", "data", least=1, metavar="N", rare=True
    )
    batch_size: int = batch_size(64)
    labels: Path | None = option(
        None,
        "CSV of several labels per file; the measure is mAP",
        "data",
        metavar="FILE",
    )
    views: str = option(
        "1x1", "average each video over crops in space x clips in time, such as 3x7", "data", metavar="SxT", rare=True
    )
    strict: bool = option(False, "exit with 1 if any file could not be read", "measuring", rare=True)
    sampling_rate: int = sampling_rate()
    crop_pct: float | None = option(
        None,
        "side of the centre crop ÷ side of the image (default: the model's own)",
        "data",
        least=0.1,
        most=1,
        rare=True,
    )
    crop_mode: str | None = option(
        None, "crop mode (default: the model's own)", "data", choices=("squash", "border", "center"), rare=True
    )
    interpolation: str | None = option(
        None,
        "interpolation of resizing (default: the model's own)",
        "data",
        choices=("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
        rare=True,
    )
    mean: tuple[float, float, float] | None = option(
        None, "mean of each channel (default: the model's own)", "data", rare=True
    )
    std: tuple[float, float, float] | None = option(
        None, "standard deviation of each channel (default: the model's own)", "data", above=0, rare=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        only_one("labels", "dataset", self.labels is not None and self.dataset is not None)
        _ = self.averaged  # raises if they are not understood

    @functools.cached_property
    def averaged(self) -> Views:
        """The views of each video."""
        return Views.parse(self.views)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Overrides of the model's own preprocessing, by their names in timm's config."""
        names = ("crop_pct", "crop_mode", "interpolation", "mean", "std")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
