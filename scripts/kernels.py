"""Compile every Triton kernel for several GPUs, without these GPUs, and report the resources that it needs.

    python scripts/kernels.py                                   # the whole table (`make kernels`)
    python scripts/kernels.py --targets 90 --dims 64 --dtypes bfloat16 --kernels match_kernel

Each kernel is compiled through its own launcher, with the arguments of a model, by the installed Triton. Kernels are not run,
so neither results nor speed are tested. The exit code is 1 if a kernel does not compile, spills more than 64 bytes of registers
to memory ("stack"), or needs more shared memory than the target has.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if os.environ.pop("TRITON_INTERPRET", "0") == "1":  # Triton reads it on import
    print("TRITON_INTERPRET is set, but an interpreter compiles nothing: it is ignored here", file=sys.stderr)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default of Triton, set explicitly to avoid a warning

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import mangle_type

from tokenmerge.ops import attending, matching, merging
from tokenmerge.ops.launch import INTERPRETED, Launch

MOST_STACK = 64
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory that one program may have, by target (CUDA's programming guide, compute capabilities)."""
DIMS = (32, 64, 72, 80, 88, 96, 128)
DTYPES = ("float32", "bfloat16", "float16")
Row = dict[str, Any]


class Target:
    """Driver for Triton that names a target GPU and has no device."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """Return the target GPU."""
        return self.target

    def get_current_device(self) -> int:
        """Return a different device for each target, because Triton caches compiled kernels by device."""
        return int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        """Return a dummy stream, which Triton requests."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return a dummy device, which Triton requests."""
        return torch.device("cpu")


def launches(dims: list[int], dtypes: list[str]) -> Iterator[tuple[str, Launch]]:
    """Yield the launches of every kernel in models, each with a description of its variant."""
    for name in dtypes:
        dtype = getattr(torch, name)
        for dim in dims:
            heads = 12
            for tokens in (257, 1370):  # the plan in the same launch, and in separate launches
                qkv = torch.empty(2, tokens, 3, heads, dim, dtype=dtype, device="meta")
                for launch in matching.launches(qkv.permute(2, 0, 3, 1, 4)[1], 40, 1)[3]:
                    kernel = launch.kernel.__name__
                    words = [f"D={dim}"] if kernel in ("unit_keys_kernel", "match_kernel") else []
                    words += [name] if kernel == "unit_keys_kernel" else []
                    words += ["and plan" if launch.constants["PLAN"] else "edges"] if kernel == "match_kernel" else []
                    yield " ".join([kernel, *words]), launch
            if name == "float32" or dim != 64:  # the only dtypes and head size that it supports
                continue
            q, k, v = torch.empty(2, 1370, 3, heads, dim, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
            sizes = torch.empty(2, 1, 1376, dtype=dtype, device="meta")[:, :, :1370].expand(2, heads, 1370)
            for launch in attending.launches(q, k, v, sizes):
                yield f"attention_kernel D={dim} {name}", launch
        for sized in (False, True):
            x = torch.empty(2, 1370, 768, dtype=dtype, device="meta")
            logs = (
                (dtype,) if name != "float32" else (dtype, torch.bfloat16, torch.float16)
            )  # the last two occur under autocast
            for log in logs:
                for launch in merging.launches(x, sized, 40, log):
                    size = "sizes" if sized else "no sizes"
                    words = (
                        [name, size, f"log {log}".replace("torch.", "")] if "LOG" in launch.constants else [name, size]
                    )
                    yield " ".join([launch.kernel.__name__, *words]), launch


def resources(cubin: bytes) -> Row:
    """Return the registers and bytes of stack of machine code, as cuobjdump reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK):(\d+)", done.stdout + done.stderr))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"])}


def compile_as_inductor(launch: Launch) -> None:
    """Compile a kernel with the argument types of `torch.compile`, which differ from the types that Triton infers.

    Inductor turns every integer argument of 1 into a constant, in spite of `do_not_specialize`, and passes fractions in float64
    (PyTorch 2.11, for example). Here all integers are 1.
    """
    kernel, constants = launch.kernel, dict(launch.constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    signature: dict[str, str] = dict.fromkeys(constants, "constexpr")
    for name, value in zip(kernel.arg_names, launch.arguments, strict=False):
        if isinstance(value, torch.Tensor):
            signature[name] = mangle_type(value)
        elif isinstance(value, float):
            signature[name] = "fp64"
        else:
            signature[name], constants[name] = "constexpr", 1
    source = triton.compiler.ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants)
    triton.compile(source, target=driver.active.get_current_target(), options=options)


def compile_one(launch: Launch, capability: int, inductor: bool) -> Row:
    """Compile a kernel, and return the resources it needs and its problem, if any."""
    try:
        compiled = launch.compile()
        if inductor:
            compile_as_inductor(launch)
    except Exception as error:  # Triton raises many exception types
        return {"fault": f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"}
    cubin = compiled.asm.get("cubin")
    if not cubin:
        return {"fault": "no machine code came out"}
    row = {**resources(cubin), "shared": int(compiled.metadata.shared)}
    if row["stack"] > MOST_STACK:
        row["fault"] = f"more than {MOST_STACK} bytes of stack"
    elif row["shared"] > SHARED[capability]:
        row["fault"] = f"more shared memory than the {SHARED[capability]} bytes of the target"
    return row


def main() -> int:
    """Compile the kernels, print their resources, and exit with 1 if a kernel fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", type=int, choices=sorted(SHARED), default=sorted(SHARED))
    parser.add_argument("--dims", nargs="+", type=int, default=list(DIMS), help="head sizes")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--kernels", nargs="+", help="names of kernels (default: all)")
    args = parser.parse_args()
    assert not INTERPRETED
    count, faults, seen = 0, 0, set()
    print(f"Triton {triton.__version__}, torch {torch.__version__}")
    print(f"{'target':<8}{'kernel':<58}{'registers':>10}{'stack':>7}{'shared':>8}")
    for capability in args.targets:
        driver.set_active(Target(capability))
        for words, launch in launches(args.dims, args.dtypes):
            if (capability, words) in seen or launch.kernel.__name__ not in (args.kernels or [launch.kernel.__name__]):
                continue
            # each kernel is compiled once with Inductor's types as well
            inductor = (capability, launch.kernel.__name__) not in seen
            seen |= {(capability, words), (capability, launch.kernel.__name__)}
            row, count = compile_one(launch, capability, inductor), count + 1
            cells = "".join(
                f"{row.get(name, '-'):>{width}}" for name, width in (("registers", 10), ("stack", 7), ("shared", 8))
            )
            print(f"sm_{capability:<5}{words:<58}{cells}", flush=True)
            if "fault" in row:
                faults += 1
                print(f"        ^ {row['fault']}", flush=True)
    print(f"{count} kernels compiled for {len(args.targets)} targets, {faults} faults")
    return 1 if faults or not count else 0


if __name__ == "__main__":
    sys.exit(main())
