"""What merging costs beyond dropping tokens, on the five models of the README's table.

    python benchmarks/overhead.py [--rounds 7] [--processes 5] [--only deit_tiny]

Appends one row per model to benchmarks/results.csv and prints the table. Each model runs in turns with its
unmerged version and with the same number of tokens simply sliced off; ratios are medians over paired rounds.
Where a process happens to lie in memory moves the ratios of small models by some five percent for as long as it lives,
whatever the number of rounds; so each model is measured in several processes, and the process of median overhead counts.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import statistics
from typing import Any

from common import CPU_MODELS, append, where

from tokenmerge.tools.bench import BenchArgs, measure
from tokenmerge.tools.models import ModelArgs
from tokenmerge.tools.report import Report
from tokenmerge.tools.settings import parse_setting

VIDEO = ("hf:videomae-large", None, 65, 1)  # 1,568 tokens; slow, so only with --video


def one_process(model: ModelArgs, bench: BenchArgs, r: int) -> list[dict[str, Any]]:
    """The rows of one measurement."""
    return measure(model, bench, [parse_setting(str(r))], {}, Report())


def in_processes(count: int, model: ModelArgs, bench: BenchArgs, r: int) -> tuple[list[dict[str, Any]], list[float]]:
    """The rows of the process whose overhead is the median of `count` processes, one after the other; all overheads."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        runs = [pool.submit(one_process, model, bench, r).result() for _ in range(count)]
    overheads = [float(run[-1]["overhead"]) for run in runs]
    return runs[overheads.index(statistics.median_low(overheads))], sorted(overheads)


def main() -> None:
    """Measure, append, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--video", action="store_true", help="VideoMAE-L instead")
    parser.add_argument(
        "--statistic", default="median", choices=("median", "min"), help="of paired rounds, or of each side"
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    report = Report()
    common = where("overhead", args.device)
    table = []
    for name, size, r, batch in (VIDEO,) if args.video else CPU_MODELS:
        if args.only not in name:
            continue
        model = ModelArgs(model=name, img_size=size, device=args.device, dtype=args.dtype)
        bench = BenchArgs(
            batch_size=batch, warmup=2, rounds=args.rounds, statistic=args.statistic, compile=args.compile
        )
        rows, overheads = in_processes(args.processes, model, bench, r)
        append([{**common, **row} for row in rows])
        merged = rows[-1]
        columns = ("speedup", "flops_ratio", "realised", "overhead")
        table.append(
            [f"{name}@{size}" if size else name, str(r), str(batch), *(f"{merged[column]:.2f}" for column in columns)]
        )
        report.say(" ".join(table[-1]) + " of " + " ".join(f"{one:.3f}" for one in overheads))
    if not table:
        raise SystemExit(f"no model's name contains {args.only!r}")
    average = sum(float(row[-1]) for row in table) / len(table)
    report.table("overhead", ("model", "r", "batch", "speed-up", "FLOPs/", "realised", "overhead"), table)
    report.say(f"overhead on average {average:.3f}, at most {max(float(row[-1]) for row in table):.2f}")


if __name__ == "__main__":
    main()
