"""Shared by all benchmarks: interleaved measurement, and results.csv, to which rows are only appended."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # so that scripts also run from a clone without installation

from tokenmerge.ops.timing import Call, Spread, ratio, take_turns
from tokenmerge.patching.tuning.record import processor_of

Row = dict[str, Any]
RESULTS = Path(__file__).with_name("results.csv")
CPU_MODELS = (  # model, image size, r, batch of the first table in docs/performance.md
    ("deit_tiny_patch16_224", 224, 13, 16),
    ("vit_small_patch16_224", 224, 13, 8),
    ("vit_base_patch16_224", 224, 16, 4),
    ("vit_base_patch16_384", 384, 45, 2),
    ("vit_large_patch16_224", 512, 40, 1),
)
SMALL_BATCHES = (  # the same, and the dtype: one image at a time, and half precision
    ("deit_tiny_patch16_224", 224, 13, 1, "float32"),
    ("vit_small_patch16_224", 224, 13, 1, "bfloat16"),
    ("vit_base_patch16_224", 224, 16, 4, "bfloat16"),
)
GPU_MODELS = (  # model, image size, the r of the paper
    ("vit_small_patch16_224", 224, 13),
    ("vit_base_patch16_224", 224, 16),
    ("vit_large_patch16_224", 224, 8),
    ("vit_large_patch16_224", 384, 23),
    ("vit_large_patch16_224", 512, 40),
    ("vit_huge_patch14_224", 518, 40),
)


def processor(device: str) -> str:
    """Return the name of the processor or GPU that a benchmark runs on."""
    return processor_of(torch.device(device))


def commit() -> str:
    """Return the short hash of the checked-out commit, with a + if files other than the results are modified."""

    def git(*words: str) -> str:
        command = (
            ["git", *words, "--", ".", f":!benchmarks/{RESULTS.name}"] if words[0] == "status" else ["git", *words]
        )
        done = subprocess.run(command, cwd=RESULTS.parents[1], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        found = git("describe", "--always")
    except OSError:  # git is not installed
        return os.environ.get("TOKENMERGE_COMMIT", "unknown")
    changed = "+" if found and git("status", "--porcelain") else ""
    return found + changed or os.environ.get("TOKENMERGE_COMMIT", "unknown")


def where(benchmark: str, device: str) -> Row:
    """Return the columns that describe where a row was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "benchmark": benchmark,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processor": processor(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": importlib.metadata.version("timm"),
        "threads": torch.get_num_threads(),
        "device": device,
    }


def append(rows: list[Row]) -> None:
    """Append rows to results.csv; new columns stay empty in older rows."""
    older: list[Row] = []
    columns: list[str] = []
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            reader = csv.DictReader(file)
            columns, older = list(reader.fieldnames or []), list(reader)
    for row in rows:
        columns += [name for name in row if name not in columns]
    new = RESULTS.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows([*older, *rows])
    new.replace(RESULTS)  # atomic, so that a killed run loses no rows


def record(
    benchmark: str,
    calls: Mapping[str, Call],
    device: str,
    columns: Row,
    *,
    rounds: int,
    warmup: int = 2,
    extra: Mapping[str, Row] | None = None,
) -> dict[str, Row]:
    """Measure calls in turns, append one row per call, and return the rows by variant.

    Args:
        benchmark: value of the column `benchmark`.
        calls: calls to measure by variant name; the first one is the baseline of the speed-up.
        device: device of the calls.
        columns: additional columns of every row.
        rounds: number of measured rounds.
        warmup: number of rounds before them.
        extra: additional columns of single variants.
    """
    times = take_turns(list(calls.values()), torch.device(device), warmup, rounds)
    rows: dict[str, Row] = {}
    for name, seconds in zip(calls, times, strict=True):
        spread, gain = Spread.of(seconds), Spread.of_ratios(times[0], seconds)
        rows[name] = {
            **where(benchmark, device),
            **columns,
            "variant": name,
            "statistic": "median",
            "rounds": rounds,
            "ms": 1e3 * spread.p50,
            "ms_min": 1e3 * min(seconds),
            "ms_p20": 1e3 * spread.p20,
            "ms_p50": 1e3 * spread.p50,
            "ms_p80": 1e3 * spread.p80,
            "speedup": ratio(times[0], seconds, "median"),
            "speedup_p20": gain.p20,
            "speedup_p80": gain.p80,
            **(extra or {}).get(name, {}),
        }
    append(list(rows.values()))
    return rows
