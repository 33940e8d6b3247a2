"""Which backend runs a hot operation: Triton kernels where they can, plain torch everywhere else."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

from tokenmerge.errors import ConfigError

Backend = Literal["auto", "torch", "triton"]
BACKENDS = ("auto", "torch", "triton")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


_MISSING = importlib.util.find_spec("triton") is None  # asked once: Dynamo cannot trace the question


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on any device and slowly; for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_refusals(x: Tensor) -> list[str]:
    """Why Triton's kernels cannot run on a tensor like `x`; empty if they can."""
    reasons = []
    if _MISSING:
        reasons.append("Triton is not installed")
    if not x.is_cuda and not interpreted():
        reasons.append(f"the tokens are on {x.device.type!r}, and the kernels need a CUDA or ROCm device")
    if x.dtype not in _DTYPES:
        reasons.append(f"the tokens are {x.dtype}, and the kernels compute float16, bfloat16 and float32")
    if torch.compiler.is_exporting():
        reasons.append("the model is being exported, and exported programs hold plain operators only")
    return reasons


def takes_triton(backend: str, x: Tensor) -> bool:
    """Whether Triton's kernels run on `x`: where they can with "auto", never with "torch".

    Raises:
        ConfigError: if `backend` is "triton" and they cannot run, with the reasons, or if it is unknown.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        # kernels of their own pay where launches are what is slow; the interpreter is for tests that ask for it
        return x.is_cuda and not triton_refusals(x)
    if backend != "triton":
        raise ConfigError(f"backend={backend!r}, but it must be one of {', '.join(BACKENDS)}")
    reasons = triton_refusals(x)
    if reasons:
        raise ConfigError(f"backend='triton' cannot run: {'; '.join(reasons)}: use backend='auto'")
    return True
