"""Models of transformers: classifiers of images, videos and sounds with their heads, otherwise towers; no code of theirs is run."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tokenmerge.errors import InputError, TokenMergeError, shown
from tokenmerge.files import read_json
from tokenmerge.patching.swap import original_class
from tokenmerge.patching.target import find_target
from tokenmerge.tools.building import MOST_CLASSES
from tokenmerge.tools.depth import add_stochastic_depth, has_branches
from tokenmerge.tools.packages import needed

_AUTO = {"images": "Image", "videos": "Video", "sounds": "Audio"}
"""Word for each medium in the names of transformers' Auto classes."""
_SCALES: dict[str, dict[str, int]] = {
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
}
"""Config values of the named sizes that a model type accepts as a suffix, such as `hf:videomae-large`."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_UNUSED = ("pooler.", "mask_token", "logit_scale", "logit_bias")
"""Parts of names of weights that may be missing, because features and predictions do not depend on them."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Source of a transformers model, which the processor of its inputs is taken from.

    Attributes:
        name: folder, hub id or model type: MODEL without `hf:`.
        is_type: whether `name` is a model type, which has neither weights nor files.
        trained: whether the weights were loaded, and are not random.
        resized: whether the size of the inputs was given, instead of the model's own.
        beside: folder of the checkpoint that was loaded, if any.
    """

    name: str
    is_type: bool
    trained: bool
    resized: bool = False
    beside: Path | None = None


def origin_of(model: Any) -> Origin | None:
    """Return the source of a model that `create_transformers` made; `None` for other models."""
    found = getattr(model, "tokenmerge_origin", None)
    return found if isinstance(found, Origin) else None


def set_origin(model: Any, origin: Origin) -> None:
    """Store the source of a model on it."""
    model.tokenmerge_origin = origin


def transformers_library() -> Any:
    """Import and return the module `transformers`.

    Raises:
        InputError: if it is not installed.
    """
    return needed("transformers", "the model is one of its", "transformers")


def medium_of_class(name: str) -> str | None:
    """Return the medium that a class of transformers classifies: "images", "videos" or "sounds"; `None` for other classes."""
    known = importlib.import_module("transformers.models.auto.modeling_auto")
    for medium, word in _AUTO.items():
        for classes in getattr(known, f"MODEL_FOR_{word.upper()}_CLASSIFICATION_MAPPING_NAMES").values():
            if name in ((classes,) if isinstance(classes, str) else classes):
                return medium
    return None


def classified_medium(model: Any) -> str | None:
    """Return the medium that a transformers model classifies; `None` if it has no head, or is of another library."""
    cls = original_class(model)
    return medium_of_class(cls.__name__) if cls.__module__.startswith("transformers.") else None


def refuse_code(entries: Any, what: str) -> None:
    """Raise if a config names code of its own, which is never run.

    Args:
        entries: the config as a mapping.
        what: the config in words, for messages.

    Raises:
        InputError: if it has `auto_map`, or attention from a repository of code.
    """
    entries = entries if isinstance(entries, dict) else {}
    odd = next((k for k, v in entries.items() if "attn_implementation" in str(k) and "/" in str(v)), None)
    odd = odd or next((k for k in ("auto_map", "trust_remote_code", "code_revision") if entries.get(k)), None)
    if odd is not None:
        named = f"{'attention' if 'attn' in str(odd) else odd} {shown(entries[odd])}"
        raise InputError(
            f"{what} names code of its own ({named}), but such code is never run: give a model whose classes are transformers' own, "
            "without that entry"
        )


def create_transformers(
    name: str,
    pretrained: bool,
    img_size: int | None = None,
    num_classes: int | None = None,
    head: str | None = None,
    new_head: bool = False,
    values: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Create a model from a folder, a hub id, or a model type such as `vit` or `videomae-large`.

    Args:
        name: the part of MODEL after `hf:`; a folder is one that `save_pretrained` wrote.
        pretrained: whether to load weights; a model type has none.
        img_size: side of the image in pixels; `None` keeps the model's own.
        num_classes: classes of the head; `None` keeps the model's own.
        head: medium that the model must classify; `None` takes a classifier as one, and anything else as its tower.
        new_head: whether weights without a head, or with another number of classes, get a random head (for training).
        values: additional values of the config.

    Raises:
        InputError: if it brings code of its own, has no weights although they are wanted, or has no such head.
    """
    transformers = transformers_library()
    refuse_code(dict(values), "--model-kwargs")
    _check_classes(values.get("num_labels"), "--model-kwargs num_labels")
    types = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    kind, _, scale = name.rpartition("-") if name.rpartition("-")[2] in _SCALES else (name, "", "")
    folder = Path(name) if Path(name).exists() else None
    is_type = folder is None and kind in types
    values = {**_SCALES.get(scale, {}), **values} if is_type else values
    if is_type:
        if pretrained:
            raise InputError(
                f"hf:{name} is a model type without weights: give a folder or a hub id, or no --pretrained"
            )
        make, medium = types[kind], head
    else:
        make = functools.partial(_stored_config, transformers, name, folder, pretrained)
        medium = medium_of_class(_architecture(make()))
        if head is not None and medium is None and pretrained and not new_head:
            raise InputError(
                f"hf:{name} holds a {_architecture(make())} without a classifier, but one of {head} was expected: train one with "
                "tokenmerge train, or give another model"
            )
        medium = medium or head
    given = _with_classes(
        medium, num_classes, name, {**({} if img_size is None else {"image_size": img_size}), **values}
    )
    config = make()
    skips = not hasattr(config, "drop_path_rate") and has_branches(config)
    depth = (
        given.pop("drop_path_rate", None) if skips else None
    )  # (the library has no stochastic depth for these layers)
    for entry in given:
        if entry != "num_labels" and not hasattr(config, entry):
            flag = "--img-size" if entry == "image_size" and img_size is not None else f"--model-kwargs {entry}"
            flag = "--drop-path" if entry == "drop_path_rate" else flag  # as train passes it on
            raise InputError(
                f"{flag} was given, but the config of hf:{name} ({type(config).__name__}) has no {entry}: leave it out"
            )
    config = make(**given) if given else config
    config.return_dict = True  # commands read outputs by name
    config.architectures = config.architectures or []  # None makes transformers fail for types of several classifiers
    made = _auto_class(transformers, medium, config, name)
    if pretrained:
        model, info = made.from_pretrained(
            name,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in words
            **({"local_files_only": True} if folder is not None else {}),
        )
        _check_loaded(model, info, name, new_head and medium is not None)
    else:
        model = made.from_config(config)
    if depth is not None:
        add_stochastic_depth(model, depth)
    if medium is None:
        with contextlib.suppress(TokenMergeError):  # the caller refuses models without a tower, with reasons
            model = find_target(model).model
    set_origin(model, Origin(name, is_type, pretrained, img_size is not None))
    return model


def _stored_config(transformers: Any, name: str, folder: Path | None, pretrained: bool, **values: Any) -> Any:
    """Return the config of a folder or hub id, with some values replaced."""
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{shown(name)} holds no config.json, but hf: needs a folder that save_pretrained wrote: check the path"
            )
        entries = read_json(folder / "config.json", "the config")
        if not isinstance(entries, dict):
            raise InputError(f"the config {shown(str(folder / 'config.json'))} is no JSON object: check the file")
        if pretrained:
            _check_weights(folder)
    else:
        entries, _ = transformers.PretrainedConfig.get_config_dict(name)
    refuse_code(entries, f"the config of hf:{name}")
    _check_classes(entries.get("num_labels"), f"num_labels of hf:{name}")
    offline = {} if folder is None else {"local_files_only": True}
    return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **offline, **values)


def _architecture(config: Any) -> str:
    return str((config.architectures or [type(config).__name__.replace("Config", "Model")])[0])


def _check_weights(folder: Path) -> None:
    """Raise unless a folder holds weights as safetensors, because reading other files may run code."""
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{shown(str(folder))} holds an adapter, but a whole model was expected: merge it first")
    if any((folder / name).is_file() for name in _WEIGHTS):
        return
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack"))
    found = f"its weights only as {others[0]}, which may run code when it is read," if others else "no weights,"
    raise InputError(
        f"{shown(str(folder))} holds {found} but model.safetensors was expected: save it with save_pretrained, or give the weights "
        "with --checkpoint FILE"
    )


def _with_classes(medium: str | None, num_classes: int | None, name: str, values: dict[str, Any]) -> dict[str, Any]:
    if num_classes is None:
        return values
    if medium is None:
        raise InputError(
            f"--num-classes is for timm models and classifiers, but 'hf:{name}' was given, a tower without a head: leave it out"
        )
    return {**values, "num_labels": num_classes}


def _check_classes(count: Any, what: str) -> None:
    """Raise if the number of classes is absurd: a config names each of them, which would take for ever."""
    if isinstance(count, int) and count > MOST_CLASSES:
        raise InputError(f"{what} is {count}, but at most {MOST_CLASSES:,} classes were expected: check it")


def _auto_class(transformers: Any, medium: str | None, config: Any, name: str) -> Any:
    if medium is None:
        return transformers.AutoModel
    made = getattr(transformers, f"AutoModelFor{_AUTO[medium]}Classification")
    if type(config) not in list(made._model_mapping.keys()):
        raise InputError(
            f"transformers has no classifier of {medium} for hf:{name} ({type(config).__name__}): choose another model, such as "
            f"hf:{ {'images': 'vit', 'videos': 'videomae', 'sounds': 'audio-spectrogram-transformer'}[medium] }"
        )
    return made


def _check_loaded(model: Any, info: dict[str, Any], name: str, new_head: bool) -> None:
    """Raise if weights were missing, or had another shape, so that the model would be partly random.

    Args:
        model: the model.
        info: loading info of transformers.
        name: name of the model, for messages.
        new_head: whether the head may be random.
    """
    try:
        target = find_target(model).model
    except TokenMergeError:
        return  # the caller refuses the model, with reasons
    place = next(path for path, module in model.named_modules() if module is target)
    inside = f"{place}." if place else ""

    def matters(key: str) -> bool:
        if any(part in key for part in _UNUSED):
            return False
        in_tower = key.startswith(inside)
        return in_tower or (not new_head and original_class(model) is not original_class(target) and _predicts(model))

    missing: Iterable[str] = sorted(key for key in info["missing_keys"] if matters(key))
    other = sorted((key, tuple(old), tuple(new)) for key, old, new in info["mismatched_keys"] if matters(key))
    for key in missing:
        raise InputError(
            f"the weights of hf:{name} lack {key}, so that the model would be partly random: give a folder with all weights of a "
            f"{type(model).__name__}"
        )
    # what a config leaves out of the blocks that it describes; further heads and poolers are common, and harmless
    stacks = [f"{path}." for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    for key in sorted(key for key in info["unexpected_keys"] if any(key.startswith(stack) for stack in stacks)):
        raise InputError(
            f"the weights of hf:{name} hold {key}, which its config leaves out, so that the model would be another one: give the config of "
            "these weights"
        )
    for key, old, new in other:
        raise InputError(
            f"the weights of hf:{name} hold {key} of shape {old}, but {new} was expected: leave out --num-classes, --img-size and "
            "--model-kwargs, or give those of the weights"
        )


def renamed(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Return weights with the names of the model's parameters; those of files differ, and transformers alone can translate them.

    Weights that do not fit the model come back as they are.
    """
    if not all(one.is_floating_point() for one in state.values()):  # they would be converted
        return state
    try:
        made, info = original_class(model).from_pretrained(  # type: ignore[attr-defined]
            None, config=copy.deepcopy(model.config), state_dict=dict(state), output_loading_info=True
        )
    except Exception:  # another model's; the caller compares names and shapes
        return state
    if any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")):
        return state
    return dict(made.state_dict())


def _predicts(model: Any) -> bool:
    return classified_medium(model) is not None
