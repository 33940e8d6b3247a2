"""Saving a model together with its merging, and loading both.

A model's own library cannot know of merging: `timm.create_model` and `from_pretrained` load the weights of a saved folder and run
the unmerged model. `tokenmerge.load` gives the model patched again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenmerge.config import MergeConfig
from tokenmerge.errors import ConfigError, InputError, TokenMergeError, UnknownFieldError, shown
from tokenmerge.files import plain_file, read_json, words_of, write_json
from tokenmerge.patching import handle_of, is_patched, patch
from tokenmerge.patching.kept import KEY, config_of, lasting
from tokenmerge.patching.predictors import FILE as PREDICTORS
from tokenmerge.patching.predictors import load_predictors, split_state
from tokenmerge.patching.target import find_target

SETTINGS = "tokenmerge.json"
"""Name of the file of settings in a saved folder: a config, as `MergeConfig.save` writes it."""
WEIGHTS = "model.safetensors"


def save(
    model: nn.Module,
    folder: Path | str,
    *,
    model_args: Mapping[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
) -> None:
    """Save a patched model in the format of its own library, with its merging in tokenmerge.json.

    A timm model is written in the hub's format (config.json and model.safetensors), a transformers model by
    `save_pretrained`. Earlier files of the same names are replaced only when all new ones are written.

    Args:
        model: a patched timm or transformers model.
        folder: the folder; it is made if it does not exist.
        model_args: keyword arguments that a timm model was created with, such as `img_size`; newer versions of timm record them.
        label_names: class names in the order of the outputs.

    Raises:
        PatchError: if the model is not patched, or holds several patched models.
        InputError: if the files cannot be written, or would not give this model again.
        ConfigError: if a setting cannot be written as JSON.

    Example:
        >>> import tempfile, timm, tokenmerge
        >>> model = timm.create_model("test_vit").eval()
        >>> handle = tokenmerge.patch(model, r=8, combine="norm")
        >>> folder = tempfile.mkdtemp()
        >>> tokenmerge.save(model, folder)
        >>> tokenmerge.handle_of(tokenmerge.load(folder)).config == handle.config
        True
    """
    config = lasting(handle_of(model).config)
    state = {name: one.detach().cpu() for name, one in model.state_dict().items()}
    write_model(model, state, config, Path(folder), model_args=model_args, label_names=label_names)


def write_model(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    config: MergeConfig,
    folder: Path,
    *,
    model_args: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
    label_names: Sequence[str] | None = None,
    more: Callable[[Path], Any] = lambda folder: None,
) -> None:
    """Write a model, its weights and its merging; see `save`.

    Args:
        model: a timm or transformers model.
        state: its weights, with those of predictors, on the CPU.
        config: its merging.
        folder: the folder.
        model_args: keyword arguments that a timm model was created with.
        without: keyword arguments that are not stored, because they belong to a training.
        label_names: class names in the order of the outputs.
        more: function that writes further files into a folder.
    """
    config.to_json()  # raises before anything is written
    state, predictors = split_state(model, {name: one.contiguous() for name, one in state.items()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tokenmerge-", dir=folder) as place:
            beside = Path(place)
            if hasattr(model, "save_pretrained"):
                _save_transformers(model, state, config, label_names, beside)
            else:
                _save_timm(model, state, config, beside, {**(model_args or {})}, label_names)
                _complete_timm(model, state, beside, without)
            _save_predictors(predictors, beside)
            more(beside)
            write_json(beside / SETTINGS, json.loads(config.to_json()), "the settings")
            move_into(beside, folder)
    except OSError as error:
        raise InputError(
            f"the model cannot be written to {shown(str(folder))} ({words_of(error)}): make room, or choose another folder"
        ) from None


def move_into(beside: Path, folder: Path) -> None:
    """Move finished files into a folder, config.json last, because a folder without it is no model."""
    files = [path for path in beside.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda one: (one.name == "config.json", one)):
        target = folder / path.relative_to(beside)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)


def _save_predictors(state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write predictors into a file of their own, because the model's library does not know them."""
    from safetensors.torch import save as as_bytes

    if state:
        (folder / PREDICTORS).parent.mkdir(exist_ok=True)
        (folder / PREDICTORS).write_bytes(as_bytes({name: one.contiguous() for name, one in state.items()}))


def _save_transformers(
    model: Any, state: dict[str, Any], config: MergeConfig, labels: Sequence[str] | None, folder: Path
) -> None:
    if labels is not None:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {name: index for index, name in enumerate(labels)}
    try:
        model.save_pretrained(folder, state_dict=state)
    except OSError:
        raise
    except Exception as error:  # safetensors raises its own type for a full disk
        raise InputError(f"the model cannot be saved ({type(error).__name__}: {words_of(error)}): make room") from None
    about = read_json(folder / "config.json", "the model's config", finite=False)
    if KEY in about:  # (a tower inside keeps its settings in its own part of the config)
        about[KEY] = json.loads(config.to_json())
        (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _save_timm(
    model: Any,
    state: dict[str, Any],
    config: MergeConfig,
    folder: Path,
    model_args: dict[str, Any],
    labels: Sequence[str] | None,
) -> None:
    from safetensors.torch import save as as_bytes
    from timm.models._hub import save_config_for_hf

    if not getattr(model, "pretrained_cfg", None):
        raise InputError(
            f"{type(model).__name__} is neither a timm nor a transformers model, whose formats can be written: save its "
            "state_dict, and the config with MergeConfig.save"
        )
    about = {} if labels is None else {"label_names": list(labels)}
    path: Any = folder / "config.json"  # older versions of timm take a path only, newer ones are annotated with text
    save_config_for_hf(model, path, model_config=about, model_args=model_args)
    (folder / WEIGHTS).write_bytes(as_bytes(state, metadata={"format": "pt", KEY: config.to_json()}))


def _complete_timm(model: Any, state: Mapping[str, torch.Tensor], folder: Path, without: Sequence[str]) -> None:
    """Correct the config that timm wrote by the model itself, and check that it gives the model again."""
    written = read_json(folder / "config.json", "the model's config", finite=False)
    target = find_target(model)
    shape = target.family.input_shape(target.model)
    if shape is not None:  # `img_size` may have changed it
        written["pretrained_cfg"]["input_size"] = list(shape)
    written["pretrained_cfg"]["custom_load"] = False  # the weights are in timm's own format, wherever they came from
    kept = {name: value for name, value in written.get("model_args", {}).items() if name not in without}
    written["model_args"] = kept
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    with torch.device("meta"):
        again = _create_timm(folder)
    wanted = {name: one.shape for name, one in state.items()}
    if {name: one.shape for name, one in again.state_dict().items()} != wanted:
        raise InputError(
            "the saved config would not give this model again, because its keyword arguments are not recorded: give them as "
            "model_args={...}, as in timm.create_model"
        )


def load(source: Path | str | nn.Module) -> nn.Module:
    """Return a model patched with the settings that were saved with it.

    Args:
        source: a folder that `save`, `tokenmerge train` or `save_pretrained` of a patched transformers model wrote; or a
            transformers model that `from_pretrained` loaded from one, which is patched in place.

    Returns:
        The patched model; one loaded from a folder is in evaluation mode. `tokenmerge.handle_of` returns its handle.

    Raises:
        InputError: if the folder is no saved model, a file is damaged, or no settings were saved with the model.
        PatchError: if the model is patched already.

    Example:
        >>> import tokenmerge
        >>> model = tokenmerge.load("runs/digits/model")  # doctest: +SKIP
    """
    if isinstance(source, nn.Module):
        patch(source, _kept_in(source))
        return source
    folder = Path(source)
    about = read_json(folder / "config.json", "the model's config", finite=False)
    if not isinstance(about, dict) or not ("architecture" in about or "model_type" in about):
        raise InputError(
            f"{shown(str(folder))} holds no model of timm or transformers: give a folder that was saved so"
        )
    settings = settings_in(folder)
    if settings is None:
        raise InputError(
            f"{shown(str(folder))} holds a model, but no settings of merging were saved with it: load it with its own library, "
            "and call tokenmerge.patch(model, r=8)"
        )
    model: nn.Module = _load_timm(folder) if "architecture" in about else _load_transformers(folder, about)
    model.eval()
    if (folder / PREDICTORS).exists():
        load_predictors(model, plain_file(folder / PREDICTORS, "the predictors"))
    if not is_patched(model):
        patch(model, settings)
    return model


def settings_in(folder: Path) -> MergeConfig | None:
    """Return the settings that were saved with a model; `None` if there are none.

    Raises:
        InputError: if they cannot be read.
    """
    if (folder / SETTINGS).exists():
        return MergeConfig.load(folder / SETTINGS)
    if not (folder / "config.json").exists():
        return None
    found = _entry(read_json(folder / "config.json", "the model's config", finite=False))
    return None if found is None else _as_config(found, str(folder / "config.json"))


def _entry(about: Any) -> Any:
    """Return the entry of settings in a config or in one of the configs inside it (of a tower)."""
    if not isinstance(about, dict):
        return None
    if KEY in about:
        return about[KEY]
    inside = [_entry(value) for name, value in about.items() if str(name).endswith("config")]
    return next((one for one in inside if one is not None), None)


def _kept_in(model: nn.Module) -> MergeConfig:
    place = config_of(model)
    found = None if place is None else _entry(place.to_dict())
    if found is None:
        raise InputError(
            f"{type(model).__name__} keeps no settings of merging: give the folder that it was saved in, or call "
            "tokenmerge.patch(model, r=8)"
        )
    return _as_config(found, f"the config of {type(model).__name__}")


def _as_config(found: Any, where: str) -> MergeConfig:
    if isinstance(found, dict) and set(found) == {"error"}:
        raise InputError(f"{where} keeps no settings of merging, because {found['error']}")
    try:
        return MergeConfig.from_json(json.dumps(found))
    except (ConfigError, UnknownFieldError) as error:
        raise InputError(f"the settings of merging in {shown(where)} cannot be used ({error})") from None


def _create_timm(folder: Path) -> Any:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=False)


def _load_timm(folder: Path) -> Any:
    from safetensors.torch import load_file

    weights = plain_file(folder / WEIGHTS, "the weights")
    try:
        model = _create_timm(folder)
        model.load_state_dict(load_file(weights))
    except TokenMergeError:
        raise
    except Exception as error:  # timm, safetensors and torch raise their own types
        raise InputError(
            f"the model in {shown(str(folder))} cannot be loaded ({type(error).__name__}: {words_of(error)}): check that it is whole"
        ) from None
    return model


def _load_transformers(folder: Path, about: Mapping[str, Any]) -> Any:
    import transformers

    name = next(iter(about.get("architectures") or ["AutoModel"]), "AutoModel")
    made = getattr(transformers, str(name), None)  # a class of transformers itself: code in the folder never runs
    if not hasattr(made, "from_pretrained"):
        raise InputError(
            f"transformers {transformers.__version__} has no model {shown(name)}: use a version that has it"
        )
    try:
        return made.from_pretrained(folder, local_files_only=True, use_safetensors=True)  # type: ignore[union-attr]
    except Exception as error:  # transformers, safetensors and torch raise their own types
        raise InputError(
            f"the model in {shown(str(folder))} cannot be loaded ({type(error).__name__}: {words_of(error)}): check that it is whole"
        ) from None
