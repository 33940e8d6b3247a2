"""Everything that a GPU is needed for, in one command.

    python benchmarks/gpu.py                  # checks, forms of attention, operations, models, training, scaling
    python benchmarks/gpu.py --parts check attention ops
    python benchmarks/gpu.py --parts models --only vit_large   # in pieces, where time is short

The kernels are checked first, and nothing is measured if they are wrong. All rows go to results.csv; the table at the end
is made from it: the merged model, eager and compiled, against the best dense one.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import torch
from common import RESULTS, processor

from tokenmerge.tools.report import Report

HERE = Path(__file__).parent
CUDA = ["--device", "cuda", "--dtype", "bfloat16"]
PARTS = {
    "check": [["-m", "pytest", "-q", "tests/test_ops.py", "tests/test_attention_forms.py"]],
    "attention": [[str(HERE / "attention.py"), *CUDA]],
    "ops": [[str(HERE / "ops.py"), *CUDA]],
    "models": [[str(HERE / "models.py"), *CUDA, "--batch-sizes", "1", "8", "64", "256", "--mode", "max-autotune"]],
    "training": [[str(HERE / "training.py"), *CUDA], [str(HERE / "training.py"), *CUDA, "--compile"]],
    "scaling": [[str(HERE / "scaling.py"), *CUDA]],
}


def table(report: Report, device: str) -> None:
    """The latest rows of the models on this processor."""
    latest: dict[tuple[str, str, int], dict[str, float]] = {}
    with RESULTS.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["benchmark"] == "models" and row["processor"] == device:
                key = (row["model"], row["img_size"], int(row["batch_size"]))
                latest.setdefault(key, {})[row["variant"]] = float(row["ms"])
    lines = []
    for (model, size, batch), ms in latest.items():
        dense = min(ms.get(name, float("inf")) for name in ("dense", "dense compiled"))

        def over(name: str, base: float, ms: dict[str, float] = ms) -> str:
            return f"{base / ms[name]:.2f}" if name in ms else "-"

        overhead = (
            f"{ms['merged compiled'] / ms['sliced compiled']:.2f}"
            if {"merged compiled", "sliced compiled"} <= ms.keys()
            else "-"
        )
        cells = (over("merged", ms.get("dense", dense)), over("merged compiled", dense), overhead)
        lines.append((f"{model}@{size}", str(batch), *cells))
    columns = ("model", "batch", "eager /\neager dense", "compiled /\nbest dense", "overhead,\ncompiled")
    report.table(f"merged models on {device}", columns, lines)


def main() -> int:
    """Run the parts in turn; stops at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", default="", help="only models whose name@size contains this")
    args = parser.parse_args()
    report = Report()
    if not torch.cuda.is_available():
        report.warn("PyTorch sees no CUDA device here, but all of this needs one: nothing was run")
        return 2
    for part in args.parts:
        for command in PARTS[part]:
            more = ["--only", args.only] if part == "models" and args.only else []
            report.say(f"== {part}: {' '.join(command)}")
            code = subprocess.run([sys.executable, *command, *more], cwd=HERE.parent, check=False).returncode
            if code:
                report.warn(f"{part} failed with exit code {code}: the rest was not run")
                return code
    if "models" in args.parts:
        table(report, processor("cuda"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
