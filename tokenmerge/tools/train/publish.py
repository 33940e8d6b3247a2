"""Saving of the trained model in timm's hub format or transformers' format, with its merge settings."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import tokenmerge
from tokenmerge.matching import get_entry
from tokenmerge.patching.predictors import FILE as PREDICTORS
from tokenmerge.patching.predictors import split_state
from tokenmerge.tools.folders import ClassFolder
from tokenmerge.tools.models import ModelArgs, input_shape
from tokenmerge.tools.train.args import TrainArgs
from tokenmerge.tools.train.checkpoints import write_atomically
from tokenmerge.tools.trained import KEY, LEARNED

_ORIGIN = (
    "tag",
    "hf_hub_id",
    "url",
    "file",
    "source",
    "custom_load",
    "license",
    "paper_ids",
    "paper_name",
    "origin_url",
)


def publish(
    model: nn.Module, state: dict[str, Tensor], base: ModelArgs, args: TrainArgs, images: ClassFolder, folder: Path
) -> None:
    """Write `config.json` and `model.safetensors`, each atomically, in the format of the model's own library.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads a timm model without this library. The commands read from
    the config whether to use proportional attention.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "version": tokenmerge.__version__,
        "r": args.setting.label,
        "prop_attn": args.merging["prop_attn"],
    }
    if get_entry(str(args.merging.get("matcher", "bipartite"))).learned:  # its predictors work only with this matcher
        about |= {name: args.merging[name] for name in LEARNED if name in args.merging}
    state, predictors = split_state(model, {name: tensor.contiguous() for name, tensor in state.items()})
    if predictors:  # in a separate file, because the model's own library does not know them
        (folder / PREDICTORS).parent.mkdir(exist_ok=True)
        save_file(predictors, folder / PREDICTORS)
    if hasattr(model, "save_pretrained"):
        _publish_transformers(model, state, images, folder, about)
        return
    beside = folder / ".model.safetensors.new"
    save_file(state, beside, metadata={"format": "pt", KEY: json.dumps(about)})
    os.replace(beside, folder / "model.safetensors")
    config = {**_source(base), "num_classes": images.num_classes, "num_features": getattr(model, "num_features", None)}
    pretrained = {name: value for name, value in _pretrained(model).items() if name not in _ORIGIN}
    pretrained |= {"num_classes": images.num_classes, "input_size": list(input_shape(model))}
    config |= {"label_names": images.names, "pretrained_cfg": pretrained, KEY: about}
    write_atomically(folder / "config.json", json.dumps(config, indent=2, default=list) + "\n")


def _publish_transformers(
    model: Any, state: dict[str, Tensor], images: ClassFolder, folder: Path, about: dict[str, Any]
) -> None:
    """Write the files that `from_pretrained` reads."""
    model.config.id2label = dict(enumerate(images.names))
    model.config.label2id = {name: index for index, name in enumerate(images.names)}
    beside = folder / ".new"
    model.save_pretrained(beside, state_dict=state)
    config = json.loads((beside / "config.json").read_text(encoding="utf-8"))
    (beside / "config.json").write_text(json.dumps({**config, KEY: about}, indent=2) + "\n", encoding="utf-8")
    for path in sorted(beside.iterdir(), reverse=True):  # move the weights before the config
        os.replace(path, folder / path.name)
    beside.rmdir()


def _source(base: ModelArgs) -> dict[str, Any]:
    """Return the architecture and arguments that the model was created with."""
    # dropout belongs to the training, not to the architecture
    arguments = {
        name: value for name, value in base.model_kwargs.items() if name not in ("drop_rate", "drop_path_rate")
    }
    if base.img_size is not None:
        arguments["img_size"] = base.img_size
    kind, _, place = base.model.partition(":")
    if kind == "local-dir":
        config = json.loads(Path(place, "config.json").read_text(encoding="utf-8"))
    elif kind in ("hf_hub", "hf-hub"):
        from timm.models import load_model_config_from_hf

        pretrained, architecture, inner = load_model_config_from_hf(place)
        config = {"architecture": architecture, "model_args": inner or {}, "pretrained_cfg": pretrained}
    else:
        config = {"architecture": base.model.split(".")[0], "model_args": {}}
    found = {name: config[name] for name in ("architecture", "global_pool") if name in config}
    return {**found, "model_args": {**config.get("model_args", {}), **arguments}}


def _pretrained(model: nn.Module) -> dict[str, Any]:
    found = getattr(model, "pretrained_cfg", None) or {}
    return dict(found)
