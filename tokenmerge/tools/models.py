"""Loading of models from the MODEL argument of the commands."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenmerge.errors import InputError, TokenMergeError
from tokenmerge.patching.predictors import FILE, load_predictors
from tokenmerge.patching.target import find_target
from tokenmerge.tools.device import DTYPES, check_device
from tokenmerge.tools.sources import SOURCES, create


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """Model, weights, device and dtype, from the command line.

    Attributes:
        model: a timm name, `local-dir:PATH`, `hf_hub:ID`; or `hf:…`, `torchvision:…`, `open_clip:…`.
        pretrained: whether to load the pretrained weights of the name (may download for timm names and hub ids).
        checkpoint: file of weights to load instead, without any download.
        num_classes: classes of the head; `None` keeps the model's own.
        img_size: side of the image in pixels; `None` keeps the model's own.
        device: torch device.
        dtype: "float32", "bfloat16" or "float16".
        channels_last: memory format of model and images.
        model_kwargs: additional arguments of the timm model, or config values of a video classifier.
        of_videos: whether `hf:…` names a video classifier and not only its tower.
    """

    model: str
    pretrained: bool = False
    checkpoint: Path | None = None
    num_classes: int | None = None
    img_size: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    channels_last: bool = False
    model_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    of_videos: bool = False


def _create(args: ModelArgs, pretrained: bool) -> Any:
    if args.model.partition(":")[0] in SOURCES and ":" in args.model:
        return create(args.model, pretrained, args.img_size, args.num_classes, args.of_videos, **args.model_kwargs)
    return _create_timm(args.model, pretrained=pretrained, **_model_kwargs(args))


def _create_timm(name: str, **kwargs: Any) -> Any:
    """Call `timm.create_model`, and turn any failure into an `InputError`."""
    try:
        import timm
    except ImportError:
        raise InputError("timm is not installed, but models are made by it: pip install 'tokenmerge[timm]'") from None
    if name.startswith("local-dir:") and not Path(name.removeprefix("local-dir:"), "config.json").is_file():
        folder = name.removeprefix("local-dir:")
        raise InputError(
            f"{folder!r} holds no config.json, but local-dir: needs a folder in timm's hub format: check the path"
        )
    try:
        with _quiet_timm():
            return timm.create_model(name, **kwargs)
    except TokenMergeError:
        raise
    except Exception as error:  # timm, safetensors, the hub client and torch raise their own types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        known = [] if ":" in name else timm.list_models(f"*{name.split('.')[0]}*")[:3]
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


@contextlib.contextmanager
def _quiet_timm() -> Iterator[None]:
    """Silence the logging of timm; the command reports results itself."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _model_kwargs(args: ModelArgs) -> dict[str, Any]:
    kwargs = {"num_classes": args.num_classes, "img_size": args.img_size}
    return {**{name: value for name, value in kwargs.items() if value is not None}, **args.model_kwargs}


def load_model(args: ModelArgs) -> Any:
    """Return the model in evaluation mode, on its device.

    Raises:
        InputError: if it cannot be created, or its weights or checkpoint cannot be read or do not fit.
        UnsupportedModelError: if it cannot be patched.
    """
    device = check_device(args.device)
    pretrained = (
        args.pretrained and args.checkpoint is None
    )  # do not download weights that the checkpoint would overwrite
    model = _create(args, pretrained)
    target = find_target(model)
    if target.family.tokens(target.model) <= target.family.protected(target.model):
        raise InputError(f"images of {args.img_size} pixels are smaller than one patch: give a larger --img-size")
    if args.checkpoint is not None:
        load_checkpoint(model, args.checkpoint)
        _load_predictors(model, args.checkpoint.parent / FILE)
    elif pretrained:
        _load_predictors(model, _predictors_of(args.model))
    memory = {"memory_format": torch.channels_last} if args.channels_last else {}
    return model.to(device=device, dtype=DTYPES[args.dtype], **memory).eval()


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
    if file is not None and file.is_file():
        load_predictors(model, file)


def skeleton(args: ModelArgs) -> Any:
    """Return the model on the meta device, without values, so that models of any size can be inspected."""
    with torch.device("meta"):
        return _create(args, pretrained=False)


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load weights from a safetensors or torch file, strictly: names and shapes must match.

    Raises:
        InputError: if the file is missing, damaged, or does not fit the model.
    """
    from timm.models import load_state_dict

    if not path.is_file():
        raise InputError(f"the checkpoint {str(path)!r} is not a file, but weights were expected there: check the path")
    try:
        with _quiet_timm():
            state = load_state_dict(str(path), use_ema=True, weights_only=True)
    except Exception as error:  # torch, pickle, zip and safetensors raise their own types
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"the checkpoint {str(path)!r} cannot be read ({type(error).__name__}: {reason}): "
            "give a whole .safetensors or torch file that holds tensors only"
        ) from None
    odd = next((name for name, value in state.items() if not isinstance(value, torch.Tensor)), None)
    if odd is not None:
        raise InputError(f"the checkpoint {str(path)!r} holds {odd!r}, which is no tensor: give a file of weights only")
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or extra or wrong:
        found = [
            f"{len(names)} {what} such as {names[0]}"
            for names, what in ((missing, "missing"), (extra, "unexpected"), (sorted(wrong), "of another shape"))
            if names
        ]
        raise InputError(
            f"the checkpoint {str(path)!r} does not fit the model: {'; '.join(found)}: "
            "give the model's own name and options such as --num-classes and --img-size"
        )
    model.load_state_dict(state)


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
