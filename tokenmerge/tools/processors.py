"""Preprocessing of transformers models by their own processors: of images, frames of videos, and sounds."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenmerge.errors import InputError, TokenMergeError, shown
from tokenmerge.files import read_json, words_of
from tokenmerge.patching.target import find_target
from tokenmerge.tools.hf import Origin, classified_medium, origin_of, refuse_code, transformers_library
from tokenmerge.tools.models import input_shape

FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""Files of a folder that describe its processor."""
_NEEDED = {"images": ("mean", "std", "crop_pct", "interpolation"), "videos": ("mean", "std", "crop_pct"), "sounds": ()}
"""Overrides that replace a missing processor config when all of them are given."""
_MOST_LARGER = 16
"""Most times that a processor's pictures, before they are cropped, may be as large as the model's inputs."""
_OUTPUTS = ("pixel_values", "pixel_values_videos", "input_values", "input_features")


@dataclasses.dataclass(frozen=True, eq=False)
class Processor:
    """Transform from a decoded file to one input of a model; it can be pickled for the processes of a loader.

    Attributes:
        inner: processor of transformers.
        medium: "images", "videos" or "sounds".
    """

    inner: Any
    medium: str

    def __call__(self, decoded: Any) -> Tensor:
        """Return one input of the model, exactly as transformers' processor makes it, float32.

        Args:
            decoded: an RGB image of Pillow, frames `[T, H, W, 3]` uint8, or samples `[n]` at `rate` Hz.
        """
        if self.medium == "images":
            found = self.inner(images=decoded, return_tensors="pt")
        elif self.medium == "sounds":
            found = self.inner(decoded, sampling_rate=self.rate, return_tensors="pt")
        elif _is_video_processor(self.inner):
            found = self.inner(videos=[np.asarray(decoded)], do_sample_frames=False, return_tensors="pt")
        else:
            found = self.inner(list(decoded), return_tensors="pt")
        made: Tensor = next(found[name] for name in _OUTPUTS if name in found)[0]
        return made

    @property
    def rate(self) -> int:
        """Sample rate of sounds in Hz."""
        return int(self.inner.sampling_rate)

    @property
    def interpolation(self) -> str:
        """Interpolation of resizing, by its name in timm."""
        return _names_of_interpolation().get(int(self.inner.resample or 0), "bilinear")

    def probe(self, shape: Sequence[int], level: int = 0) -> Tensor:
        """Return what the processor makes of an input of one level; of the model's input shape, or of one second of sound."""
        if self.medium == "sounds":
            return self(np.zeros(self.rate, dtype=np.float32))
        from PIL import Image

        height, width = shape[-2:]
        pixels = np.full((height, width, 3), level, dtype=np.uint8)
        return self(Image.fromarray(pixels) if self.medium == "images" else np.stack([pixels] * shape[0]))

    def normalisation(self, shape: Sequence[int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of the normalization of pixels in [0, 1], measured on black and on white."""
        channels = len(shape) - 3  # videos have frames before the channels
        axes = tuple(axis for axis in range(len(shape)) if axis != channels)
        black, white = (self.probe(shape, level).double().mean(axes) for level in (0, 255))
        std = 1 / (white - black)
        return tuple((-black * std).tolist()), tuple(std.tolist())

    def save(self, folder: Path) -> None:
        """Write the config of the processor into a folder, where `from_pretrained` finds it."""
        with quiet():
            self.inner.save_pretrained(folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence logging, warnings (such as of mel filters that are empty by design) and progress bars of transformers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # where progress bars go
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def processor_of(model: Any, overrides: dict[str, Any] | None = None) -> Processor:
    """Return the processor of a transformers model: of its folder or hub id, or the default of its type for random weights.

    Args:
        model: a model that `create_transformers` made.
        overrides: values that replace the processor's own, by their names in timm's config.

    Raises:
        InputError: if it is missing, brings code, cannot be read, or its outputs do not fit the model.
    """
    origin = origin_of(model)
    assert origin is not None
    overrides = overrides or {}
    medium = medium_of_shape(input_shape(model))
    inner = _stored(origin, medium)
    by_default = inner is None
    if inner is None:
        wanted = [name for name in _NEEDED[medium] if name not in overrides]
        complete = bool(_NEEDED[medium]) and not wanted
        if origin.trained and not complete and classified_medium(model) is not None:
            raise InputError(_missing(origin, medium))
        inner = _default(model, medium)
    processor = Processor(inner, medium)
    _check_sizes(processor, input_shape(model), origin)
    try:
        if not origin.trained or origin.resized or by_default:
            processor = _resized(processor, model)
        if overrides:
            processor = _overridden(processor, model, overrides)
        _check_fits(processor, model, origin)
    except TokenMergeError:
        raise
    except Exception as error:  # unusual values raise many exception types
        raise InputError(
            f"the preprocessing of hf:{origin.name} does not work ({type(error).__name__}: {words_of(error)}): check its "
            "preprocessor_config.json, --crop-pct, --crop-mode, --interpolation, --mean and --std"
        ) from None
    return processor


def lacks_processor(model: Any) -> bool:
    """Return whether a model has trained weights without the config of a processor, so that its type's default is used."""
    origin = origin_of(model)
    return origin is not None and origin.trained and _stored(origin, medium_of_shape(input_shape(model))) is None


def medium_of_shape(shape: Sequence[int]) -> str:
    """Return the medium of a transformers model's inputs, without the batch dimension."""
    return {4: "videos", 2: "sounds"}.get(len(shape), "images")


def _missing(origin: Origin, medium: str) -> str:
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in _NEEDED[medium])
    place = shown(str(origin.beside or origin.name))
    instead = f", or give {flags}" if flags else ""
    return (
        f"{place} holds weights but no preprocessor_config.json, so that the preprocessing of its {medium} is unknown: put the model's "
        f"own file there (save_pretrained of its processor){instead}"
    )


def _is_video_processor(inner: Any) -> bool:
    return "video_processing" in type(inner).__module__


def _folders(origin: Origin) -> list[Path]:
    places = [] if origin.is_type else [Path(origin.name)]
    return [place for place in (*places, *([origin.beside] if origin.beside else [])) if place.is_dir()]


def _stored(origin: Origin, medium: str) -> Any:
    """Return the processor that is stored with a model; `None` if there is none."""
    found = next(((place / name) for place in _folders(origin) for name in FILES if (place / name).is_file()), None)
    if found is None:
        hub = not origin.is_type and not Path(origin.name).exists() and origin.trained
        return _from_hub(origin.name, medium) if hub else None
    entries: dict[str, Any] = {}
    for name in FILES:
        if (found.parent / name).is_file():
            part = read_json(found.parent / name, "the config of the processor")
            entries |= part if isinstance(part, dict) else {}
    for part in (entries, *entries.values()):
        refuse_code(part, f"the config of the processor in {shown(str(found.parent))}")
    return _loaded(str(found.parent), medium, "video_processor_type" in str(entries), offline=True)


def _from_hub(name: str, medium: str) -> Any:
    transformers = transformers_library()
    for file in FILES:
        with contextlib.suppress(Exception):  # the repository has no such file
            refuse_code(read_json(transformers.utils.cached_file(name, file), "the config of the processor"), name)
    try:
        return _loaded(name, medium, medium == "videos", offline=False)
    except InputError:
        if medium != "videos":
            raise
        return _loaded(name, medium, False, offline=False)


def _loaded(place: str, medium: str, of_videos: bool, offline: bool) -> Any:
    transformers = transformers_library()
    auto = {"images": "AutoImageProcessor", "sounds": "AutoFeatureExtractor", "videos": "AutoImageProcessor"}[medium]
    auto = "AutoVideoProcessor" if medium == "videos" and of_videos else auto
    options = {"local_files_only": True} if offline else {}
    try:
        with quiet():
            return getattr(transformers, auto).from_pretrained(place, trust_remote_code=False, **options)
    except Exception as error:  # each kind of damage raises its own exception type
        raise InputError(
            f"the processor in {shown(place)} cannot be made ({type(error).__name__}: {words_of(error)}): give the model's own "
            "preprocessor_config.json"
        ) from None


def _default(model: Any, medium: str) -> Any:
    """Return the processor of a model type with its default values; of the nearest type if this one has none."""
    transformers = transformers_library()
    auto = importlib.import_module("transformers.models.auto")
    place, table = {
        "images": ("image_processing_auto", "IMAGE_PROCESSOR_MAPPING_NAMES"),
        "videos": ("video_processing_auto", "VIDEO_PROCESSOR_MAPPING_NAMES"),
        "sounds": ("feature_extraction_auto", "FEATURE_EXTRACTOR_MAPPING_NAMES"),
    }[medium]
    names = dict(getattr(importlib.import_module(f"{auto.__name__}.{place}"), table))
    kind = str(model.config.model_type)
    near = [name for name in names if name and kind.startswith(name)]
    found = names.get(kind) or (names[max(near, key=len)] if near else None)
    found = (found.get("torchvision") or found.get("pil")) if isinstance(found, dict) else found
    found = next((name for name in found if name), None) if isinstance(found, tuple | list) else found
    fallback = {"images": "ViTImageProcessor", "videos": "VideoMAEVideoProcessor", "sounds": "ASTFeatureExtractor"}
    with quiet():
        return getattr(transformers, found or fallback[medium])()


def _remade(processor: Processor, **changes: Any) -> Processor:
    """Return the processor with some values of its config replaced."""
    inner = processor.inner
    with quiet():
        return Processor(type(inner).from_dict({**inner.to_dict(), **changes}), processor.medium)


def _resized(processor: Processor, model: Any) -> Processor:
    """Return a processor whose outputs have the size of the model's inputs, with the same ratio of crop and picture."""
    shape = input_shape(model)
    if processor.medium == "sounds":
        return _resized_sounds(processor, shape)
    made = processor.probe(shape)
    if tuple(made.shape[-2:]) == tuple(shape[-2:]):
        return processor
    height, width = shape[-2:]
    crops = bool(getattr(processor.inner, "do_center_crop", False))
    size = dict(processor.inner.to_dict().get("size") or {})
    if not crops:
        return _remade(processor, size={"height": height, "width": width})
    larger = {name: round(value * height / made.shape[-2]) for name, value in size.items() if isinstance(value, int)}
    return _remade(processor, size=larger, crop_size={"height": height, "width": width})


def _resized_sounds(processor: Processor, shape: Sequence[int]) -> Processor:
    if hasattr(processor.inner, "max_length"):  # AST: [frames, bands]
        frames, bands = shape
        return _remade(processor, max_length=frames, num_mel_bins=bands)
    bands, frames = shape  # Whisper: [bands, frames]
    seconds = frames * processor.inner.hop_length / processor.rate
    if not math.isclose(seconds, round(seconds)) or seconds < 1:
        return processor
    entries = {"feature_size": bands, "chunk_length": round(seconds), "hop_length": processor.inner.hop_length}
    with quiet():
        return Processor(type(processor.inner)(**entries, sampling_rate=processor.rate), processor.medium)


def _names_of_interpolation() -> dict[int, str]:
    from PIL import Image

    return {int(value): name.lower() for name, value in Image.Resampling.__members__.items()}


def _overridden(processor: Processor, model: Any, overrides: dict[str, Any]) -> Processor:
    """Return a processor with the values of --crop-pct, --crop-mode, --interpolation, --mean and --std."""
    changes: dict[str, Any] = {}
    if "mean" in overrides or "std" in overrides:
        changes |= _normalized(processor, input_shape(model), overrides.get("mean"), overrides.get("std"))
    if "interpolation" in overrides:
        numbers = {name: number for number, name in _names_of_interpolation().items()}
        if overrides["interpolation"] not in numbers:
            raise InputError(
                f"--interpolation {overrides['interpolation']!r} is unknown, but one of {', '.join(numbers)} was expected: choose one"
            )
        changes["resample"] = numbers[overrides["interpolation"]]
    if "crop_pct" in overrides or "crop_mode" in overrides:
        mode, share = overrides.get("crop_mode", "center"), float(overrides.get("crop_pct", 1.0))
        if mode not in ("center", "squash"):
            raise InputError(f"--crop-mode {mode!r} is not known to transformers' processors: give center or squash")
        height, width = processor.probe(input_shape(model)).shape[-2:]
        larger = {"shortest_edge": round(max(height, width) / share)}
        larger = larger if mode == "center" else {"height": round(height / share), "width": round(width / share)}
        changes |= {"do_resize": True, "size": larger}
        changes |= {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    return _remade(processor, **changes)


def _normalized(processor: Processor, shape: Sequence[int], mean: Any, std: Any) -> dict[str, Any]:
    """Return config values that give another mean and deviation of pixels in [0, 1], whatever the processor does before.

    ViViT's processor, for one, first maps pixels to [−1, 1].
    """
    inner = processor.inner
    if not inner.do_normalize:
        processor = _remade(processor, do_normalize=True, image_mean=[0.0] * 3, image_std=[1.0] * 3)
        inner = processor.inner
    own_mean, own_std = processor.normalisation(shape)
    parts = zip(inner.image_mean, inner.image_std, own_mean, own_std, mean or own_mean, std or own_std, strict=True)
    found: list[tuple[float, float]] = []
    for set_mean, set_std, m0, s0, m, s in parts:
        scale = round(set_std / s0, 6)  # of what the processor does to pixels before it normalizes them
        shift = round(set_mean - scale * m0, 6)
        found.append((shift + scale * m, scale * s))
    return {"do_normalize": True, "image_mean": [m for m, _ in found], "image_std": [s for _, s in found]}


def _check_sizes(processor: Processor, shape: Sequence[int], origin: Origin) -> None:
    """Raise before any picture is made if the processor resizes pictures to a size that fills the memory."""
    if processor.medium == "sounds":
        return
    entries = processor.inner.to_dict()
    sizes = [
        size for name in ("size", "crop_size") for size in (entries.get(name) or {}).values() if isinstance(size, int)
    ]
    most = _MOST_LARGER * max(shape[-2:])
    if max(sizes, default=0) > most:
        raise InputError(
            f"the processor of hf:{origin.name} resizes to {max(sizes)} pixels, but the model takes {max(shape[-2:])}, and at most {most} "
            "were expected: give the model's own preprocessor_config.json"
        )


def _check_fits(processor: Processor, model: Any, origin: Origin) -> None:
    """Raise if the model cannot take the processor's outputs: of another shape, although it has no other positions."""
    shape = tuple(input_shape(model))
    made = processor.probe(shape)
    if made.device.type != "cpu" or not bool(made.isfinite().all()):
        odd = "numbers that are not finite" if made.device.type == "cpu" else f"tensors on the device {made.device}"
        raise InputError(
            f"the processor of hf:{origin.name} makes {odd}, but finite numbers on the CPU were expected: correct its "
            "preprocessor_config.json"
        )
    if processor.medium != "sounds":
        height, width = shape[-2:]
        for other in ((height, 2 * width), (2 * height, width)):  # pictures of a batch are stacked
            theirs = processor.probe((*shape[:-2], *other))
            if theirs.shape != made.shape:
                raise InputError(
                    f"the processor of hf:{origin.name} makes inputs of the shape {tuple(theirs.shape)} from oblong {processor.medium}, and "
                    f"{tuple(made.shape)} from square ones, but one shape was expected: add do_resize and do_center_crop, or a size with "
                    "height and width, to its preprocessor_config.json"
                )
    if tuple(made.shape) == shape or (made.dim() == len(shape) and _embeds(model, made)):
        return
    raise InputError(
        f"the processor of hf:{origin.name} makes inputs of the shape {tuple(made.shape)}, but the model takes {shape}: give the model's "
        "own preprocessor_config.json"
    )


@torch.no_grad()
def _embeds(model: Any, made: Tensor) -> bool:
    """Return whether the embeddings of a model take an input of another size than its config's, as DINOv2's do."""
    tower = find_target(model).model
    embeddings = getattr(tower, "embeddings", None)
    first = next(tower.parameters())
    if embeddings is None:
        return False
    try:
        embeddings(made[None].to(first.device, first.dtype))
    except Exception:  # the shapes do not fit
        return False
    return True
