"""What merging costs off the shelf, and what a short fine-tuning with it wins back.

    python examples/finetune.py local-dir:DIR_OF_A_MODEL --data DIR --r 16 [--output runs/finetune]

Three numbers at the same r on the same validation images: the model as it is; fine-tuned with merging; and, as the control,
fine-tuned just as long without merging and merged afterwards. MODEL must know the classes in DIR/train and DIR/val already.
Rows go to benchmarks/results.csv, from which benchmarks/plot.py draws.
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
    """Run the command with `--json`; its rows."""
    code = tokenmerge([*words, "--json", str(rows)])
    if code:
        sys.exit(code)
    found: list[dict[str, Any]] = json.loads(rows.read_text())
    return found


def main() -> None:
    """Evaluate, train twice, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--r", default="16")
    parser.add_argument("--config", default="laptop", help="recipe, or YAML file (%(default)s)")
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
