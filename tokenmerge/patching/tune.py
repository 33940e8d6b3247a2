"""Choosing the form of attention by measuring it on the user's own model, inputs and device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tokenmerge.attention_forms import FORMS
from tokenmerge.errors import ConfigError, InputError
from tokenmerge.timing import Call, Spread, take_turns


def measure_forms(
    model: nn.Module,
    use: Callable[[str], None],
    inputs: tuple[Any, ...],
    options: dict[str, Any],
    forms: Sequence[str] | None,
    rounds: int,
) -> dict[str, float]:
    """Median seconds of a forward pass with each form that can run; they take turns.

    Args:
        model: the patched model.
        use: makes the model use a form; raises `ConfigError` if it cannot.
        inputs: positional arguments of a forward pass.
        options: its keyword arguments.
        forms: which forms to try; `None` tries all.
        rounds: measured passes per form, after one that is not.

    Raises:
        InputError: if no form is left, or `rounds` is not positive.
    """
    if rounds < 1:
        raise InputError(f"rounds={rounds}, but at least one pass of each form must be measured: use 5 or more")
    device = next(model.parameters()).device
    wanted = [form for form in FORMS if form != "auto"] if forms is None else list(forms)
    tried: list[str] = []
    for form in wanted:
        try:
            use(form)
        except ConfigError:
            if forms is not None:
                raise
            continue
        with torch.inference_mode():
            model(*inputs, **options)
        tried.append(form)
    if not tried:
        raise InputError(f"forms={list(wanted)}, but none of them can run here: use forms=None to try all")

    def one(form: str) -> Call:
        def call() -> None:
            use(form)
            with torch.inference_mode():
                model(*inputs, **options)

        return call

    times = take_turns([one(form) for form in tried], device, warmup=0, rounds=rounds)
    return {form: Spread.of(measured).p50 for form, measured in zip(tried, times, strict=True)}
