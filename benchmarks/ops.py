"""Measure time and memory of matching and merging for N from 196 to 16,384, by backend, with lower bounds.

    python benchmarks/ops.py [--device cuda --dtype bfloat16]

The reference writes all N²/4 similarities and gathers over expanded indices (`straightforward.py`). `floor_ms` is
the longer of the times that the arithmetic and the bytes take at the rates measured in the same run: for matching the product of
A and B or reading K once, for merging reading and writing the tokens once.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import straightforward
import torch
from common import Row, record
from torch import Tensor

from tokenmerge import bipartite_matching
from tokenmerge.ops import triton_refusals
from tokenmerge.ops.timing import Call, peak_memory, take_turns
from tokenmerge.tools.device import DTYPES
from tokenmerge.tools.report import Report

SIZES = {  # tokens: batch size, chosen so that every size takes long enough to measure
    "cpu": {197: 8, 577: 2, 1025: 1, 4097: 1, 16385: 1},
    "cuda": {197: 256, 577: 64, 1025: 64, 1370: 64, 4097: 16, 16385: 4},
}


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Measure the bytes per second of a copy (read plus written) and the multiply-adds per second of a matrix product."""
    numbers, side = (2**24, 1024) if device == "cpu" else (2**28, 8192)
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device).to(dtype)

    copy, product = take_turns([lambda: target.copy_(source), lambda: a @ a], torch.device(device), 3, 9)
    return 8 * numbers / statistics.median(copy), side**3 / statistics.median(product)


def matching_calls(keys: Tensor, r: int, backends: list[str]) -> dict[str, Call]:
    """Return the calls of matching: mean over heads, similarities, plan."""

    def reference() -> Any:
        return straightforward.match(keys.mean(dim=1), r)

    calls: dict[str, Call] = {"reference": reference}
    for backend in backends:
        calls[backend] = lambda backend=backend: bipartite_matching(keys, r, 1, backend=backend)  # type: ignore[misc]
    return calls


def merge_calls(x: Tensor, keys: Tensor, r: int, backends: list[str], backward: bool) -> dict[str, Call]:
    """Return the calls of merging tokens and sizes by a given plan."""
    size = torch.ones(x.shape[:2], device=x.device)
    plan = bipartite_matching(keys, r, 1)
    grad = torch.randn_like(plan.merge(x, size)[0])

    def one(backend: Any) -> Call:
        def call() -> Any:
            with torch.set_grad_enabled(backward):
                out = plan.merge(x, size, backend=backend)[0]
                return torch.autograd.grad(out, x, grad) if backward else out

        return call

    pairs, its_size = straightforward.match(keys.mean(dim=1), r), size.to(x.dtype)

    def reference() -> Any:
        with torch.set_grad_enabled(backward):
            out = straightforward.combine(x, its_size, *pairs)[0]
            return torch.autograd.grad(out, x, grad) if backward else out

    return {"reference": reference, **{backend: one(backend) for backend in backends}}


def main() -> None:
    """Measure all sizes, append the rows to results.csv, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    report, dtype = Report(), DTYPES[args.dtype]
    on_cpu = args.device == "cpu"
    bandwidth, rate = ceilings(args.device, dtype)
    report.say(f"copy {bandwidth / 1e9:.0f} GB/s, product {rate / 1e12:.2f} T multiply-adds/s")
    channels = 64 * args.heads
    for tokens, batch in SIZES["cpu" if on_cpu else "cuda"].items():
        r = tokens // 12
        qkv = torch.randn(batch, tokens, 3, args.heads, 64, device=args.device).to(dtype)
        keys = qkv.permute(2, 0, 3, 1, 4)[1]
        x = torch.randn(batch, tokens, channels, device=args.device).to(dtype).requires_grad_()
        backends = ["torch"] if on_cpu or triton_refusals(x) else ["torch", "triton"]
        itemsize = x.element_size()
        read_keys = keys.numel() * itemsize / bandwidth
        moved = (2 * tokens - r) * batch * channels * itemsize / bandwidth
        work = {
            "matching": (matching_calls(keys, r, backends), max(read_keys, batch * (tokens / 2) ** 2 * 64 / rate)),
            "merge": (merge_calls(x, keys, r, backends, False), moved),
            "merge, backward": (merge_calls(x, keys, r, backends, True), 2 * moved),
        }
        for op, (calls, floor) in work.items():
            shape = {"op": op, "tokens": tokens, "batch_size": batch, "channels": channels, "r": r}
            columns = {**shape, "dtype": args.dtype, "floor_ms": 1e3 * floor, "speedup_over": next(iter(calls))}
            memory: dict[str, Row] = {
                name: {"peak_memory_mb": peak_memory(call, x.device) / 2**20} for name, call in calls.items()
            }
            rows = record("ops", calls, args.device, columns, rounds=args.rounds, extra=memory)
            times = ", ".join(f"{n} {row['ms']:.2f} ({row['peak_memory_mb']:.0f} MiB)" for n, row in rows.items())
            report.say(f"{op}, N={tokens}, B={batch}: {times} ms; floor {1e3 * floor:.2f}")


if __name__ == "__main__":
    main()
