"""Which backend runs a hot operation: Triton kernels where they can, plain torch everywhere else."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Literal, get_args

import torch
from torch import Tensor

from tokenmerge.config import Backend
from tokenmerge.errors import ConfigError
from tokenmerge.ops.basics import is_exporting

Operation = Literal["match", "merge", "attend"]
LEAST_CAPABILITY = (8, 0)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MISSING = importlib.util.find_spec("triton") is None  # asked once: Dynamo cannot trace the question


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on any device and slowly; for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def device_refusal(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on that device, or `None` if nothing is known against it."""
    if _MISSING:
        return "Triton is not installed"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"the tokens are on {device.type!r}, and the kernels need a CUDA device"
    if torch.version.hip is not None:
        return "the device is AMD's, for which the kernels were never compiled"
    if not torch.cuda.is_available():
        return None  # tensors without memory, of a device that is not here
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return (
            f"the device has compute capability {capability[0]}.{capability[1]}, and Triton uses matrix units from "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} on"
        )
    return None


_faults: dict[tuple[torch.dtype, str], None] = {}
"""What did not compile in this process, by the dtype of the tokens."""


def _fault(operation: Operation, index: int, dtype: torch.dtype, heads: int, dim: int) -> str | None:
    """Why the kernels of an operation do not compile for a device that is here; in words."""
    from tokenmerge.ops import attending, matching, merging

    compile_all = {
        "match": lambda: matching.compiled_for(dtype, heads, dim),
        "merge": lambda: merging.compiled_for(dtype),
        "attend": lambda: attending.compiled_for(dtype, heads, dim),
    }
    try:
        with torch.cuda.device(index):
            for kernel in compile_all[operation]():
                kernel._init_handles()  # loads it, which fails where its shared memory does not fit
    except Exception as error:  # Triton, its assembler and the driver each have their own
        first = (str(error).strip() or repr(error)).splitlines()[0]
        fault = f"the kernels do not compile for {torch.cuda.get_device_name(index)} ({type(error).__name__}: {first})"
        _faults[dtype, fault] = None
        return fault
    return None


def faults(dtype: torch.dtype) -> list[str]:
    """Why kernels for tokens of that dtype did not compile when they were wanted."""
    return [fault for found, fault in _faults if found == dtype]


@functools.cache
def _refusal(
    operation: Operation,
    device_type: str,
    index: int | None,
    dtype: torch.dtype,
    heads: int,
    dim: int,
    interpreter: bool,
) -> str:
    """Why Triton's kernels do not run there, in one string, empty if they do."""
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    reasons = [reason for reason in (device_refusal(device),) if reason]
    if dtype not in _DTYPES:
        reasons.append(f"the tokens are {dtype}, and the kernels compute float16, bfloat16 and float32")
    if not reasons and not interpreter and torch.cuda.is_available():
        fault = _fault(operation, torch.cuda.current_device() if index is None else index, dtype, heads, dim)
        reasons += [fault] if fault else []
    return "; ".join(reasons)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _asked(
    operation: Operation, device_type: str, index: int | None, dtype: torch.dtype, heads: int, dim: int, warn: bool
) -> str:
    """`_refusal`, and a warning of it; a constant for Dynamo."""
    text = _refusal(operation, device_type, index, dtype, heads, dim, interpreted())
    if warn and text:
        _warn_once(text)
    return text


@functools.cache
def _warn_once(reason: str) -> None:
    """Say once in a process that a GPU does without the kernels."""
    warnings.warn(
        f"tokenmerge's Triton kernels do not run here, so plain torch matches and merges, more slowly: {reason}. "
        "backend='torch' chooses that and says nothing",
        stacklevel=2,
    )


def triton_refusals(x: Tensor, operation: Operation = "merge", warn: bool = False) -> list[str]:
    """Why Triton's kernels cannot run on a tensor like `x`; empty if they can.

    Args:
        x: the keys `[B, N, D]` or `[B, H, N, D]` to match, the tokens to merge, or the queries `[B, H, N, D]` of attention.
        operation: what is to be done with it.
        warn: whether to warn, once for each reason, if they cannot. Exporting is no such reason.
    """
    heads = x.shape[1] if operation != "merge" and x.dim() == 4 else 1
    dim = x.shape[-1] if operation != "merge" else 0
    found = _asked(operation, x.device.type, x.device.index, x.dtype, heads, dim, warn)
    reasons = [found] if found else []
    if is_exporting():
        reasons.append("the model is being exported, and exported programs hold plain operators only")
    return reasons


def takes_triton(backend: str, x: Tensor, operation: Operation = "merge") -> bool:
    """Whether Triton's kernels run on `x`: where they can with "auto", never with "torch".

    With "auto" on a GPU on which they cannot run, warns once.

    Raises:
        ConfigError: if `backend` is "triton" and they cannot run, with the reasons, or if it is unknown.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        # kernels of their own pay where launches are what is slow; the interpreter is for tests that ask for it
        return x.is_cuda and not triton_refusals(x, operation, warn=True)
    if backend != "triton":
        raise ConfigError(f"backend={backend!r}, but it must be one of {', '.join(get_args(Backend))}")
    reasons = triton_refusals(x, operation)
    if reasons:
        raise ConfigError(f"backend='triton' cannot run: {'; '.join(reasons)}: use backend='auto'")
    return True
