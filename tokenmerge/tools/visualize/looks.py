"""One input through one setting: the trace, and what the model makes of it."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.patching import Handle, patch
from tokenmerge.tools.inputs import class_names, num_classes
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.variants import share_weights
from tokenmerge.tools.visualize.load import Shown
from tokenmerge.tracing.trace import Trace


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
    """What was seen.

    Attributes:
        title: of the setting.
        trace: of the pass.
        top: the five likeliest classes and their probabilities; empty without a classifier.
        gflops: of the pass, at the model's own input size.
        class_token: whether attention in the trace is of a class token, or a mean.
    """

    title: str
    trace: Trace
    top: tuple[tuple[str, float], ...]
    gflops: float
    class_token: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Merged:
    """A copy of a model that merges as a setting says, and notes what it did.

    Attributes:
        title: of the setting.
        model: the copy; it shares the weights.
        handle: of its patch.
        names: of its classes, if known.
        classifies: whether its outputs are classes at all.
        class_token: whether it has a class token, whose attention can be shown.
    """

    title: str
    model: Any
    handle: Handle
    names: Sequence[str] | None
    classifies: bool
    class_token: bool

    @functools.cached_property
    def gflops(self) -> float:
        """Of a pass."""
        return self.handle.summary().flops_after / 1e9

    @torch.inference_mode()
    def look(self, shown: Shown) -> Look:
        """One pass."""
        output = self.model(shown.batch)
        top = top_of(output, self.names) if self.classifies else ()
        return Look(self.title, self.handle.trace, top, self.gflops, self.class_token)


def merged_copies(
    model: Any, settings: Sequence[Setting], fields: dict[str, Any], attention: bool = False
) -> list[Merged]:
    """One for each setting.

    Raises:
        InputError: if two settings are the same.
    """
    titles = [setting.title for setting in settings]
    twice = next((title for title in titles if titles.count(title) > 1), None)
    if twice is not None:
        raise InputError(f"{twice} was given twice to --r: give each setting once")
    names, found = class_names_of(model), []
    for setting in settings:
        copy = share_weights(model)
        handle = patch(copy, setting.config(trace="attention" if attention else True, **fields))
        found.append(Merged(setting.title, copy, handle, names, classifies(model), handle.has_class_token))
    return found


def classifies(model: Any) -> bool:
    """Whether what the model gives are logits of classes."""
    known = hasattr(model, "pretrained_cfg") or hasattr(model, "weights")
    return bool(num_classes(model)) if known else getattr(model, "classifier", None) is not None


def class_names_of(model: Any) -> list[str] | None:
    """`class_names`, for models that may have no classifier; ImageNet's in words."""
    if not classifies(model):
        return None
    names = class_names(model)
    if hasattr(model, "pretrained_cfg"):
        from timm.data import ImageNetInfo, infer_imagenet_subset

        subset = infer_imagenet_subset(model)
        if names is None and subset is not None:
            return [str(one).split(",")[0] for one in ImageNetInfo(subset).label_descriptions()]
        if names is not None and all(re.fullmatch(r"n\d{8}", name) for name in names):  # WordNet's numbers
            words = ImageNetInfo("imagenet-12k")
            return [(words.label_name_to_description(name) or name).split(",")[0] for name in names]
    return names


def top_of(output: Any, names: Sequence[str] | None) -> tuple[tuple[str, float], ...]:
    """The five likeliest classes; nothing where the model gives no logits."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        return ()
    share, order = logits[0].float().softmax(dim=0).sort(descending=True, stable=True)
    return tuple(
        (names[index] if names is not None and index < len(names) else f"class {index}", value)
        for value, index in zip(share[:5].tolist(), order[:5].tolist(), strict=True)
    )
