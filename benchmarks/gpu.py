"""Run all GPU benchmarks and GPU checks within 300 seconds.

    python benchmarks/gpu.py                        # all steps, the most important first
    python benchmarks/gpu.py --steps ops families   # selected steps, or one of the optional ones
    python benchmarks/gpu.py --rehearse             # the same steps with small inputs on a CPU, in under a minute
    python benchmarks/gpu.py --into-results FOLDER  # append the rows of an earlier run to results.csv

It needs PyTorch with Triton, timm, transformers, pytest with pytest-xdist, and hypothesis; tokenmerge need not be
installed. Each step is a process with its own time limit, and a failed step does not stop the next one. Results are written
to rows.jsonl in $OUT (or benchmarks/out) immediately, with the name of the GPU; tables are printed at the end. `make
benchmarks-gpu` also runs the long benchmarks.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_steps
from common import append
from gpu_steps import FURTHER, ROWS, STEPS

from tokenmerge.tools.report import Report

HERE = Path(__file__).parent
SECONDS = 300
PATIENCE = 6
"""How much longer than on a GPU a step of a rehearsal may take: its limits end what hangs and say nothing of a CPU's speed."""


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that a run has written."""
    path = folder / ROWS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def models_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return one table line per model and mode: milliseconds, and speed-ups over the dense and the fastest dense model."""
    times: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    ratios: dict[tuple[str, str], float] = {}
    for row in rows:
        if row.get("what") == "model":
            name = row["model"].removeprefix("vit_").replace("_patch", "/").removesuffix("_224")
            key = (f"{name}@{row['img_size']}", str(row["batch_size"]))
            times.setdefault(key, {}).setdefault(row["mode"], {})[row["variant"]] = row["ms"]
            ratios[key] = row["flops_ratio"]
    lines = []
    for key, modes in times.items():
        best = min(ms["dense"] for ms in modes.values() if "dense" in ms)
        for mode, ms in modes.items():
            if {"dense", "merged"} <= ms.keys():
                figures = (ms["dense"], ms["merged"], ms["dense"] / ms["merged"], best / ms["merged"], ratios[key])
                lines.append([*key, mode, *(f"{figure:.2f}" for figure in figures)])
    return lines


def show(report: Report, rows: list[dict[str, Any]], minutes: list[list[str]]) -> None:
    """Print the tables of a run from its rows."""
    shapes = [
        [
            *(str(row[name]) for name in ("op", "tokens", "head_dim")),
            *(f"{row[n]:.3f}" for n in ("ms", "floor_ms", "over_floor")),
        ]
        for row in rows
        if row.get("what") == "op"
    ]
    if shapes:
        report.table("operations", ("operation", "N", "D", "ms", "floor", "over floor"), shapes)
    forms = [
        [row["form"], str(row["tokens"]), f"{row['ms']:.3f}", f"{row['first_ms']:.0f}", f"{row['tflops']:.0f}"]
        for row in rows
        if row.get("what") == "attention" and "ms" in row
    ]
    if forms:
        report.table("attention", ("form", "N", "ms", "first call, ms", "TFLOP/s"), forms)
    columns = ("model", "batch", "mode", "dense,\nms", "merged,\nms", "/ dense", "/ best\ndense", "FLOPs")
    if lines := models_table(rows):
        report.table("models", columns, lines)
    report.table("steps", ("step", "seconds", "limit", "ended"), minutes)


def measured(step: str, folder: Path, limit: float) -> int | None:
    """Run a step in a separate process, and return its exit code, or `None` after a timeout."""
    command = [sys.executable, str(HERE / "gpu_steps.py"), step, "--out", str(folder)]
    try:
        return subprocess.run(command, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        return None


def rehearsed(step: str, folder: Path, limit: float) -> int | None:
    """Run a step of a rehearsal in a process forked after all imports, which would otherwise take most of the time."""
    processes = multiprocessing.get_context("forkserver")
    process = processes.Process(target=gpu_steps.rehearse, args=(step, folder))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        return None
    return process.exitcode


def run(folder: Path, steps: list[str], rehearse: bool, report: Report) -> list[list[str]]:
    """Run the steps one after the other (two at a time in a rehearsal), and return their durations and outcomes."""
    patience = PATIENCE if rehearse else 1
    deadline = time.monotonic() + patience * SECONDS

    def one(step: str) -> list[str]:
        limit = min(float(patience * {**STEPS, **FURTHER}[step][1]), deadline - time.monotonic())
        start = time.monotonic()
        if limit < 5:
            return [step, "0", "0", "left out: no time"]
        report.say(f"== {step}")
        code = rehearsed(step, folder, limit) if rehearse else measured(step, folder, limit)
        how = "time ran out" if code is None else f"exit code {code}" if code else "well"
        return [step, f"{time.monotonic() - start:.0f}", f"{limit:.0f}", how]

    with concurrent.futures.ThreadPoolExecutor(2 if rehearse else 1) as pool:
        return list(pool.map(one, steps))


def main() -> int:
    """Run the steps and print the tables; return 1 if a step or a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices={**STEPS, **FURTHER}, default=list(STEPS))
    parser.add_argument(
        "--rehearse", action="store_true", help="run the steps with small inputs on a CPU, to check that they work"
    )
    parser.add_argument("--into-results", type=Path, metavar="FOLDER", help="append the rows of a run to results.csv")
    args = parser.parse_args()
    report = Report()
    if args.into_results is not None:
        rows = [row for row in read(args.into_results) if not row["rehearsal"]]
        if not rows:
            report.warn(
                f"{args.into_results / ROWS} holds no rows of a GPU, but those of a run were expected: give its folder"
            )
            return 2
        append(rows)
        report.say(f"{len(rows)} rows appended to results.csv")
        return 0
    if not args.rehearse:
        import torch

        if not torch.cuda.is_available():
            report.warn(
                "PyTorch sees no CUDA device here, but all of this needs one: nothing was run (--rehearse needs none)"
            )
            return 2
    if args.rehearse:
        multiprocessing.set_forkserver_preload(["gpu_steps", "timm", "transformers"])
    folder = Path(os.environ.get("OUT") or HERE / "out")
    folder.mkdir(parents=True, exist_ok=True)
    before = len(read(folder))
    ended = run(folder, args.steps, args.rehearse, report)
    rows = read(folder)[before:]
    show(report, rows, ended)
    report.say(f"{len(rows)} rows in {folder / ROWS}")
    failed = any(row.get("exit_code") for row in rows) or any(step[-1] != "well" for step in ended)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
