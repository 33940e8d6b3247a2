"""Measure the accuracy of merging without training, and after a short fine-tuning with merging.

    python examples/finetune.py local-dir:DIR_OF_A_MODEL --data DIR --r 16 [--output runs/finetune]

It compares three models at the same r on the same validation images: without fine-tuning; fine-tuned with merging; and, as a
control, fine-tuned for as long without merging and merged afterwards. MODEL must already be a classifier of the classes in DIR/train
and DIR/val. Rows are appended to benchmarks/results.csv, from which benchmarks/plot.py draws the figure.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from common import append, where

from tokenmerge.cli import main as tokenmerge
from tokenmerge.tools.report import Report


def run(words: list[str], rows: Path) -> list[dict[str, Any]]:
    """Run a command with `--json`, and return its rows."""
    code = tokenmerge([*words, "--json", str(rows)])
    if code:
        sys.exit(code)
    found: list[dict[str, Any]] = json.loads(rows.read_text())
    return found


def main() -> None:
    """Evaluate, train twice, and print and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--r", default="16")
    parser.add_argument("--config", default="laptop", help="recipe or YAML file of training (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    start = [args.model, "--pretrained"]
    results = {
        "off the shelf": run(
            ["eval", *start, "--data", str(args.data / "val"), "--r", "0", args.r], args.output / "shelf.json"
        )
    }
    for title, r in (("fine-tuned with merging", args.r), ("fine-tuned without", "0")):
        folder = args.output / title.replace(" ", "_")
        words = ["train", *start, "--config", args.config, "--data", str(args.data), "--output", str(folder), "--r", r]
        results[title] = run([*words, "--eval-r", "0", args.r, "--resume", "auto"], args.output / f"r{r}.json")
    name = Path(args.model.partition(":")[2] or args.model).name
    about = {
        **where("finetune", "cpu"),
        "model": name,
        "command": f"finetune.py {name} --config {args.config} --r {args.r}",
    }
    columns = ("r", "top1", "top5", "images")
    append([{**about, "variant": n, **{c: row[c] for c in columns}} for n, rows in results.items() for row in rows])
    lines = [(name, *(f"{row['top1']:.2f}" for row in rows)) for name, rows in results.items()]
    Report().table("top-1 on the validation images", ("model", "r=0", f"r={args.r}"), lines)


if __name__ == "__main__":
    main()
