"""Measure the cost of merging beyond dropping tokens, on the models of the first table in docs/performance.md.

    python benchmarks/overhead.py [--rounds 7] [--processes 5] [--only deit_tiny]
    python benchmarks/overhead.py --against COMMIT   # merged models of this tree against those of COMMIT

Appends one row per model to benchmarks/results.csv and prints the table: five models in float32, whose average is printed, and three
small batches, two of them in bfloat16, where the processor multiplies it. Each model runs in turns with its unmerged version and with
a version that slices off as many tokens; ratios are medians over paired rounds.
Memory placement shifts the ratios of small models by about five percent for the lifetime of a process, regardless of the number
of rounds. Therefore each model is measured in several processes, and the process of median overhead counts.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import CPU_MODELS, SMALL_BATCHES, append, where

from tokenmerge.tools.bench import BenchOptions
from tokenmerge.tools.bench.measure import measure
from tokenmerge.tools.report import Report

HERE = Path(__file__).resolve().parent
VIDEOS = (("hf:videomae-large", None, 65, 1), ("video_mae:vit_large_patch16_224", None, 65, 1))
"""Models of 1,568 patches; slow, so only with --video."""


def one_process(options: BenchOptions) -> list[dict[str, Any]]:
    """Return the rows of one measurement in this process."""
    return measure(options, Report(), options.schedules(), options.merging())


def in_processes(count: int, options: BenchOptions) -> tuple[list[dict[str, Any]], list[float]]:
    """Measure in `count` processes, and return the rows of the one with median overhead, and all overheads."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        runs = [pool.submit(one_process, options).result() for _ in range(count)]
    overheads = [float(run[-1]["overhead"]) for run in runs]
    return runs[overheads.index(statistics.median_low(overheads))], sorted(overheads)


Job = tuple[str, int | None, int, int, str]
"""Model, image size, r, batch and dtype."""


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Yield the models to measure."""
    if args.video:
        yield from ((*video, args.dtype) for video in VIDEOS)
        return
    if not args.latency:
        yield from ((*job, args.dtype) for job in CPU_MODELS if args.only in job[0])
    if args.latency or (args.dtype == "float32" and args.device == "cpu" and not args.compile):
        yield from (job for job in SMALL_BATCHES if args.only in job[0] and _multiplies(job[-1]))


def _multiplies(dtype: str) -> bool:
    """Return whether the processor has instructions for a dtype."""
    return dtype == "float32" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def short(name: str, size: int | None) -> str:
    """Return the name of a model for a table, such as "vit_base@384"."""
    return name.partition("_patch")[0] + (f"@{size}" if size else "")


class Turn:
    """A process of `turns.py` that runs tokenmerge from one source tree."""

    def __init__(self, tree: Path, job: Job) -> None:
        command = [sys.executable, str(HERE / "turns.py"), *(str(word) for word in job)]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        found = self._answer()
        if not Path(found).is_relative_to(tree):
            raise SystemExit(f"{found} was imported, but the tokenmerge of {tree} was expected")

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"a process of {HERE / 'turns.py'} ended before it answered")
        return line

    def seconds(self) -> float:
        """Return the seconds of one pass."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        return float(self._answer())

    def end(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def one_pair(now: Path, then: Path, job: Job, rounds: int, now_first: bool) -> float:
    """Return the median ratio of the times of the merged models of this tree and of the other, in two processes.

    The processes start in varying order, because the order affects memory placement: a tree compared with itself gave 1.03 and
    1.01 in a fixed order.
    """
    started = {tree: Turn(tree, job) for tree in ((now, then) if now_first else (then, now))}
    pair = [started[now], started[then]]
    ratios = []
    for turn in range(rounds + 2):
        order = pair if turn % 2 else pair[::-1]
        seconds = {id(one): one.seconds() for one in order}
        if turn >= 2:
            ratios.append(seconds[id(pair[0])] / seconds[id(pair[1])])
    for one in pair:
        one.end()
    return statistics.median(ratios)


def against(commit: str, args: argparse.Namespace, report: Report) -> None:
    """Compare merged models of this tree with those of a commit in a separate worktree; processes take turns."""
    root = HERE.parent
    table = []
    with tempfile.TemporaryDirectory() as folder:
        then = Path(folder).resolve() / "then"
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(then), commit], cwd=root, check=True)
        try:
            for job in jobs(args):
                pairs = [one_pair(root, then, job, args.rounds, bool(turn % 2)) for turn in range(args.processes)]
                table.append((short(job[0], job[1]), str(job[2]), str(job[3]), job[4], statistics.median(pairs)))
                report.say(f"{table[-1][0]} {table[-1][-1]:.3f} of " + " ".join(f"{one:.3f}" for one in sorted(pairs)))
                names = ("model", "img_size", "r", "batch_size", "dtype")
                row = {**dict(zip(names, job, strict=True)), "variant": f"over {commit}"}
                append([{**where("against", "cpu"), **row, "rounds": args.rounds, "overhead": table[-1][-1]}])
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(then)], cwd=root, check=True)
    if not table:
        raise SystemExit(f"no model's name contains {args.only!r}")
    cells = [[*row[:4], f"{row[4]:.3f}"] for row in table]
    report.table(f"merged, now over {commit}", ("model", "r", "batch", "dtype", "time ratio"), cells)
    report.say(f"mean ratio {statistics.mean(row[4] for row in table):.3f}, at most {max(row[4] for row in table):.3f}")


def main() -> None:
    """Measure the models, append the rows to results.csv, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--only", default="", help="measure only models whose name contains this text")
    parser.add_argument("--latency", action="store_true", help="measure the small batches alone")
    parser.add_argument("--video", action="store_true", help="measure two video models instead of the five models")
    parser.add_argument(
        "--statistic",
        default="median",
        choices=("median", "min"),
        help="median ratio of paired rounds, or ratio of minima",
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--against", metavar="COMMIT", help="compare the merged models with those of a commit instead")
    args = parser.parse_args()
    report = Report()
    if args.against:
        against(args.against, args, report)
        return
    common = where("overhead", args.device)
    table = []
    usual: list[float] = []
    for job in jobs(args):
        name, size, r, batch, dtype = job
        rounds = args.rounds * (8 if job in SMALL_BATCHES and batch == 1 else 1)  # short passes vary more
        options = BenchOptions(
            model=name,
            img_size=size,
            device=args.device,
            dtype=dtype,
            r=[r],
            batch_size=batch,
            warmup=2,
            rounds=rounds,
            statistic=args.statistic,
            compile=args.compile,
        )
        rows, overheads = in_processes(args.processes, options)
        append([{**common, **row} for row in rows])
        merged = rows[-1]
        columns = ("speedup", "flops_ratio", "realised", "overhead")
        table.append(
            [
                short(name, size),
                str(r),
                str(batch),
                dtype,
                *(f"{merged[column]:.3f}" for column in columns),
            ]
        )
        if job not in SMALL_BATCHES:
            usual.append(float(merged["overhead"]))
        report.say(" ".join(table[-1]) + " of " + " ".join(f"{one:.3f}" for one in overheads))
    if not table:
        raise SystemExit(f"no model's name contains {args.only!r}")
    report.table("overhead", ("model", "r", "batch", "dtype", "speed-up", "FLOPs/", "realised", "overhead"), table)
    average = f"on average {statistics.mean(usual):.3f} without the small batches, " if usual else ""
    report.say(f"overhead {average}at most {max(float(row[-1]) for row in table):.3f}")


if __name__ == "__main__":
    main()
