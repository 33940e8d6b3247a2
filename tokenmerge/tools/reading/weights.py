"""Weights from safetensors and torch files; no pickle is executed."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenmerge import files
from tokenmerge.errors import InputError, TokenMergeError, shown

_MOST_RATIO = 20
"""Largest ratio of a torch file's content to its size; torch does not compress, so more is a bomb."""
MOST_METADATA = 2**20
"""Largest size of one text in the metadata of a safetensors file."""


@contextlib.contextmanager
def quiet_timm() -> Iterator[None]:
    """Silence the logging of timm, and warnings of torch while it loads; the command reports results itself."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def read_weights(path: Path | str, what: str = "the checkpoint") -> dict[str, Tensor]:
    """Return the tensors of a safetensors or torch file by name, on the CPU.

    Of a training checkpoint of timm, the averaged weights are taken if there are any, and the prefixes of wrappers are removed.

    Args:
        path: the file; a name that ends in .safetensors is read as such, any other one as a file of `torch.save`.
        what: what it holds, for messages.

    Raises:
        InputError: if it is missing, no regular file, damaged, or holds anything but dense tensors with names.
    """
    from timm.models import load_state_dict

    path = files.plain_file(path, what)
    try:
        _check_unpacked(path)
        with quiet_timm():
            # weights_only reads pickles with an unpickler of torch that knows tensors only, and refuses TorchScript and tar files
            state: Any = load_state_dict(str(path), use_ema=True, weights_only=True)
        if isinstance(state, dict) and isinstance(state.get("model_state"), dict):  # as PySlowFast writes it
            state = state["model_state"]
        _check_tensors(state)
    except TokenMergeError:
        raise
    except Exception as error:  # torch, pickle, zip and safetensors raise their own types
        raise InputError(
            f"{what} {shown(str(path))} cannot be read ({type(error).__name__}: {files.words_of(error)}): "
            "give a whole .safetensors or torch file that holds tensors only"
        ) from None
    return dict(state)


def _check_unpacked(path: Path) -> None:
    """Raise `ValueError` for a torch file that unpacks to far more than it is."""
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as packed:
        size = sum(entry.file_size for entry in packed.infolist())
    if size > _MOST_RATIO * path.stat().st_size:
        raise ValueError(f"it unpacks to {size:,} bytes, over {_MOST_RATIO} times its own size")


def _check_tensors(state: Any) -> None:
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, and no mapping of names to tensors")
    for name, value in state.items():
        odd = None
        if not isinstance(name, str):
            odd = "which is no name"
        elif not isinstance(value, Tensor):
            odd = "which is no tensor"
        elif value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            odd = "which is no dense tensor with values"
        if odd is not None:
            raise ValueError(f"it holds {shown(name)[:80]}, {odd}")


def check_hub_format(folder: Path) -> None:
    """Raise `InputError` unless there is a folder with the config of a timm model."""
    if not os.path.isfile(folder / "config.json"):
        raise InputError(
            f"{str(folder)!r} holds no config.json, but local-dir: needs a folder in timm's hub format: check the path"
        )


def check_folder(folder: Path) -> None:
    """Raise `InputError` unless a model's folder has a config of usual size, and regular files only.

    Libraries that load the folder open whatever they find, and would wait for a pipe for ever.
    """
    files.read_json(folder / "config.json", "the config", finite=False)
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir():
            files.plain_file(entry, "the model's")


def read_metadata(path: Path | str, key: str, what: str = "the checkpoint") -> Any:
    """Return what the metadata of a safetensors file hold under a name, from JSON; `None` if they lack it.

    Args:
        path: the file.
        key: the name.
        what: what the file holds, for messages.

    Raises:
        InputError: if the file is missing or damaged, or the text is no JSON.
    """
    from safetensors import safe_open

    path = files.plain_file(path, what)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(key)
    except Exception as error:  # safetensors raises its own types
        raise InputError(
            f"{what} {shown(str(path))} cannot be read ({type(error).__name__}: {files.words_of(error)}): "
            "give a whole .safetensors file"
        ) from None
    if text is None:
        return None
    about = f"the entry {key!r} of {what} {shown(str(path))}"
    if len(text) > MOST_METADATA:
        raise InputError(f"{about} has {len(text):,} characters, but at most {MOST_METADATA:,} were expected: check it")
    return files.parse_json(text, about)
