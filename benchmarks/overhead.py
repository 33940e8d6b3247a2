"""What merging costs beyond dropping tokens, on the five models of the README's table.

    python benchmarks/overhead.py [--rounds 21] [--only deit_tiny]

Appends one row per model to benchmarks/results.csv and prints the table. Each model runs in turns with its
unmerged version and with the same number of tokens simply sliced off; ratios are of the minima over the rounds.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import timm
import torch

from tokenmerge.tools.bench import BenchArgs, measure
from tokenmerge.tools.models import ModelArgs
from tokenmerge.tools.report import Report
from tokenmerge.tools.settings import parse_setting

RESULTS = Path(__file__).with_name("results.csv")
CONFIGURATIONS = (
    ("deit_tiny_patch16_224", 224, 13, 16),
    ("vit_small_patch16_224", 224, 13, 8),
    ("vit_base_patch16_224", 224, 16, 4),
    ("vit_base_patch16_384", 384, 45, 2),
    ("vit_large_patch16_224", 512, 40, 1),
)
VIDEO = ("hf:videomae-large", None, 65, 1)  # 1,568 tokens; slow, so only with --video


def cpu_name() -> str:
    """The processor as the system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def commit() -> str:
    """Short hash of the commit that is checked out, with a + if files differ from it."""
    here = Path(__file__).parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


def append(rows: list[dict[str, Any]]) -> None:
    """Add rows to results.csv, which is only ever appended to; a new column is left empty in older rows."""
    older: list[dict[str, Any]] = []
    columns: list[str] = []
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            reader = csv.DictReader(file)
            columns, older = list(reader.fieldnames or []), list(reader)
    columns += [name for name in rows[0] if name not in columns]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows([*older, *rows])


def main() -> None:
    """Measure, append, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--video", action="store_true", help="VideoMAE-L instead")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    report = Report()
    common = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "benchmark": "overhead",
        "processor": torch.cuda.get_device_name() if args.device == "cuda" else cpu_name(),
        "python": platform.python_version(),
        "timm": timm.__version__,
    }
    table = []
    for name, size, r, batch in (VIDEO,) if args.video else CONFIGURATIONS:
        if args.only not in name:
            continue
        model = ModelArgs(model=name, img_size=size, device=args.device, dtype=args.dtype)
        bench = BenchArgs(batch_size=batch, warmup=2, rounds=args.rounds, statistic="min", compile=args.compile)
        rows = measure(model, bench, [parse_setting(str(r))], {}, report)
        append([{**common, **row} for row in rows])
        merged = rows[-1]
        columns = ("speedup", "flops_ratio", "realised", "overhead")
        table.append(
            [f"{name}@{size}" if size else name, str(r), str(batch), *(f"{merged[column]:.2f}" for column in columns)]
        )
        report.say(" ".join(table[-1]))
    average = sum(float(row[-1]) for row in table) / len(table)
    report.table("overhead", ("model", "r", "batch", "speed-up", "FLOPs/", "realised", "overhead"), table)
    report.say(f"overhead on average {average:.3f}, at most {max(float(row[-1]) for row in table):.2f}")


if __name__ == "__main__":
    main()
