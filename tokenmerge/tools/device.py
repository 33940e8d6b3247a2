"""Devices, dtypes and memory formats of the commands."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmerge.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_device(device: str) -> torch.device:
    """Return the torch device of a name, after checking that it works.

    Raises:
        InputError: if the device is unknown or not available.
    """
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(1, device=found)
    except Exception as error:  # every missing backend raises its own exception type
        reason = str(error).splitlines()[0][:160]
        raise InputError(
            f"device {device!r} cannot be used here ({reason}): choose another with --device, such as cpu"
        ) from None
    return found


def place(images: Tensor, device: str, dtype: str, channels_last: bool) -> Tensor:
    """Return the images on a device, with a dtype and memory format."""
    images = images.to(device, DTYPES[dtype])
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images
