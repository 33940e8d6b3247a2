"""Loading of models from the MODEL argument of the commands."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenmerge.errors import InputError, TokenMergeError, nearest, one_of, shown
from tokenmerge.files import plain_file, read_json
from tokenmerge.models import register
from tokenmerge.patching.predictors import FILE, load_predictors
from tokenmerge.patching.target import find_target
from tokenmerge.saving import check_kinds
from tokenmerge.tools.building import limited
from tokenmerge.tools.common import DeviceOptions, ModelOptions, WeightOptions
from tokenmerge.tools.device import DTYPES, check_device
from tokenmerge.tools.hf import origin_of, renamed, set_origin
from tokenmerge.tools.reading.weights import check_folder, check_hub_format, quiet_timm, read_weights
from tokenmerge.tools.sources import SOURCES, create

TORCHVISION = "torchvision.json"
"""File beside the weights of a trained torchvision model, with its name, classes and preprocessing."""
RANDOM_WEIGHTS = "the model has random weights, so its results mean nothing: give --pretrained or --checkpoint FILE"
"""Sentence of every command whose results depend on the weights, for models without trained ones."""


_OWN = "video_mae"
"""Prefix of this package's video model."""
_PREFIXES = ("local-dir", "hf_hub", "hf-hub", *SOURCES, _OWN)
"""What may stand before a colon in MODEL."""
_BY_OPTIONS = {
    "model_name": "MODEL",
    "name": "MODEL",
    "pretrained": "--pretrained",
    "checkpoint_path": "--checkpoint",
    "cache_dir": "the environment variable HF_HOME",
}
"""Arguments of `timm.create_model` that are no arguments of a model, and what sets them here."""


def _names_weights(model: str) -> bool:
    """Return whether MODEL names a folder or file that is there, whose weights are therefore wanted."""
    kind, _, place = model.partition(":")
    if kind == "open_clip":
        tag = place.partition(":")[2]
        return bool(tag) and os.path.isfile(tag)
    return kind in ("local-dir", "hf") and bool(place) and os.path.exists(place)


def random_weights(options: WeightOptions) -> bool:
    """Return whether the weights of a model are random, because neither pretrained ones, a checkpoint nor a folder was named."""
    return options.checkpoint is None and not options.pretrained and not _names_weights(options.model)


def warn_if_random(options: WeightOptions, warn: Callable[[str], None]) -> bool:
    """Call `warn` with `RANDOM_WEIGHTS` if the weights are random, and return whether they are."""
    found = random_weights(options)
    if found:
        warn(RANDOM_WEIGHTS)
    return found


def _create(options: ModelOptions, pretrained: bool, head: str | None = None, new_head: bool = False) -> Any:
    kind, _, place = options.model.partition(":")
    _check_prefix(options.model)
    elsewhere = kind in SOURCES and bool(place)  # another library than timm
    with limited(options.model):
        if elsewhere:
            if kind == "hf" and os.path.isdir(place):
                check_folder(Path(place))
            values = dict(options.model_kwargs)
            model = create(options.model, pretrained, options.img_size, options.num_classes, head, new_head, values)
        else:
            name = _name_of_own(place, pretrained) if kind == _OWN else options.model
            model = _create_timm(name, pretrained=pretrained, **_model_kwargs(options))
    if pretrained and kind in ("local-dir", "hf") and os.path.isdir(place):
        for file in sorted(Path(place).glob("*.safetensors")):
            check_kinds(model, plain_file(file, "the weights"))
    if elsewhere:
        return model
    own = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    if pretrained and head is not None and not new_head and options.num_classes not in (None, 0, own):
        raise InputError(
            f"the weights of {options.model} classify {own} classes, but --num-classes {options.num_classes} was given, whose head would "
            "be random: leave it out, or give --checkpoint FILE"
        )
    return model


def _check_prefix(model: str) -> None:
    """Raise if MODEL begins with a word and a colon that no library stands for."""
    prefix, colon, place = model.partition(":")
    if colon and (prefix not in _PREFIXES or not place):
        odd = f"nothing after {prefix}:" if prefix in _PREFIXES else f"the prefix {shown(prefix)}"
        raise InputError(
            f"the model {shown(model)} has {odd}, but one of {', '.join(f'{one}:NAME' for one in _PREFIXES)} was expected, or a timm name: "
            f"{one_of(prefix, _PREFIXES).replace('?', ':?')}"
        )


def _name_of_own(name: str, pretrained: bool) -> str:
    """Return the name in timm's registry of a model of this package, from the part of MODEL after `video_mae:`."""
    _timm()
    register()
    from tokenmerge.models.video_mae import NAMES, PREFIX

    if os.path.isdir(name):
        raise InputError(f"{_OWN}:{name} names a folder, but a size was expected: give local-dir:{name}")
    if name not in NAMES:
        raise InputError(
            f"there is no {_OWN}:{shown(name)}, but one of {', '.join(NAMES)} was expected: {one_of(name, NAMES)}"
        )
    if pretrained:
        raise InputError(
            f"no library hosts weights of {_OWN}:{name}, but --pretrained was given: give the authors' file with --checkpoint FILE"
        )
    return f"{PREFIX}{name}"


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise InputError("timm is not installed, but models are made by it: pip install 'tokenmerge[timm]'") from None
    return timm


def _create_timm(name: str, **kwargs: Any) -> Any:
    """Call `timm.create_model`, and turn any failure into an `InputError`."""
    timm = _timm()
    if ":" in name:  # a folder or a repository, whose config may name a model of this package
        register()
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        check_hub_format(folder)
        if kwargs.get("pretrained") and not any(
            path.suffix in (".safetensors", ".bin", ".pth", ".pt") for path in folder.iterdir()
        ):
            raise InputError(
                f"{str(folder)!r} holds no weights, but model.safetensors was expected: check the path, or give the weights with "
                "--checkpoint FILE"
            )
        check_folder(folder)
    try:
        with quiet_timm():
            return timm.create_model(name, **kwargs)
    except TokenMergeError:
        raise
    except Exception as error:  # timm, safetensors, the hub client and torch raise their own types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        every = [] if ":" in name else timm.list_models()
        bare = name.split(".")[0]
        known = [one for one in every if bare in one][:3] or [one for one in [nearest(bare, every)] if one is not None]
        hint = (
            f"did you mean {', '.join(known)}?"
            if known and name not in known
            else "check the name with timm.list_models()"
        )
        if ":" in name:
            hint = "check that it is there, whole, and in timm's hub format"
        if kwargs.get("pretrained"):
            hint = (
                "check that the weights exist and are whole, that the network is there if they are to be downloaded, "
                "and that they fit the other options"
            )
        raise InputError(f"the model {name!r} cannot be made ({type(error).__name__}: {reason}): {hint}") from None


def _model_kwargs(options: ModelOptions) -> dict[str, Any]:
    odd = next((name for name in options.model_kwargs if name in _BY_OPTIONS), None)
    if odd is not None:
        raise InputError(f"--model-kwargs {odd} was given, which {_BY_OPTIONS[odd]} says: leave it out")
    kwargs = {"num_classes": options.num_classes, "img_size": options.img_size}
    return {**{name: value for name, value in kwargs.items() if value is not None}, **options.model_kwargs}


def load_model(options: DeviceOptions, head: str | None = None, new_head: bool = False) -> Any:
    """Return the model in evaluation mode, on its device.

    Args:
        options: model, weights, device and dtype.
        head: medium that the model must classify ("images", "videos" or "sounds"), for commands that read labelled data; `None` takes
            the model as it is.
        new_head: whether weights of another number of classes, or without a head, get a random one, for training.

    Raises:
        InputError: if it cannot be created, or its weights or checkpoint cannot be read or do not fit.
        UnsupportedModelError: if it cannot be patched.
    """
    device = check_device(options.device)
    # weights that the checkpoint would overwrite are not downloaded
    pretrained = options.checkpoint is None and not random_weights(options)
    model = _create(options, pretrained, head, new_head)
    target = find_target(model)
    if target.family.tokens(target.model) <= target.family.protected(target.model):
        raise InputError(f"images of {options.img_size} pixels are smaller than one patch: give a larger --img-size")
    if options.checkpoint is not None:
        load_checkpoint(model, options.checkpoint, new_head)
        origin = origin_of(model)
        if origin is not None:
            set_origin(model, dataclasses.replace(origin, trained=True, beside=options.checkpoint.parent))
        if hasattr(model, "weights"):
            _about_torchvision(model, options)
        _load_predictors(model, options.checkpoint.parent / FILE)
    elif pretrained:
        _load_predictors(model, _predictors_of(options.model))
    memory = {"memory_format": torch.channels_last} if options.channels_last else {}
    return model.to(device=device, dtype=DTYPES[options.dtype], **memory).eval()


def _about_torchvision(model: Any, options: DeviceOptions) -> None:
    """Set class names and preprocessing of a torchvision model from the file that `train` wrote beside its weights, if any."""
    assert options.checkpoint is not None
    file = options.checkpoint.parent / TORCHVISION
    if not file.is_file():
        return
    found = read_json(file, "the config")
    found = found if isinstance(found, dict) else {}
    name = ":".join(options.model.split(":")[:2])
    classes, used = found.get("classes"), found.get("preprocessing")
    if found.get("name") != name or not isinstance(classes, list) or not isinstance(used, dict):
        raise InputError(
            f"{shown(str(file))} describes {shown(found.get('name'))}, but {name} was given: give the model that was trained"
        )
    if len(classes) == model.num_classes:
        model.label_names = [str(one) for one in classes]
    model.stored_preprocessing = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in used.items()
        if name in ("mean", "std", "crop_pct", "crop_mode", "interpolation")
    }


def _predictors_of(name: str) -> Path | None:
    """Return the file of predictors that `train --matcher dynamicvit` saved with the weights; `None` if there is none."""
    kind, _, place = name.partition(":")
    if kind in ("local-dir", "hf") and place:
        return Path(place, FILE)
    if kind in ("hf_hub", "hf-hub"):
        try:
            from timm.models._hub import download_from_hf

            return Path(download_from_hf(place, FILE))
        except Exception:  # the repository has no such file
            return None
    return None


def _load_predictors(model: nn.Module, file: Path | None) -> None:
    if file is not None and os.path.exists(file):
        load_predictors(model, file)


def skeleton(options: ModelOptions, head: str | None = None) -> Any:
    """Return the model on the meta device, without values, so that models of any size can be inspected; for `head` see `load_model`."""
    with torch.device("meta"):
        return _create(options, pretrained=False, head=head)


def load_checkpoint(model: Any, path: Path, new_head: bool = False) -> None:
    """Load weights from a safetensors or torch file, strictly: names and shapes must match.

    Args:
        model: the model; one that can translate the names of published checkpoints does so.
        path: the file.
        new_head: whether the classifier of a timm model stays random if the file has none, or one of other classes (for training).

    Raises:
        InputError: if the file is missing, damaged, or does not fit the model.
    """
    state = read_weights(path)
    own = model.state_dict()
    if own.keys() != state.keys() and origin_of(model) is not None:
        state = renamed(model, state)
    elif own.keys() != state.keys() and hasattr(model, "translated"):
        state = model.translated(state)
    if new_head and hasattr(model, "get_classifier"):
        state |= {
            name: own[name] for name in _head_of(model) if name not in state or state[name].shape != own[name].shape
        }
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    both = sorted(own.keys() & state.keys())
    wrong = [name for name in both if own[name].shape != state[name].shape]
    other = [name for name in both if _kind(own[name]) != _kind(state[name])]
    if missing or extra or wrong or other:
        found = [
            f"{len(names)} {what} such as {names[0][:80]}"
            for names, what in (
                (missing, "missing"),
                (extra, "unexpected"),
                (wrong, "of another shape"),
                (other, "of another kind of number"),
            )
            if names
        ]
        raise InputError(
            f"the checkpoint {str(path)!r} does not fit the model: {'; '.join(found)}: "
            "give the model's own name and options such as --num-classes and --img-size"
        )
    model.load_state_dict(state)


def _head_of(model: Any) -> list[str]:
    """Return the names of the weights of a timm model's classifier."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    own = {id(parameter) for head in heads for parameter in head.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in own]


def _kind(tensor: torch.Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def input_shape(model: Any) -> tuple[int, ...]:
    """Return the shape of one input without the batch dimension: `(C, H, W)` for images.

    Raises:
        InputError: if the model takes more than one tensor.
    """
    target = find_target(model)
    shape = target.family.input_shape(target.model)
    if shape is None:
        raise InputError(
            f"{type(model).__name__} takes several inputs, and the command can make only images, videos or spectra: "
            "measure it in your own code with tokenmerge.patch"
        )
    return shape
