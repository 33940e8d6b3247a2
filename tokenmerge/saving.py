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
from tokenmerge.errors import InputError, TokenMergeError, shown
from tokenmerge.files import plain_file, read_json, words_of, write_json
from tokenmerge.models import register
from tokenmerge.patching import handle_of, is_patched, patch
from tokenmerge.patching.kept import KEY, SETTINGS, as_config, config_of, entry_of, holder_of, lasting, settings_in
from tokenmerge.patching.predictors import FILE as PREDICTORS
from tokenmerge.patching.predictors import as_file, load_predictors, split_state
from tokenmerge.patching.target import find_target

WEIGHTS = "model.safetensors"


def save(
    model: nn.Module,
    folder: Path | str,
    *,
    model_args: Mapping[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
) -> None:
    """Save a patched model in the format of its own library, with its merging.

    A timm model is written in the hub's format (config.json and model.safetensors), with its merging in tokenmerge.json; a
    transformers model by `save_pretrained`, with its merging in config.json. Earlier files of the same names are replaced
    only when all new ones are written.

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
    model = _unwrapped(model)
    config = lasting(handle_of(model).config)
    if any(one.is_meta for one in model.state_dict().values()):
        raise InputError(
            "the model is on the meta device, where weights have no values: move it to a device with weights"
        )
    state = {name: one.detach().cpu() for name, one in model.state_dict().items()}
    write_model(model, state, config, _path(folder), model_args=model_args, label_names=label_names)


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
    if not isinstance(model_args or {}, Mapping):
        raise InputError(
            f"model_args={shown(model_args)}, but names and values were expected: give model_args={{'img_size': 64}}"
        )
    _check_labels(model, label_names)
    folder = _path(folder)
    of_transformers = hasattr(model, "save_pretrained")
    state, predictors = split_state(model, {name: one.contiguous() for name, one in state.items()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tokenmerge-", dir=folder) as place:
            beside = Path(place)
            if of_transformers:
                _save_transformers(model, state, config, label_names, beside)
            else:
                _save_timm(model, state, config, beside, {**(model_args or {})}, label_names)
                _complete_timm(model, state, beside, without)
            _save_predictors(model, predictors, beside)
            more(beside)
            if not of_transformers:  # whose own config.json keeps them, in one place only
                write_json(beside / SETTINGS, json.loads(config.to_json()), "the settings")
            move_into(beside, folder)
            if of_transformers:  # a file of an earlier model would contradict
                (folder / SETTINGS).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"the model cannot be written to {shown(str(folder))} ({words_of(error)}): make room, or choose another folder"
        ) from None


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrapper that `torch.compile` returns, whose weights have other names."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def _path(folder: Any) -> Path:
    if not isinstance(folder, str | os.PathLike) or not str(folder):
        raise InputError(f"{shown(folder)} was given, but the path of a folder was expected: give one")
    return Path(folder)


def _check_labels(model: Any, labels: Sequence[str] | None) -> None:
    """Raise unless there is one name for each output."""
    if labels is None:
        return
    if isinstance(labels, str) or not all(isinstance(name, str) for name in labels):
        raise InputError(f"label_names={shown(labels)}, but a list of names was expected: give one for each class")
    config = getattr(model, "config", None)
    classes = getattr(model, "num_classes", None) if config is None else getattr(config, "num_labels", None)
    if classes is not None and len(labels) != classes:
        raise InputError(f"label_names has {len(labels)} names, but the model has {classes} classes: give one for each")


def move_into(beside: Path, folder: Path) -> None:
    """Move finished files into a folder, config.json last, because a folder without it is no model."""
    files = [path for path in beside.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda one: (one.name == "config.json", one)):
        target = folder / path.relative_to(beside)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)


def _save_predictors(model: nn.Module, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write predictors into a file of their own, because the model's library does not know them."""
    if state:
        (folder / PREDICTORS).parent.mkdir(exist_ok=True)
        (folder / PREDICTORS).write_bytes(as_file(model, state))


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
    (holder_of(about) or about)[KEY] = json.loads(config.to_json())
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
    try:
        save_config_for_hf(model, path, model_config=about, model_args=model_args)
    except OSError:
        raise
    except Exception as error:  # such as a class among the arguments, which JSON cannot hold
        raise InputError(
            f"timm cannot write the config of this model ({words_of(error)}): give plain model_args"
        ) from None
    (folder / WEIGHTS).write_bytes(as_bytes(state, metadata={"format": "pt", KEY: config.to_json()}))


def _complete_timm(model: Any, state: Mapping[str, torch.Tensor], folder: Path, without: Sequence[str]) -> None:
    """Correct the config that timm wrote by the model itself, and check that it gives the model again."""
    written = read_json(folder / "config.json", "the model's config", finite=False)
    target = find_target(model)
    shape = target.family.input_shape(target.model)
    if shape is not None:  # `img_size` may have changed it
        written["pretrained_cfg"]["input_size"] = list(shape[-3:])  # (of one frame, for clips)
    written["pretrained_cfg"]["custom_load"] = False  # the weights are in timm's own format, wherever they came from
    kept = {name: value for name, value in written.get("model_args", {}).items() if name not in without}
    written["model_args"] = kept
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    wanted = {name: one.shape for name, one in state.items()}
    try:
        with torch.device("meta"):
            found = {name: one.shape for name, one in _create_timm(folder).state_dict().items()}
        reason = "" if found == wanted else "because its keyword arguments are not recorded"
    except Exception as error:  # timm and its models raise their own types
        reason = f"because timm cannot create it from that ({type(error).__name__}: {words_of(error)})"
    if reason:
        raise InputError(
            f"the saved config would not give this model again, {reason}: give them as model_args={{...}}, as in timm.create_model"
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
    folder = _path(source)
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


def _kept_in(model: nn.Module) -> MergeConfig:
    place = config_of(model)
    found = None if place is None else entry_of(place.to_dict())
    if found is None:
        raise InputError(
            f"{type(model).__name__} keeps no settings of merging: give the folder that it was saved in, or call "
            "tokenmerge.patch(model, r=8)"
        )
    return as_config(found, f"the config of {type(model).__name__}")


def _create_timm(folder: Path) -> Any:
    import timm

    register()
    return timm.create_model(f"local-dir:{folder}", pretrained=False)


def _load_timm(folder: Path) -> Any:
    from safetensors.torch import load_file

    weights = plain_file(folder / WEIGHTS, "the weights")
    try:
        model = _create_timm(folder)
        check_kinds(model, weights)
        state = load_file(weights)
        _take_dtypes(model, state)
        model.load_state_dict(state)
    except TokenMergeError:
        raise
    except Exception as error:  # timm, safetensors and torch raise their own types
        raise InputError(
            f"the model in {shown(str(folder))} cannot be loaded ({type(error).__name__}: {words_of(error)}): check that it is whole"
        ) from None
    return model


def check_kinds(model: nn.Module, path: Path | str) -> None:
    """Raise `InputError` if a safetensors file holds whole or complex numbers where a model has real ones, or the other way round.

    Loading would convert them, and thereby lose what they say.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
    for name, own in sorted(model.state_dict().items()):
        theirs = stored.get(name)  # such as F32, BF16, I64, C64
        if theirs is not None and (own.is_floating_point(), own.is_complex()) != (
            theirs.startswith(("F", "BF")),
            theirs.startswith("C"),
        ):
            raise InputError(
                f"the weights {shown(str(path))} hold {name[:80]} as {theirs}, but {own.dtype} was expected: give the model's own"
            )


def _take_dtypes(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Convert a model to the dtype of its weights, which the model had when it was saved."""
    found = {one.dtype for one in state.values() if one.is_floating_point()}
    if len(found) == 1:
        model.to(found.pop())  # also buffers that are not saved
        return
    for name, own in model.state_dict(keep_vars=True).items():
        if name in state:
            own.data = own.data.to(state[name].dtype)


def _load_transformers(folder: Path, about: Mapping[str, Any]) -> Any:
    import transformers

    name = next(iter(about.get("architectures") or ["AutoModel"]), "AutoModel")
    made = getattr(transformers, str(name), None)  # a class of transformers itself: code in the folder never runs
    if not (isinstance(made, type) and issubclass(made, nn.Module)) and name != "AutoModel":
        raise InputError(
            f"transformers {transformers.__version__} has no model {shown(name)}: use a version that has it"
        )
    options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    try:
        model, info = made.from_pretrained(folder, **options)  # type: ignore[union-attr]
    except Exception as error:  # transformers, safetensors and torch raise their own types
        raise InputError(
            f"the model in {shown(str(folder))} cannot be loaded ({type(error).__name__}: {words_of(error)}): check that it is whole"
        ) from None
    for kind in ("missing", "mismatched", "unexpected"):
        for key in sorted(info[f"{kind}_keys"], key=str):
            odd = key if isinstance(key, str) else key[0]
            raise InputError(
                f"the weights in {shown(str(folder))} are not those of its config ({odd} is {kind}), so that the model would be another "
                "one: save it again"
            )
    return model
