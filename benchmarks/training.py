"""Measure time and peak memory of a training step with and without merging.

    python benchmarks/training.py [--device cuda --dtype bfloat16 --compile]

One step is forward, loss, backward and AdamW, under autocast for half precision. The two models have separate weights and take turns.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import timm
import torch
from common import Row, record
from torch.nn import functional as F

import tokenmerge
from tokenmerge.ops.timing import Call, peak_memory
from tokenmerge.tools.device import DTYPES
from tokenmerge.tools.report import Report

MODELS = {
    "cpu": [("deit_small_patch16_224", 13, 16)],
    "cuda": [("deit_small_patch16_224", 13, 256), ("vit_base_patch16_224", 16, 128), ("vit_large_patch16_224", 8, 64)],
}


def step(model: Any, batch: int, args: argparse.Namespace) -> Call:
    """Return a function that runs one training step on random images."""
    model = model.to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randn(batch, 3, 224, 224, device=args.device)
    labels = torch.randint(1000, (batch,), device=args.device)
    forward = torch.compile(model) if args.compile else model
    low = args.dtype != "float32"

    def call() -> None:
        optimizer.zero_grad()
        with torch.autocast(torch.device(args.device).type, DTYPES[args.dtype], enabled=low):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()

    return call


def main() -> None:
    """Measure both models, append the rows to results.csv, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    report = Report()
    for name, r, batch in MODELS["cpu" if args.device == "cpu" else "cuda"]:
        torch.compiler.reset()  # otherwise Dynamo would compile for dynamic batch sizes, which is slower
        model = timm.create_model(name, drop_path_rate=0.1)
        merged = copy.deepcopy(model)
        ratio = tokenmerge.patch(merged, r=r).summary().flops_ratio
        calls = {"dense": step(model, batch, args), "merged": step(merged, batch, args)}
        device = torch.device(args.device)
        for call in calls.values():  # compiles the model, and creates the optimizer's state
            call()
        memory: dict[str, Row] = {n: {"peak_memory_mb": peak_memory(c, device) / 2**20} for n, c in calls.items()}
        columns = {"model": name, "r": r, "batch_size": batch, "dtype": args.dtype, "compile": args.compile}
        rows = record(
            "training", calls, args.device, {**columns, "flops_ratio": ratio}, rounds=args.rounds, extra=memory
        )
        share = rows["merged"]["peak_memory_mb"] / rows["dense"]["peak_memory_mb"]
        report.say(f"{name}, r={r}, batch {batch}: {rows['merged']['speedup']:.2f}x, peak memory x{share:.2f}")


if __name__ == "__main__":
    main()
