"""Options that several commands share: model, weights, device, data, merging, tuning and output."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenmerge.config import PRESETS, MergeConfig
from tokenmerge.errors import InputError
from tokenmerge.tools.building import MOST_CLASSES
from tokenmerge.tools.options import Options, option
from tokenmerge.tools.settings import Setting, merging_fields, parse_setting

R_HELP = "tokens merged per block, such as 0 8 16 speedup=2 found.json (default: as saved with the model)"
MODEL_HELP = "timm name, local-dir:FOLDER, hf_hub:ID, hf:FOLDER, hf:ID, hf:TYPE, torchvision:NAME, open_clip:NAME or video_mae:NAME"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Name and size of a model.

    Attributes:
        model: a timm name, `local-dir:FOLDER` (timm's hub format), `hf_hub:ID`, `hf:FOLDER`, `hf:ID` or `hf:TYPE`
            (transformers), `torchvision:NAME`, `torchvision:NAME:WEIGHTS`, `open_clip:NAME`, `open_clip:NAME:TAG`, or `video_mae:NAME` (this
            package's video model).
        num_classes: number of classes of the head; `None` keeps the model's own.
        img_size: side of the image in pixels; `None` keeps the model's own.
        model_kwargs: further arguments of the timm model, or config values of the transformers model, by name.
    """

    model: str = option(dataclasses.MISSING, MODEL_HELP, "model", metavar="MODEL", positional=True)
    num_classes: int | None = option(
        None, "classes of the head (default: the model's own)", "model", least=0, most=MOST_CLASSES, rare=True
    )
    img_size: int | None = option(
        None, "side of the image (default: the model's own)", "model", least=1, most=16_384, metavar="PIXELS"
    )
    model_kwargs: Mapping[str, Any] = option(
        {},
        "further arguments of the timm model, or config values of the transformers model",
        "model",
        metavar="NAME=VALUE",
        pairs=True,
        rare=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightOptions(ModelOptions):
    """Weights of a model.

    Attributes:
        pretrained: whether to load the pretrained weights of a name (may download); a folder always loads its weights.
        checkpoint: file of weights to load instead, without any download.
    """

    pretrained: bool = option(False, "load the weights of a name, which may download them", "model")
    checkpoint: Path | None = option(None, "file of weights to load instead", "model", metavar="FILE")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions(WeightOptions):
    """Device, dtype and memory format.

    Attributes:
        device: torch device.
        dtype: dtype of weights and inputs: "float32", "bfloat16" or "float16".
        channels_last: whether model and images are in the channels-last memory format.
    """

    device: str = option("cpu", "torch device, such as cuda", "model")
    dtype: str = option("float32", "dtype of the model", "model", choices=("float32", "bfloat16", "float16"))
    channels_last: bool = option(False, "use the channels-last memory format", "model", rare=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions(Options):
    """Merging, for commands that take several schedules.

    Attributes:
        r: schedules, such as 8 or "16:-1"; see `tokenmerge help settings`.
        prop_attn: proportional attention: "auto", "on" or "off"; `None` is as saved with the model, otherwise "auto".
        preset: name of a set of settings.
        matcher: name of a matching algorithm.
        set: other fields of `MergeConfig`, and arguments of the matcher, by name.
    """

    r: Sequence[str | int] = option((), R_HELP, "merging", metavar="R")
    prop_attn: str | None = option(
        None, "proportional attention (default: as saved, or auto)", "merging", choices=("auto", "on", "off")
    )
    preset: str | None = option(None, "named set of settings", "merging", choices=tuple(sorted(PRESETS)))
    matcher: str | None = option(
        None,
        "matching algorithm (bipartite)",
        "merging",
        metavar="NAME",
    )
    set: Mapping[str, Any] = option(
        {},
        "any other setting: see tokenmerge help settings",
        "merging",
        metavar="NAME=VALUE",
        pairs=True,
    )

    def schedules(self) -> list[Setting]:
        """Return the parsed entries of `r`.

        Raises:
            ConfigError: if one has none of the accepted forms.
        """
        return [parse_setting(str(text)) for text in self.r]

    def merging(self, saved: MergeConfig | None = None) -> dict[str, Any]:
        """Return the fields of `MergeConfig` other than the schedule, without those that were saved with the model.

        Args:
            saved: the settings that were saved with the model, which the fields must fit.

        Raises:
            ConfigError: if there is no such setting or matcher.
        """
        switch = None if self.prop_attn is None else {"auto": "auto", "on": True, "off": False}[self.prop_attn]
        texts = self.r if isinstance(self.r, tuple) else [] if self.r is None else [self.r]  # (train takes one)
        files = [setting.fields for text in texts if (setting := parse_setting(str(text))).of_file]
        base = {} if saved is None else saved.changed()
        bases = [*files, *([base] if len(files) < len(texts) or not texts else [])]
        return merging_fields(self.set, bases, prop_attn=switch, preset=self.preset, matcher=self.matcher)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Labelled data.

    Attributes:
        data: folder with one subfolder of images, sounds or videos per class; the root of `dataset` if one is named.
        dataset: data set that timm reads, such as "hfds/NAME", "hfids/NAME" (streaming), "wds/NAME" or "tfds/NAME".
        split: split of `dataset`.
        workers: processes that decode files; 0 decodes in the main process.
        class_map: text file of class names in the order of the model's outputs, one per line.

    Raises:
        InputError: if neither `data` nor `dataset` is given.
    """

    data: Path | None = option(
        None,
        "folder with one folder of files per class",
        "data",
        "--data",
        "--data-dir",
        metavar="DIR",
    )
    dataset: str | None = option(
        None,
        "data set of timm: hfds/, hfids/, wds/ or tfds/NAME",
        "data",
        metavar="NAME",
    )
    split: str = option("validation", "split of --dataset", "data", rare=True)
    workers: int = option(
        min(2, os.cpu_count() or 1), "processes that decode files", "data", "-j", least=0, most=512, metavar="N"
    )
    class_map: Path | None = option(
        None, "text file of class names in the order of the model's outputs", "data", metavar="FILE", rare=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None and self.dataset is None and self.needs_data():
            raise InputError("no data were given: give --data DIR, or --dataset NAME")

    def needs_data(self) -> bool:
        """Return whether data must be given."""
        return True

    @property
    def folder(self) -> Path:
        """The folder of class folders."""
        assert self.data is not None  # checked when the options were made
        return self.data

    @property
    def place(self) -> str:
        """The data, for messages."""
        return repr(str(self.data)) if self.dataset is None else f"--dataset {self.dataset}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneOptions(Options):
    """Tuning before a measurement.

    Attributes:
        tune: whether to choose form of attention and backend by measuring.
        tune_schedule: whether to choose where and whether to merge, too.
        tuning: file of the record: it is used if it exists, and written otherwise.
    """

    tune: bool = option(False, "first choose the fastest implementation here", "measuring")
    tune_schedule: bool = option(
        False,
        "also choose in which blocks to merge as many tokens, and not to where it does not pay",
        "measuring",
        rare=True,
    )
    tuning: Path | None = option(
        None, "record of the tuning: used if it exists, written otherwise", "measuring", metavar="FILE", rare=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOptions(Options):
    """Output of result rows.

    Attributes:
        json: file for the rows as a JSON list; "-" is standard output.
    """

    json: str | None = option(None, "write the rows as JSON; - is standard output", "output", metavar="FILE")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageOptions(RowOptions):
    """Output of result rows and of a page.

    Attributes:
        html: file for an HTML page with tables, figures and rows.
    """

    html: str | None = option(None, "write a page with tables and figures", "output", metavar="FILE")


def sampling_rate() -> Any:
    """Return the field of the stride between the sampled frames of a video."""
    return option(
        4, "stride between the sampled frames of a video", "data", least=1, most=10_000, metavar="N", rare=True
    )


def batch_size(default: int | None, help: str = "images per forward pass") -> Any:
    """Return the field of the number of images per forward pass."""
    return option(default, help, "measuring", "-b", least=1, metavar="N")
