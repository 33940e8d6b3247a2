"""Traced passes: the merges and predictions of one input at one setting."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.patching import Handle, patch
from tokenmerge.patching.seen import TokensSeen
from tokenmerge.tools.inputs import check_finite, class_names, has_several_labels, num_classes
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.variants import share_weights
from tokenmerge.tools.visualize.load import Shown
from tokenmerge.tracing.trace import Trace


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
    """Result of one traced pass.

    Attributes:
        title: title of the setting.
        trace: trace of the pass.
        top: the five most likely classes and their probabilities; empty without a classifier.
        gflops: GFLOPs of the pass at the model's own input size.
        class_token: whether the trace holds attention of the class token, and not a mean over all tokens.
    """

    title: str
    trace: Trace
    top: tuple[tuple[str, float], ...]
    gflops: float
    class_token: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Merged:
    """A patched copy of a model that traces its merges.

    Attributes:
        title: title of the setting.
        model: the copy, which shares the weights.
        handle: handle of the patch.
        names: class names, if known.
        classifies: whether the model is a classifier.
        class_token: whether the model has a class token, whose attention can be shown.
    """

    title: str
    model: Any
    handle: Handle
    names: Sequence[str] | None
    classifies: bool
    class_token: bool

    @functools.cached_property
    def gflops(self) -> float:
        """GFLOPs of one pass."""
        return self.handle.summary().flops_after / 1e9

    @torch.inference_mode()
    def look(self, shown: Shown) -> Look:
        """Run one pass on an input."""
        with TokensSeen(self.model) if self.handle.summary().adaptive else contextlib.nullcontext() as seen:
            output = self.model(shown.batch)
        gflops = self.gflops if seen is None else seen.mean_flops / 1e9
        top = top_of(output, self.names, self.title, has_several_labels(self.model)) if self.classifies else ()
        return Look(self.title, self.handle.trace, top, gflops, self.class_token)


def merged_copies(
    model: Any, settings: Sequence[Setting], fields: dict[str, Any], attention: bool = False
) -> list[Merged]:
    """Return one patched copy for each setting.

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
    """Return whether the model is a classifier."""
    return bool(num_classes(model))


def class_names_of(model: Any) -> list[str] | None:
    """Return the class names in words; `None` without a classifier or if they are unknown."""
    if not classifies(model):
        return None
    names = class_names(model)
    if hasattr(model, "pretrained_cfg"):
        from timm.data import ImageNetInfo, infer_imagenet_subset

        subset = infer_imagenet_subset(model)
        if names is None and subset is not None:
            return [str(one).split(",")[0] for one in ImageNetInfo(subset).label_descriptions()]
        if names is not None and all(re.fullmatch(r"n\d{8}", name) for name in names):  # WordNet ids
            words = ImageNetInfo("imagenet-12k")
            return [(words.label_name_to_description(name) or name).split(",")[0] for name in names]
    return names


def top_of(
    output: Any, names: Sequence[str] | None, title: str, several: bool = False
) -> tuple[tuple[str, float], ...]:
    """Return the five most likely classes and their probabilities; empty if the output has no logits.

    Args:
        output: output of a classifier for one input.
        names: class names, if known.
        title: setting that the model ran with, for the message.
        several: whether an input may have several labels, so that each class has a probability of its own.

    Raises:
        InputError: if an output is NaN or infinite.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        return ()
    check_finite(logits, title)
    one = logits[0].float()
    share, order = (one.sigmoid() if several else one.softmax(dim=0)).sort(descending=True, stable=True)
    return tuple(
        (names[index] if names is not None and index < len(names) else f"class {index}", value)
        for value, index in zip(share[:5].tolist(), order[:5].tolist(), strict=True)
    )
