"""Whether a run is the paper's: published figures belong to its model, weights and images, and are shown beside no others."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenmerge.errors import InputError
from tokenmerge.files import read_json
from tokenmerge.tools.compare.paper.experiments import Entry
from tokenmerge.tools.compare.paper.models import Model
from tokenmerge.tools.compare.paper.rows import setting_of
from tokenmerge.tools.reading.documents import read_yaml
from tokenmerge.tools.report import Row
from tokenmerge.tools.train.options import recipes

IMAGES = 50_000
"""Images of the validation split of ImageNet-1k."""
_PER_CLASS = 50
_TOLERANCE = 0.5
"""Most points by which a measured top-1 may differ from the published one of the same weights and images."""
_TRAINING = (1_281_167, 1000)
"""Images and classes of the training split of ImageNet-1k."""
_FREE = frozenset({"batch_size", "grad_accum_steps", "workers", "amp", "amp_dtype"})
"""Values of a recipe that the hardware decides, as long as the global batch is the same."""
_DATASETS = re.compile(
    r"(hfi?ds/((ILSVRC/)?imagenet-1k|timm/imagenet-1k-wds)|tfds/imagenet2012)(:[\w.]+)?", re.IGNORECASE
)
"""Names of ImageNet-1k in timm."""


def synsets() -> list[str]:
    """Return the 1,000 WordNet names of ImageNet-1k in the order of its labels."""
    from timm.data.imagenet_info import ImageNetInfo

    return [str(name) for name in ImageNetInfo("imagenet-1k").label_names()]


def other_data(images: Any, options: Any, scored: int) -> str:
    """Return which data these are; empty if they are all images of the validation split of ImageNet-1k.

    Args:
        images: the images of the run.
        options: options of the data.
        scored: number of images that were scored.
    """
    found = f"{scored:,} {images.dataset.medium.name} of {options.place}"
    if scored != IMAGES or images.skipped or options.limit is not None or images.dataset.medium.name != "images":
        return found
    if options.dataset is not None:
        known = _DATASETS.fullmatch(options.dataset) and options.split.lower() in ("validation", "val")
        return "" if known and options.class_map is None else f"{found}, split {options.split}"
    names = synsets()
    count = collections.Counter(path.parent.name for path, _ in images.dataset.samples)
    whole = set(count) == set(names) and set(count.values()) == {_PER_CLASS}
    return "" if whole and list(images.dataset.names) == names else f"{found} (of {len(count):,} classes)"


def changed(options: Any) -> str:
    """Return which options make the lines other ones than the paper's; empty if none does."""
    flags = ["prop_attn", "preset", "matcher", "set", "img_size", "class_map"]
    given = [name for name in flags if getattr(options, name)] + (["dtype"] if options.dtype != "float32" else [])
    return " and ".join(f"--{name.replace('_', '-')}" for name in given)


def other_training(model: Model, weights: Path) -> str:
    """Return what makes the training of a run's weights another than its recipe on ImageNet-1k; empty if nothing does.

    Args:
        model: a model whose weights are a run of `train`, or any other, for which there is nothing to compare.
        weights: folder of `--weights`.
    """
    if not model.trained_here:
        return ""
    record = (weights / model.file).parent / "run.json"
    try:
        found = read_json(record, "the record of the training")
        args, data = found["args"], found["data"]
        batch = args["batch_size"] * args["grad_accum_steps"] * found["processes"]
        wanted = {**read_yaml(recipes()[model.recipe], "the recipe"), **({} if model.r is None else {"r": model.r})}
        odd = [name for name in wanted if name not in _FREE and _plain(args.get(name)) != _plain(wanted[name])]
        odd += ["global batch"] if batch != model.global_batch else []
        odd += ["data"] if (data["images"], data["classes"]) != _TRAINING else []
    except (InputError, KeyError, TypeError, AttributeError):
        return f"{model.title} from a training without a record at {record}"
    return f"{model.title} from a training with another {' and another '.join(odd)} than its recipe" if odd else ""


def _plain(value: Any) -> Any:
    """Return a value as both JSON and YAML give it."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return value if isinstance(value, bool) or value is None else str(value)


def disagreement(entry: Entry, rows: Sequence[Row]) -> str | None:
    """Return how the measured top-1 differs from the published one of the same line at the same r; empty if it agrees.

    The unmerged model decides, or the first line with a figure if none is published for it. `None` says that there is no
    figure to compare with.
    """
    published = {(line.label, setting_of(line)): line.published for line in entry.lines if line.runs}
    published["unmerged", "r=0"] = entry.unmerged
    known = [(row, published.get((row["method"], row["setting"]))) for row in rows]
    for row, figure in known:
        if figure is not None and figure.top1 is not None:
            if abs(row["top1"] - figure.top1) <= _TOLERANCE:
                return ""
            setting = "unmerged" if row["method"] == "unmerged" else f"{row['method']}, {row['setting']}"
            return (
                f"{entry.model.title} ({setting}) has top-1 {row['top1']:.2f} here, but {figure.top1:.2f} is published"
            )
    return None


def belonging(models: Sequence[Model]) -> str:
    """Return in words what the published figures of models belong to."""
    data = {"images": f"ImageNet-1k ({IMAGES:,} images)", "videos": "Kinetics-400", "sounds": "AudioSet"}
    words = [one.stands_in or one.title for one in models]
    named = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if len(words) < 4 else ""
    named = named or f"the paper's {len(words)} models"
    return named if models[0].stands_in else f"{named} on {data[models[0].medium]}"
