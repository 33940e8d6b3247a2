"""Autocast, asked and switched off in a way that also works on devices that know no autocast (meta)."""

from __future__ import annotations

import contextlib

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast is casting to on this device right now, or `None`."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast does nothing; free where it is off already."""
    if autocast_dtype(device_type) is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
