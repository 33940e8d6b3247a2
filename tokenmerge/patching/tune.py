"""Choosing the form of attention by measuring it on the user's own model, inputs and device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tokenmerge.attention_forms import FORMS
from tokenmerge.errors import ConfigError, InputError


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
    seconds: dict[str, list[float]] = {}
    for form in wanted:
        try:
            use(form)
        except ConfigError:
            if forms is not None:
                raise
            continue
        with torch.inference_mode():
            model(*inputs, **options)
        seconds[form] = []
    if not seconds:
        raise InputError(f"forms={list(wanted)}, but none of them can run here: use forms=None to try all")
    order = list(seconds)
    for turn in range(rounds):
        for step in range(len(order)):
            form = order[(turn + step) % len(order)]
            use(form)
            _synchronize(device)
            start = time.perf_counter()
            with torch.inference_mode():
                model(*inputs, **options)
            _synchronize(device)
            seconds[form].append(time.perf_counter() - start)
    return {form: statistics.median(times) for form, times in seconds.items()}


def _synchronize(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
