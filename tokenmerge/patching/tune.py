"""Choice of the form of attention by measuring it on the user's model, inputs and device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from tokenmerge.attention.forms import FORMS
from tokenmerge.errors import ConfigError, InputError
from tokenmerge.ops.timing import Spread, take_turns
from tokenmerge.patching.check import attention_choice
from tokenmerge.patching.record import ModelRecord
from tokenmerge.patching.target import Target


def use_form(record: ModelRecord, form: Any) -> None:
    """Switch a model to a form of attention, without any check."""
    config = dataclasses.replace(record.settings.config, attention=form)
    record.settings = dataclasses.replace(record.settings, config=config)


def measure_forms(
    target: Target,
    record: ModelRecord,
    inputs: tuple[Any, ...],
    options: dict[str, Any],
    forms: Sequence[str] | None,
    rounds: int,
) -> dict[str, float]:
    """Measure the median seconds of a forward pass with each form of attention that can run.

    The forms take turns, so that slow drifts affect all alike. The form that ran last stays in use.

    Args:
        target: the patched model.
        record: record of the model.
        inputs: positional arguments of a forward pass.
        options: keyword arguments of a forward pass.
        forms: forms to measure; `None` measures all forms that can run on these inputs.
        rounds: measured passes per form, after one warm-up pass.

    Returns:
        Median seconds per forward pass, by form.

    Raises:
        ConfigError: if one of the given `forms` cannot run here.
        InputError: if `forms` is empty, or `rounds` is not a number from 1 to 10,000.
    """
    if not isinstance(rounds, int) or isinstance(rounds, bool) or not 1 <= rounds <= 10_000:
        raise InputError(
            f"rounds={rounds!r:.60}, but from 1 to 10,000 passes of each form can be measured: use 5 or more"
        )
    if forms is not None and (not isinstance(forms, list | tuple) or not forms):
        raise InputError(f"forms={forms!r:.60}, but a list of forms to measure was expected: use forms=None to try all")
    model, device = target.model, next(target.model.parameters()).device

    @torch.inference_mode()
    def run() -> None:
        model(*inputs, **options)

    tried: list[str] = []
    for form in (form for form in FORMS if form != "auto") if forms is None else forms:
        try:
            use_form(record, form)
            attention_choice(target, record.settings.config)
            run()  # warm-up: compiles kernels, and raises if the form cannot run
        except (
            ConfigError,
            RuntimeError,
        ):  # kernels that refuse a shape, and exhausted memory, raise RuntimeErrors of many kinds
            if forms is not None or form == "mask":
                raise
            continue
        tried.append(form)
    times = take_turns([run] * len(tried), device, 0, rounds, before=lambda which: use_form(record, tried[which]))
    return {form: Spread.of(measured).p50 for form, measured in zip(tried, times, strict=True)}
