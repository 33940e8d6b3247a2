"""Tune models with `handle.tune(images, schedule=True)`, and measure the result against unpatched models in rounds of its own.

    python benchmarks/tuning.py [--rounds 15] [--only deit_tiny]

For each model and batch it prints what was chosen, the speed-up over the unpatched model (a separate one, not the patched one with
r=0), and whether the saved record gives the same schedule in another process. Rows go to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from common import append, where

import tokenmerge
from tokenmerge.ops.timing import Spread, take_turns
from tokenmerge.tools.report import Report
from tokenmerge.tools.variants import share_weights

MODELS = (  # model, r, batches
    ("deit_tiny_patch16_224", 13, (1, 16)),
    ("deit_tiny_patch16_224", 2, (1,)),
    ("vit_small_patch16_224", 13, (1, 8)),
    ("vit_base_patch16_224", 16, (1,)),
)
LOAD = """
import sys, timm, tokenmerge
handle = tokenmerge.patch(timm.create_model(sys.argv[1]).eval(), r=int(sys.argv[2]))
handle.tune(load=sys.argv[3], schedule=True)
print(handle.schedule)
"""


def one(name: str, r: int, batch: int, rounds: int, folder: Path) -> tuple[dict[str, Any], str]:
    """Return the row of one model and batch, and what was chosen in words."""
    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    model = share_weights(dense)
    images = torch.randn(batch, 3, 224, 224)
    handle = tokenmerge.patch(model, r=r)
    tuning = handle.tune(images, schedule=True, rounds=rounds)
    tuning.save(folder / "tuning.json")
    words = [sys.executable, "-c", LOAD, name, str(r), str(folder / "tuning.json")]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    with torch.inference_mode():
        times = take_turns([lambda: dense(images), lambda: model(images)], images.device, 2, 2 * rounds)
    gain = Spread.of_ratios(*times)
    row = {
        "model": name,
        "r": r,
        "batch_size": batch,
        "img_size": 224,
        "dtype": "float32",
        "variant": "no merging" if tuning.chosen.get("r") == 0 else "as asked" if "r" not in tuning.chosen else "other",
        "schedule": str(list(handle.schedule)),
        "rounds": 2 * rounds,
        "speedup": gain.p50,
        "speedup_p20": gain.p20,
        "speedup_p80": gain.p80,
        "flops_ratio": handle.summary().flops_ratio,
        "loads": found == str(handle.schedule),
    }
    return row, tuning.words


def main() -> None:
    """Tune, measure, append the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="measure only models whose name contains this text")
    args = parser.parse_args()
    report, rows = Report(), []
    with tempfile.TemporaryDirectory() as folder:
        for name, r, batches in MODELS:
            for batch in batches if args.only in name else ():
                row, words = one(name, r, batch, args.rounds, Path(folder))
                report.say(f"{name}, batch {batch}: {words}")
                rows.append(row)
    append([{**where("tuning", "cpu"), **row} for row in rows])
    cells = [
        [
            row["model"].partition("_patch")[0],
            *(str(row[key]) for key in ("r", "batch_size", "variant")),
            f"{row['speedup']:.2f}x",
            f"{row['speedup_p20']:.2f}-{row['speedup_p80']:.2f}",
            f"{row['flops_ratio']:.2f}",
            "yes" if row["loads"] else "NO",
        ]
        for row in rows
    ]
    columns = ("model", "r", "batch", "merging", "speed-up", "p20-p80", "FLOPs/", "loads")
    report.table("tuned models over unpatched ones", columns, cells)


if __name__ == "__main__":
    main()
