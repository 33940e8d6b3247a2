"""Choice of the backend of an operation: Triton kernels on GPUs, functions in C on CPUs, torch everywhere else."""

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
from tokenmerge.ops import native
from tokenmerge.ops.basics import is_exporting

Operation = Literal["match", "merge", "attend"]
LEAST_CAPABILITY = (8, 0)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MISSING = importlib.util.find_spec("triton") is None  # evaluated at import, because Dynamo cannot trace it


def interpreted() -> bool:
    """Return whether Triton runs kernels in its interpreter (`TRITON_INTERPRET=1`): slowly, on any device, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def device_refusal(device: torch.device) -> str | None:
    """Return why the Triton kernels cannot run on a device, or `None` if no reason is known."""
    if _MISSING:
        return "Triton is not installed"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"the tokens are on {device.type!r}, and the kernels need a CUDA device"
    if torch.version.hip is not None:
        return "the device is AMD's, for which the kernels were never compiled"
    if not torch.cuda.is_available():
        return None  # fake tensors may name a device that this machine lacks
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return (
            f"the device has compute capability {capability[0]}.{capability[1]}, and Triton uses matrix units from "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} on"
        )
    return None


_faults: dict[tuple[torch.dtype, str], None] = {}
"""Reasons why kernels did not compile in this process, with the dtype of the tokens."""


def _fault(operation: Operation, index: int, dtype: torch.dtype, heads: int, dim: int) -> str | None:
    """Compile the kernels of an operation for an available GPU; return why they do not compile, or `None` if they do."""
    from tokenmerge.ops import attending, matching, merging

    compile_all = {
        "match": lambda: matching.compiled_for(dtype, heads, dim),
        "merge": lambda: merging.compiled_for(dtype),
        "attend": lambda: attending.compiled_for(dtype, heads, dim),
    }
    try:
        with torch.cuda.device(index):
            for kernel in compile_all[operation]():
                kernel._init_handles()  # loading fails if the GPU has too little shared memory
    except Exception as error:  # Triton, its assembler and the driver raise different classes
        first = (str(error).strip() or repr(error)).splitlines()[0]
        fault = f"the kernels do not compile for {torch.cuda.get_device_name(index)} ({type(error).__name__}: {first})"
        _faults[dtype, fault] = None
        return fault
    return None


def faults(dtype: torch.dtype) -> list[str]:
    """Return why kernels for tokens of a dtype did not compile in this process."""
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
    """Return why the Triton kernels cannot run, as one string; empty if they can."""
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
    """Return `_refusal` and, if `warn`, warn of it; Dynamo treats the result as a constant."""
    text = _refusal(operation, device_type, index, dtype, heads, dim, interpreted())
    if warn and text:
        _warn_once(text)
    return text


@functools.cache
def _warn_once(reason: str) -> None:
    """Warn once per process and reason that the kernels do not run on a GPU."""
    warnings.warn(
        f"tokenmerge's Triton kernels do not run here, so plain torch matches and merges, more slowly: {reason}. "
        "backend='torch' chooses that and says nothing",
        stacklevel=2,
    )


def triton_refusals(x: Tensor, operation: Operation = "merge", warn: bool = False) -> list[str]:
    """Return the reasons why the Triton kernels cannot run an operation; empty if they can.

    Args:
        x: the main input: keys `[B, N, D]` or `[B, H, N, D]` for "match", tokens for "merge", queries `[B, H, N, D]` for
            "attend"; only dtype, device and shape count.
        operation: the operation.
        warn: whether to warn of the reasons, once each; export causes no warning.
    """
    heads = x.shape[1] if operation != "merge" and x.dim() == 4 else 1
    dim = x.shape[-1] if operation != "merge" else 0
    found = _asked(operation, x.device.type, x.device.index, x.dtype, heads, dim, warn)
    reasons = [found] if found else []
    if is_exporting():
        reasons.append("the model is being exported, and exported programs hold plain operators only")
    return reasons


def takes_triton(backend: str, x: Tensor, operation: Operation = "merge") -> bool:
    """Return whether an operation runs in Triton kernels.

    Args:
        backend: "torch" and "c" never use Triton; "auto" uses it on a GPU where it can run, and else warns once; "triton"
            requires it.
        x: the main input, as for `triton_refusals`.
        operation: the operation.

    Raises:
        ConfigError: if `backend="triton"` cannot run (the message lists the reasons), or the backend is unknown.
    """
    if backend in ("torch", "c"):
        return False
    if backend == "auto":
        # GPUs only: fused kernels save launches there, and the interpreter is for tests that request it
        return x.is_cuda and not triton_refusals(x, operation, warn=True)
    if backend != "triton":
        raise ConfigError(f"backend={backend!r}, but it must be one of {', '.join(get_args(Backend))}")
    reasons = triton_refusals(x, operation)
    if reasons:
        raise ConfigError(f"backend='triton' cannot run: {'; '.join(reasons)}: use backend='auto'")
    return True


def c_refusals(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the reasons why the functions in C cannot run on tokens of a device and dtype; empty if they can."""
    if device.type != "cpu":
        return [f"the tokens are on {device.type!r}, and the functions in C run on CPUs"]
    reason = native.refusal() or native.dtype_refusal(dtype)
    return [reason] if reason else []


def takes_c(backend: str, x: Tensor) -> bool:
    """Return whether an operation runs in C: for backends "auto" and "c", in plain eager code on a CPU.

    Code that is traced or compiled uses torch even with "c", because only operators enter a graph.

    Args:
        backend: the backend.
        x: the main input; only dtype, device and kind of tensor count.

    Raises:
        ConfigError: if `backend="c"` can never run on such tokens; the message lists the reasons.
    """
    if backend == "auto":
        return native.fits(x)
    if backend != "c":
        return False
    if native.fits(x):
        return True
    if not torch.compiler.is_compiling() and (reasons := c_refusals(x.device, x.dtype)):
        raise ConfigError(f"backend='c' cannot run: {'; '.join(reasons)}: use backend='auto'")
    return False
