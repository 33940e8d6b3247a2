"""Saving of the trained model in the format of its own library, with its merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokenmerge import files
from tokenmerge.config import MergeConfig
from tokenmerge.patching.kept import KEY, SETTINGS, lasting
from tokenmerge.saving import WEIGHTS, write_model
from tokenmerge.tools.inputs import preprocessing
from tokenmerge.tools.models import TORCHVISION
from tokenmerge.tools.processors import quiet
from tokenmerge.tools.train.data import AnyImages
from tokenmerge.tools.train.merging import setting_at
from tokenmerge.tools.train.options import TrainOptions
from tokenmerge.tools.train.transforms import processor_for

_OF_TRAINING = ("drop_rate", "drop_path_rate")
"""Arguments of a model that belong to its training, and not to its architecture."""


def publish(model: nn.Module, state: dict[str, Tensor], args: TrainOptions, images: AnyImages, folder: Path) -> None:
    """Write the model, its weights and its merging, as `tokenmerge.save` does; all files appear at once.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` or `from_pretrained` loads it without this library, unmerged.

    Raises:
        InputError: if a file cannot be written; the folder then keeps what it held.
    """
    config = merging_of_run(args)
    if hasattr(model, "weights"):
        _publish_torchvision(model, state, args, config, images, folder)
        return
    processor = processor_for(model, args) if hasattr(model, "save_pretrained") else None
    with quiet():
        write_model(
            model,
            state,
            config,
            folder,
            model_args=_source_args(args),
            without=_OF_TRAINING,
            label_names=images.names,
            more=lambda beside: None if processor is None else processor.save(beside),
        )


def merging_of_run(args: TrainOptions) -> MergeConfig:
    """Return the merging at the end of a run, as it is saved with the model."""
    return lasting(setting_at(args, args.epochs - 1).config(**args.merging()))


def how_to_load(model: Any, args: TrainOptions, folder: Path) -> list[str]:
    """Return the arguments of a command that load the published model."""
    if hasattr(model, "save_pretrained"):
        return [f"hf:{folder}"]
    if hasattr(model, "weights"):
        size = [] if args.img_size is None else ["--img-size", str(args.img_size)]
        weights = ["--checkpoint", str(folder / WEIGHTS), "--num-classes", str(model.num_classes)]
        return [_without_tag(args.model), *weights, *size]
    return [f"local-dir:{folder}"]


def _without_tag(model: str) -> str:
    return ":".join(model.split(":")[:2])


def _publish_torchvision(
    model: Any,
    state: dict[str, Tensor],
    args: TrainOptions,
    config: MergeConfig,
    images: AnyImages,
    folder: Path,
) -> None:
    """Write the weights, and the model's name, classes and preprocessing, which torchvision itself has no format for."""
    from safetensors.torch import save

    own = {name: getattr(args, name) for name in ("crop_pct", "interpolation", "mean", "std")}
    used = preprocessing(model, {name: value for name, value in own.items() if value is not None})
    about = {"name": _without_tag(args.model), "image_size": model.image_size, "classes": images.names}
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    files.make_folder(folder, "the model")
    files.write(folder / WEIGHTS, save(contiguous, {"format": "pt", KEY: config.to_json()}), "the weights")
    files.write_json(folder / SETTINGS, json.loads(config.to_json()), "the settings")
    files.write_json(folder / TORCHVISION, {**about, "preprocessing": used}, "the config")


def _source_args(args: TrainOptions) -> dict[str, Any]:
    """Return the keyword arguments that the model was created with, also those in the folder that it came from."""
    given = {**args.model_kwargs, **({} if args.img_size is None else {"img_size": args.img_size})}
    kind, _, place = args.model.partition(":")
    if kind == "local-dir":
        config = files.read_json(Path(place, "config.json"), "the model's config", finite=False)
        return {**config.get("model_args", {}), **given}
    if kind in ("hf_hub", "hf-hub"):
        from timm.models import load_model_config_from_hf

        return {**(load_model_config_from_hf(place)[2] or {}), **given}
    return given
