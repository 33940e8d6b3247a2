"""Measure how much each candidate for a preset changes the predictions of the unmerged model.

    python benchmarks/presets.py local-dir:MODEL --data TRAIN --photos DIR --speedup 2 2.5

Every candidate uses the constant r that divides its FLOPs by the given factor, so that merging later in a block gives no advantage.
The measure is the KL divergence from the unmerged model's predictions, on images in class folders and on a plain folder of photos;
labels are not used. Differences from plain token merging are paired by image, with 95 % intervals. The script overwrites
benchmarks/presets.csv. `--only NAME …` selects candidates; `--data` with other images confirms a choice.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
from common import commit
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform

from tokenmerge.patching import patch
from tokenmerge.tools.compare import CompareOptions
from tokenmerge.tools.compare.data import Images
from tokenmerge.tools.compare.scoring import score
from tokenmerge.tools.models import load_model
from tokenmerge.tools.report import Report
from tokenmerge.tools.statistics import bootstrap
from tokenmerge.tools.variants import share_weights


def informed(**options: Any) -> dict[str, Any]:
    """Return the fields of the matcher "informed" with the norm-preserving mean."""
    return {"matcher": "informed", "combine": "norm", "options": {"attention_power": 0.0, **options}}


CANDIDATES: dict[str, dict[str, Any]] = {
    "tome": {},
    "norm": {"combine": "norm"},
    "max_norm": {"combine": "max_norm"},
    "norm, order": {"combine": "norm", "order": "spatial"},
    "norm, checkerboard": {"combine": "norm", "partition": "checkerboard"},
    "norm, metric x": {"combine": "norm", "metric": "x"},
    "norm, K and V": {"combine": "norm", "metric": "kv"},
    "norm, K concatenated": {"combine": "norm", "heads": "concat"},
    "norm, after MLP": {"combine": "norm", "place": "after"},
    "norm, K concatenated, after MLP": {"combine": "norm", "heads": "concat", "place": "after"},
    "norm, K concatenated, checkerboard": {"combine": "norm", "heads": "concat", "partition": "checkerboard"},
    "K concatenated, attention 0.5, from 4": {**informed(attention_power=0.5, attention_from=4), "heads": "concat"},
    "K concatenated, tokens 0.5, attention 0.5, from 4": {
        **informed(token_weight=0.5, attention_power=0.5, attention_from=4),
        "heads": "concat",
    },
    "K concatenated, tokens 0.5, attention 0.5, from 4, after MLP": {
        **informed(token_weight=0.5, attention_power=0.5, attention_from=4),
        "heads": "concat",
        "place": "after",
    },
    "attention 0.5, from 4, after MLP": {**informed(attention_power=0.5, attention_from=4), "place": "after"},
    "tokens 0.5, attention 0.5, from 4, after MLP": {
        **informed(token_weight=0.5, attention_power=0.5, attention_from=4),
        "place": "after",
    },
    "attention 0.5": informed(attention_power=0.5),
    "attention 1, from 4": informed(attention_power=1.0, attention_from=4),
    "attention 0.5, from 4": informed(attention_power=0.5, attention_from=4),
    "tokens 0.5": informed(token_weight=0.5),
    "tokens 0.5, attention 0.5": informed(token_weight=0.5, attention_power=0.5),
    "tokens 0.5, attention 0.5, from 4": informed(token_weight=0.5, attention_power=0.5, attention_from=4),
    "K concatenated, tokens 0.5, attention 0.5": {
        **informed(token_weight=0.5, attention_power=0.5),
        "heads": "concat",
    },
    "tokens 0.5, attention 0.5, checkerboard": {
        **informed(token_weight=0.5, attention_power=0.5),
        "partition": "checkerboard",
    },
    "tokens 0.5, attention 0.5, after MLP": {**informed(token_weight=0.5, attention_power=0.5), "place": "after"},
    "tokens 0.8, attention 0.5": informed(token_weight=0.8, attention_power=0.5),
    "tokens 0.5, attention 1": informed(token_weight=0.5, attention_power=1.0),
    "tokens 0.5, attention 0.3": informed(token_weight=0.5, attention_power=0.3),
    "tokens 0.5, attention 0.5, from 4, checkerboard": {
        **informed(token_weight=0.5, attention_power=0.5, attention_from=4),
        "partition": "checkerboard",
    },
    "tokens 0.5, attention 0.5, from 4, order": {
        **informed(token_weight=0.5, attention_power=0.5, attention_from=4),
        "order": "spatial",
    },
    "tokens 0.5, sizes": informed(token_weight=0.5, size_penalty="sqrt_harmonic"),
    "tokens 0.5, attention 0.5, from 4, sizes": informed(
        token_weight=0.5, attention_power=0.5, attention_from=4, size_penalty="sqrt_source"
    ),
    "tokens 0.8, attention 0.5, from 4": informed(token_weight=0.8, attention_power=0.5, attention_from=4),
}


def photos_of(model: Any, folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return all images in a folder as batches with the preprocessing of the model, without labels."""
    transform = create_transform(**resolve_data_config({}, model=model))
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in files])
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(32)]


def main() -> None:
    """Measure the candidates, write presets.csv, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=Path, help="a plain folder of images")
    parser.add_argument("--speedup", type=float, nargs="+", default=[2.0])
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("presets.csv"))
    args = parser.parse_args()
    report, rows = Report(), []
    loaded = CompareOptions(model=args.model, pretrained=True, data=args.data, r=[8])
    model = load_model(loaded)
    sets = {"data": list(Images(model, loaded, args.limit))}
    if args.photos is not None:
        sets["photos"] = photos_of(model, args.photos)
    base = {name: score(model, batches, None) for name, batches in sets.items()}
    for speedup in args.speedup:
        plain: dict[str, Any] = {}
        for name in ["tome", *(one for one in args.only if one != "tome")]:
            copy = share_weights(model)
            handle = patch(copy, speedup=speedup, **CANDIDATES[name])
            row: dict[str, Any] = {"commit": commit(), "candidate": name, "speedup": speedup, "r": handle.schedule[0]}
            for where, batches in sets.items():
                mine = score(copy, batches, base[where][1])[0]
                first = plain.setdefault(where, mine)
                interval = bootstrap(mine.divergence - first.divergence)
                row |= {f"{where}_kl": float(mine.divergence.mean()), f"{where}_kl_difference": str(interval)}
                row[f"{where}_images"] = len(mine.divergence)
                if where == "data":
                    row["data_top1"] = 100 * float(mine.top1.mean())
                    row["data_top1_difference"] = str(bootstrap(100 * (mine.top1 - first.top1)))
            rows.append(row)
            report.say(
                ", ".join(
                    f"{key} {value:.3f}" if isinstance(value, float) else f"{value}" for key, value in row.items()
                )
            )
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
