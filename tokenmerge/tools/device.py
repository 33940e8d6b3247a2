"""Devices, precisions and memory formats, as the commands name them."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmerge.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_device(device: str) -> torch.device:
    """The torch device of that name.

    Raises:
        InputError: if it is unknown or not there.
    """
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(1, device=found)
    except Exception as error:  # each backend that is missing has its own way to say so
        reason = str(error).splitlines()[0][:160]
        raise InputError(
            f"device {device!r} cannot be used here ({reason}): choose another with --device, such as cpu"
        ) from None
    return found


def place(images: Tensor, device: str, dtype: str, channels_last: bool) -> Tensor:
    """Images as the model wants them."""
    images = images.to(device, DTYPES[dtype])
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images
