"""Training of one line of a comparison, with the loop, the recipes and the options of `tokenmerge train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import tokenmerge
from tokenmerge.errors import InputError, nearest
from tokenmerge.tools.device import DTYPES
from tokenmerge.tools.options import value_of
from tokenmerge.tools.reading.documents import read_yaml
from tokenmerge.tools.report import Report
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.train.main import run as train
from tokenmerge.tools.train.options import TrainOptions, recipes

RECIPE = "laptop"
"""Recipe of the trained lines: an epoch of fine-tuning."""
_SET_HERE = frozenset(
    {
        "model",
        "data",
        "dataset",
        "train_split",
        "val_split",
        "output",
        "resume",
        "r",
        "matcher",
        "prop_attn",
        "set",
        "json",
    }
)
"""Options of `train` that the comparison sets itself."""


def training_options(options: Any, folder: Path, setting: Setting, fields: Mapping[str, Any]) -> TrainOptions:
    """Return the options of `tokenmerge train` for one line.

    Args:
        options: options of `compare`: the model, `train` (the folder of training images) and `train_set`.
        folder: folder of the run.
        setting: schedule of the line.
        fields: fields of `MergeConfig` of the line: `matcher`, `place` and `prop_attn`.

    Raises:
        InputError: if `train_set` names no option of `train`, or one that the comparison sets itself.
    """
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in read_yaml(recipes()[RECIPE], "the recipe").items()
        if name != "r"
    }
    known = {field.name for field in dataclasses.fields(TrainOptions)} - _SET_HERE
    for name, value in options.train_set.items():
        field = name.replace("-", "_")
        if field not in known:
            near = nearest(field, sorted(known))
            hint = f"did you mean {near}?" if near and near != field else "see tokenmerge train --help"
            raise InputError(
                f"--train-set {name} was given, but an option of tokenmerge train that the comparison does not set itself was "
                f"expected: {hint}"
            )
        given[field] = value_of(field, value) if isinstance(value, str) else value
    root = Path(options.train)
    rest = dict(fields)
    matcher, prop_attn = rest.pop("matcher", "bipartite"), rest.pop("prop_attn", True)
    return TrainOptions(
        **given,
        model=options.model,
        pretrained=options.pretrained,
        checkpoint=options.checkpoint,
        num_classes=options.num_classes,
        img_size=options.img_size,
        model_kwargs=options.model_kwargs,
        data=root.resolve().parent,
        train_split=root.resolve().name,
        val_split="",
        r=str(setting.label),
        matcher=matcher,
        prop_attn="on" if prop_attn else "off",
        set=rest,
        output=folder,
        resume="auto",
    )


class _Quiet(Report):
    """Receiver of a training's messages that shows progress and warnings alone; the run's log has all lines."""

    def say(self, text: str, style: str | None = None, whole: bool = False) -> None:
        """Log one line."""
        self._log(text)


def trained_model(training: TrainOptions, options: Any) -> Any:
    """Train a line, or go on with its run, and return the trained model, patched, in evaluation mode on its device.

    Args:
        training: options of the run.
        options: options of `compare`: device, dtype and memory format.
    """
    train(training, _Quiet(writes=True))
    model: Any = tokenmerge.load(training.output / "model")
    memory = {"memory_format": torch.channels_last} if options.channels_last else {}
    return model.to(device=options.device, dtype=DTYPES[options.dtype], **memory).eval()
