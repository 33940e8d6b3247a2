"""Measure whole models: dense, straightforward token merging, this library and slicing; eager and compiled.

    python benchmarks/models.py                                                   # the five models of docs/performance.md, CPU
    python benchmarks/models.py --device cuda --dtype bfloat16 --batch-sizes 1 8 64 256   # the paper's models

All variants share their weights and take turns in every round; `speedup` is relative to the first variant, which is the eager
dense model unless `--variants` changes it. Variants that run out of memory are left out.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import timm
import torch
from common import CPU_MODELS, GPU_MODELS, Row, record
from straightforward import straightforward
from torch import Tensor

import tokenmerge
from tokenmerge.ops.timing import Call, peak_memory
from tokenmerge.tools.device import DTYPES
from tokenmerge.tools.report import Report
from tokenmerge.tools.variants import share_weights, sliced

VARIANTS = ("dense", "straightforward", "sliced", "merged", "dense compiled", "sliced compiled", "merged compiled")


def variants(
    model: Any, r: int, wanted: list[str], mode: str | None
) -> tuple[dict[str, Callable[[Tensor], Any]], float]:
    """Return the models by variant name, and the FLOPs ratio of the merged model."""
    merged = share_weights(model)
    handle = tokenmerge.patch(merged, r=r)
    eager = {"dense": model, "straightforward": straightforward(model, r), "merged": merged}
    eager["sliced"] = sliced(model, handle.schedule)
    found = {}
    for name in wanted:
        base = name.removesuffix(" compiled")
        found[name] = torch.compile(share_weights(eager[base]), mode=mode) if base != name else eager[base]
    return found, handle.summary().flops_ratio


def compare(name: str, size: int, r: int, batch: int, args: argparse.Namespace) -> dict[str, Row]:
    """Measure all variants of a model, and return the rows by variant."""
    dtype = DTYPES[args.dtype]
    model = timm.create_model(name, img_size=size).eval().to(args.device, dtype)
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(args.device, dtype)
    forwards, flops_ratio = variants(model, r, args.variants, args.mode)

    def one(forward: Callable[[Tensor], Any]) -> Call:
        def call() -> None:
            with torch.inference_mode():
                forward(images)

        return call

    calls = {variant: one(forward) for variant, forward in forwards.items()}
    columns = {
        "model": name,
        "img_size": size,
        "r": r,
        "batch_size": batch,
        "dtype": args.dtype,
        "flops_ratio": flops_ratio,
    }
    memory = {}
    torch.compiler.reset()  # otherwise Dynamo would compile for dynamic batch sizes, which is slower
    for variant in list(calls):
        try:
            calls[variant]()  # compiles
            memory[variant] = peak_memory(calls[variant], images.device) / 2**20
        except torch.OutOfMemoryError:
            print(f"{name}@{size} batch {batch}: memory ran out for {variant}, left out")
            del calls[variant]
            gc.collect()
            torch.cuda.empty_cache()
    extra: dict[str, Row] = {
        name: {"compile": name.endswith("compiled"), "compile_mode": args.mode, "peak_memory_mb": memory[name]}
        for name in calls
    }
    return record("models", calls, args.device, columns, rounds=args.rounds, extra=extra)


def main() -> None:
    """Measure the models, append the rows to results.csv, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        help="batch sizes (default: those of the table on a CPU, otherwise 1 8 64)",
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--mode", help="mode of torch.compile: max-autotune-no-cudagraphs, reduce-overhead, max-autotune"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="measure only models whose name@size contains this text")
    args = parser.parse_args()
    report = Report()
    jobs: list[tuple[str, int, int, int]] = []
    if args.device == "cpu":
        for name, size, r, batch in CPU_MODELS:
            jobs += [(name, size, r, one) for one in args.batch_sizes or [batch]]
    else:
        jobs = [(*model, batch) for model in GPU_MODELS for batch in args.batch_sizes or (1, 8, 64)]
    for name, size, r, batch in jobs:
        if args.only not in f"{name}@{size}":
            continue
        rows = compare(name, size, r, batch, args)
        report.say(f"{name}@{size}, r={r}, batch {batch}, {next(iter(rows.values()))['flops_ratio']:.2f}x fewer FLOPs:")
        report.say("  " + ", ".join(f"{variant} {row['speedup']:.2f}x" for variant, row in rows.items()))


if __name__ == "__main__":
    main()
