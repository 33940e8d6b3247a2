"""`Handle`, the controls of a patched model."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tokenmerge.config import FIELDS, MergeConfig
from tokenmerge.errors import InputError, PatchError
from tokenmerge.patching.added import matching_flops
from tokenmerge.patching.check import attention_choice
from tokenmerge.patching.decisions import log_settings
from tokenmerge.patching.entering import check_blocks, count_again
from tokenmerge.patching.install import remove_hooks, restore
from tokenmerge.patching.kept import forget, keep
from tokenmerge.patching.log import logger
from tokenmerge.patching.match import cost_of
from tokenmerge.patching.record import RECORD, ModelRecord
from tokenmerge.patching.running import is_running
from tokenmerge.patching.settings import backend_choice, matching_in_words, prop_attn_choice, settings_for
from tokenmerge.patching.summary import Summary, summarize
from tokenmerge.patching.swap import original_class
from tokenmerge.patching.target import (
    Target,
    check_is_module,
    find_target,
    patch_of,
    patched_inside,
)
from tokenmerge.patching.tuning.record import Tuning
from tokenmerge.patching.tuning.run import Tuner, Wishes, describe, loaded
from tokenmerge.schedule import Schedule
from tokenmerge.tracing.trace import Trace

turns = threading.RLock()
"""Lock under which patching, updating and unpatching run one at a time in a process; forward passes never wait for it."""


class Handle:
    """Controls of a patched model. A handle holds no state of its own, so a model may have any number of them.

    Every field of `MergeConfig` is a property: `handle.r` reads it, and `handle.r = 8` is short for `handle.update(r=8)`.
    """

    __slots__ = ("_model", "_record")

    _model: nn.Module
    _record: ModelRecord

    def __init__(self, model: nn.Module, record: ModelRecord) -> None:
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_record", record)

    def _live(self) -> tuple[Any, ModelRecord]:
        if patch_of(self._model) is not self._record:
            raise PatchError(
                "this handle's model is no longer patched by it (removed, unpatched, or patched anew): "
                "get the current handle with tokenmerge.handle_of(model), or patch the model again"
            )
        count_again(self._record, self._model)
        return self._model, self._record

    def __getattr__(self, name: str) -> Any:
        if name in FIELDS:
            return getattr(self.config, name)
        raise AttributeError(f"a handle has no {name!r:.200}; it has {', '.join(FIELDS)}, and what dir(handle) lists")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in FIELDS:
            raise AttributeError(f"{name!r:.200} cannot be set on a handle, but one of {', '.join(FIELDS)} can")
        self.update(**{name: value})

    @property
    def config(self) -> MergeConfig:
        """Settings in force."""
        return self._live()[1].settings.config

    @property
    def schedule(self) -> Schedule:
        """Requested r per block at the model's own input size; `summary()` shows r after it is cut to the possible maximum."""
        model, record = self._live()
        return record.settings.schedule_for(record.family.tokens(model))

    @property
    def has_class_token(self) -> bool:
        """Whether the first token is a class token."""
        return self._live()[1].settings.class_token

    def update(self, config: MergeConfig | None = None, **fields: Any) -> None:
        """Change the settings without patching again; forward passes in progress keep the settings that they began with.

        If one gradient checkpoint holds the whole model, call `backward` first: it begins such a pass anew.

        Args:
            config: settings to start from; `None` starts from the current ones.
            **fields: fields of `MergeConfig` to change.

        Raises:
            ConfigError: if a value is invalid; the model then keeps its old settings.
            UnknownFieldError: (a TypeError) if a keyword is not a field of `MergeConfig`.
            PatchError: if the model is no longer patched, or its blocks were exchanged since.

        Example:
            >>> import timm, tokenmerge
            >>> handle = tokenmerge.patch(timm.create_model("deit_tiny_patch16_224", depth=2, img_size=96), r=8)
            >>> handle.update(r=4)
            >>> handle.schedule
            (4, 4)
        """
        with turns:
            model, record = self._live()
            config = MergeConfig.create(record.settings.config if config is None else config, **fields)
            check_blocks(record, record.settings.layers, model)
            target = _target(model, record)
            record.settings = settings_for(target, config, record.readers)
            record.latest = record.tuned = None
            keep(model, record)
            log_settings(target, record.settings)

    def tune(
        self,
        *inputs: Any,
        schedule: bool = False,
        judge: Any = None,
        load: Tuning | str | os.PathLike[str] | None = None,
        forms: Sequence[str] | None = None,
        backends: Sequence[str] | None = None,
        rounds: int = 7,
        call: Callable[..., Any] | None = None,
        **options: Any,
    ) -> Tuning:
        """Measure on these inputs which form of attention and which backend is fastest, and use them from now on.

        Neither changes the result. With `schedule=True`, also choose where to merge as many tokens (in every block as asked, or
        in every 2nd, 3rd or 4th), and whether: a model that is not at least 2 % faster than unmerged gets r=0. Without a judge,
        no block gets fewer tokens than was asked for. The choice holds for inputs of this shape; `update` ends it.

        Args:
            *inputs: positional arguments of a forward pass, of the shape, dtype and device of later ones.
            schedule: whether to choose a schedule.
            judge: images, a pair of images and labels `[B]` int64, or several of these: a schedule is chosen only if it moves the
                predictions on them no more than the asked one does, by KL divergence and by correct labels.
            load: a `Tuning`, or the path of a saved one, to use without measuring, as other processes do.
            forms: values of `MergeConfig.attention` to measure; `None` measures all that can run here.
            backends: values of `MergeConfig.backend` to measure; `None` measures all that can run here.
            rounds: rounds in which all alternatives take turns.
            call: function that is timed in place of the model, such as a compiled version of it.
            **options: keyword arguments of a forward pass.

        Returns:
            The record: what was tried, times, device, versions, and what was chosen.

        Raises:
            ConfigError: if one of the given `forms` or `backends` cannot run here.
            InputError: if the model merges nothing, an argument is invalid, or `load` is of another model, setting or input.
        """
        wishes = Wishes(schedule, judge, forms, backends, rounds, call, load)
        wishes.check()
        with turns:
            model, record = self._live()
            target, before = _target(model, record), record.settings
            if load is not None:
                tuning = loaded(target, record, load, describe(inputs, options), schedule)
            else:
                try:
                    with torch.inference_mode():
                        tuning = Tuner(target, record, wishes, inputs, options).tune()
                finally:
                    record.settings = before
            self.update(**tuning.chosen)
            record.tuned = tuning
            logger.info("%s: %s", original_class(model).__name__, tuning.words)
            return tuning

    def remove(self) -> None:
        """Restore the model to its exact state before patching.

        With gradient checkpointing, call `backward` first: it runs the blocks again, which must still be patched.

        Raises:
            PatchError: if this handle's patch is gone already, or a forward pass of the model is running.
        """
        with turns:
            model, record = self._live()
            take_off(model, record)

    def summary(self, input_size: int | Sequence[int] | None = None) -> Summary:
        """Return the blocks patched, r and tokens per block, and FLOPs with and without merging; `print` shows a table.

        Args:
            input_size: pixels (or frames) of an input along each axis of the grid, `(height, width)` or `(frames, height,
                width)`, or one number for all axes; `None` is the model's own size.

        Raises:
            InputError: if the number of tokens cannot be known before a forward pass.
            PatchError: if the blocks were exchanged since patching.

        Example:
            >>> import timm, tokenmerge
            >>> handle = tokenmerge.patch(timm.create_model("deit_tiny_patch16_224", depth=2, img_size=96), r=8)
            >>> handle.summary().tokens
            (37, 29, 21)
        """
        model, record = self._live()
        check_blocks(record, record.settings.layers, model)
        settings, target = record.settings, _target(model, record)
        cost = cost_of(target, settings.config, settings.full_output).at(target.tokens_at(input_size))
        schedule = settings.schedule_for(cost.tokens)
        grid = target.grid_at(input_size)
        return summarize(
            settings,
            model=original_class(model).__name__,
            pooling=target.family.pooling(model),
            proportional=prop_attn_choice(target, settings.config),
            choice=attention_choice(target, settings.config),
            backend=backend_choice(target, settings.config),
            matcher=matching_in_words(settings.config),
            schedule=schedule,
            cost=cost,
            matching=matching_flops(target, settings, cost.counts(schedule), grid),
            input_size=input_size,
            tuned=None if record.tuned is None else record.tuned.words,
        )

    def output_tokens(self, layer: int = -1, input_size: int | Sequence[int] | None = None) -> int:
        """Return the number of tokens per image that leave a block, prefix tokens included; no forward pass is needed.

        A language model must reserve as many for an image if its vision tower is patched with `output="merged"`.

        Args:
            layer: index into `hidden_states`: 0 is the input of the first block, −1 the output of the last.
            input_size: see `summary`.

        Raises:
            InputError: if there is no such layer, or the number of tokens cannot be known before a forward pass.
        """
        model, record = self._live()
        settings, target = record.settings, _target(model, record)
        tokens = target.tokens_at(input_size)
        if settings.entry.adaptive and not settings.full_output:
            raise InputError(
                f"how many tokens matcher {settings.entry.name!r} leaves depends on what is in the images: run the model, and look "
                "at the features that leave it"
            )
        counts = settings.cost.at(tokens).counts(settings.schedule_for(tokens))
        if not isinstance(layer, int) or isinstance(layer, bool) or not -len(counts) <= layer < len(counts):
            raise InputError(
                f"layer {layer!r:.200} is none of the {len(counts)} hidden states of this model: give −1 for the last"
            )
        return tokens if settings.full_output else counts[layer]

    @property
    def trace(self) -> Trace:
        """Trace of the latest complete forward pass; methods that take features describe the pass that computed them.

        Raises:
            PatchError: if tracing is off.
        """
        record = self._live()[1]
        if not record.settings.traces:
            raise PatchError(
                "tracing is off for this model: turn it on with handle.update(trace=True), then run the model"
            )
        return Trace(record.latest)

    def __reduce__(self) -> tuple[Any, ...]:
        return handle_of, (self._model,)  # a copy controls the model that was copied with it

    def __repr__(self) -> str:
        name = original_class(self._model).__name__
        if patch_of(self._model) is not self._record:
            return f"<Handle of {name}: removed>"
        changed = self._record.settings.config.changed()
        return f"<Handle of {name}: {', '.join(f'{field}={value!r:.200}' for field, value in changed.items())}>"


def _target(model: nn.Module, record: ModelRecord) -> Target:
    """Return the patched model as a target, with the cost of the classifier that surrounded it when it was patched."""
    return dataclasses.replace(find_target(model), around=record.around)


def take_off(model: nn.Module, record: ModelRecord) -> None:
    """Restore a model, unless a merging pass is running, whose tokens the restored blocks would misread."""
    before = record.settings  # with r=0, no new pass can begin to merge between the check below and the end
    record.settings = dataclasses.replace(before, config=MergeConfig.create(before.config, r=0, trace=False))
    if is_running(model):
        record.settings = before
        raise PatchError(
            "a forward pass of this model is running, whose merged tokens the unpatched blocks would misread: wait for it to "
            "end, then remove the patch"
        )
    for reference in record.embeddings:
        if (embedding := reference()) is not None:
            vars(embedding).pop(RECORD, None)
            remove_hooks(embedding)
    forget(model, record)
    restore(model)


def handle_of(model: nn.Module) -> Handle:
    """Return a handle of the patched model in `model`, for instance of a deep copy.

    Raises:
        PatchError: if `model` contains no patched model, or several.
    """
    check_is_module(model)
    found = patched_inside(model)
    if len(found) != 1:
        names = f" ({', '.join(name or 'the model itself' for name, _ in found)})" if found else ""
        raise PatchError(
            f"{type(model).__name__} holds {len(found)} patched models{names}, but one was expected: pass that one"
        )
    module = found[0][1]
    record = patch_of(module)
    assert record is not None
    return Handle(module, record)
