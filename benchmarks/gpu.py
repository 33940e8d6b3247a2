"""Everything that a GPU is needed for, in one command.

    python benchmarks/gpu.py                  # checks, forms of attention, operations, models, training, scaling
    python benchmarks/gpu.py --parts check attention ops
    python benchmarks/gpu.py --parts models --only vit_large_patch16_224@512 --batch-sizes 64 --mode default   # in pieces

Needs PyTorch with Triton, timm, rich, pytest, hypothesis and transformers; tokenmerge need not be installed. The kernels
are checked first, and nothing is measured if they are wrong. All rows go to results.csv; the table at the end is made from
it: the merged model, eager and compiled, against the best dense one.
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
    "models": [[str(HERE / "models.py"), *CUDA]],
    "training": [[str(HERE / "training.py"), *CUDA], [str(HERE / "training.py"), *CUDA, "--compile"]],
    "scaling": [[str(HERE / "scaling.py"), *CUDA]],
}


def table(report: Report, device: str) -> None:
    """The models on this processor, each from its latest run."""
    runs: dict[tuple[str, ...], dict[str, float]] = {}
    made_by: dict[tuple[str, ...], tuple[str, str, str]] = {}
    with RESULTS.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["benchmark"] != "models" or row["processor"] != device:
                continue
            key = tuple(row[name] for name in ("model", "img_size", "r", "batch_size", "dtype"))
            run = (row["date"], row["commit"], row["command"])
            if made_by.get(key) != run:
                runs[key], made_by[key] = {}, run
            runs[key][row["variant"]] = float(row["ms"])
    lines = []
    for (model, size, r, batch, _), ms in runs.items():
        best = min((ms[name] for name in ("dense", "dense compiled") if name in ms), default=None)
        pairs = ((ms.get("dense"), "merged"), (best, "merged compiled"))
        cells = [f"{base / ms[name]:.2f}" if base and name in ms else "-" for base, name in pairs]
        both = {"merged compiled", "sliced compiled"} <= ms.keys()
        overhead = f"{ms['merged compiled'] / ms['sliced compiled']:.2f}" if both else "-"
        lines.append((f"{model}@{size}", r, batch, *cells, overhead))
    columns = ("model", "r", "batch", "eager /\neager dense", "compiled /\nbest dense", "overhead,\ncompiled")
    report.table(f"merged models on {device}", columns, lines)


def main() -> int:
    """Run the parts in turn; stops at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", default="", help="models: only those whose name@size contains this")
    parser.add_argument("--batch-sizes", nargs="+", default=["1", "8", "64", "256"], help="models: batch sizes")
    parser.add_argument(
        "--mode", default="max-autotune", help="models: mode of torch.compile (default, reduce-overhead, …)"
    )
    args = parser.parse_args()
    report = Report()
    if not torch.cuda.is_available():
        report.warn("PyTorch sees no CUDA device here, but all of this needs one: nothing was run")
        return 2
    for part in args.parts:
        for command in PARTS[part]:
            more = (
                ["--only", args.only, "--batch-sizes", *args.batch_sizes, "--mode", args.mode]
                if part == "models"
                else []
            )
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
