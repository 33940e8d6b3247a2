"""Draw the figures of docs/performance.md and docs/training.md from results.csv.

    python benchmarks/plot.py [--processor "AMD EPYC"]

Of rows that measure the same thing, the latest counts. It writes speed.svg, scaling.svg and finetune.svg to docs/images.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import matplotlib as mpl
from common import RESULTS

mpl.use("svg")
from matplotlib import pyplot as plt

IMAGES = RESULTS.parents[1] / "docs" / "images"
COLOURS = {  # the palette of Okabe and Ito, distinguishable for colour-blind people and by lightness
    "dense": "#bbbbbb",
    "dense compiled": "#666666",
    "straightforward": "#e69f00",
    "merged": "#56b4e9",
    "merged compiled": "#0072b2",
}
LABELS = {"straightforward": "straightforward ToMe", "merged": "tokenmerge", "merged compiled": "tokenmerge compiled"}
mpl.rcParams.update({"font.size": 9, "svg.hashsalt": "tokenmerge", "svg.fonttype": "none", "axes.spines.top": False})
mpl.rcParams.update({"axes.spines.right": False, "figure.facecolor": "white"})


def rows_of(benchmark: str, processor: str | None) -> list[dict[str, str]]:
    """Return the rows of a benchmark on one processor: the given one, or the processor of the latest row."""
    with RESULTS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] == benchmark]
    processor = processor or (rows[-1]["processor"] if rows else None)
    return [row for row in rows if row["processor"] == processor]


def save(figure: Any, name: str) -> Path:
    """Write a figure without a date, so that equal rows produce equal files."""
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / name
    figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path


def plot_models(processor: str | None) -> Path | None:
    """Plot the speed-up over the eager dense model by model and variant, with the FLOPs ratio as a line."""
    rows = rows_of("models", processor)
    if not rows:
        return None
    latest: dict[tuple[str, str, str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        key = (row["model"], row["img_size"], row["r"], row["batch_size"])
        variants = latest.setdefault(key, {})
        made_by = ("date", "commit", "command", "dtype")
        if any(other[name] != row[name] for other in variants.values() for name in made_by):
            variants.clear()  # bars of one group must come from one run
        variants[row["variant"]] = row
    figure, axes = plt.subplots(figsize=(8, 3.2))
    width = 0.8 / len(COLOURS)
    for place, variants in enumerate(latest.values()):
        for i, (variant, colour) in enumerate(COLOURS.items()):
            if variant not in variants:
                continue
            value, low, high = (float(variants[variant][c]) for c in ("speedup", "speedup_p20", "speedup_p80"))
            x = place - 0.4 + (i + 0.5) * width
            label = LABELS.get(variant, variant) if place == 0 else None
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.bar(x, value, width * 0.92, color=colour, label=label, yerr=error, error_kw={"lw": 0.8})
        bound = float(next(iter(variants.values()))["flops_ratio"])
        label = "FLOPs ratio" if place == 0 else None
        axes.plot([place - 0.42, place + 0.42], [bound] * 2, color="black", lw=1.2, ls="--", label=label)
    names = [f"{key[0].split('_patch')[0]}@{key[1]}\nr={key[2]}, batch {key[3]}" for key in latest]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("speed-up over the dense model, eager")
    axes.set_ylim(
        0, 1.4 * max(float(row["speedup"]) for v in latest.values() for row in v.values() if row["variant"] in COLOURS)
    )
    axes.legend(ncols=3, frameon=False, loc="upper left")
    row = rows[-1]
    axes.set_title(
        f"{row['processor']}, {row['threads']} threads, {row['dtype']}, torch {row['torch']}", loc="left", fontsize=8
    )
    return save(figure, "speed.svg")


def plot_scaling(processor: str | None) -> Path | None:
    """Plot the speed-up against tokens and against batch size, with the FLOPs ratio."""
    rows = [row for row in rows_of("scaling", processor) if row["variant"] == "merged"]
    if not rows:
        return None
    latest = {(int(row["tokens"]), int(row["batch_size"])): row for row in rows}
    figure, panels = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
    smallest = min(tokens for tokens, _ in latest)
    series = (
        ("tokens (batch 1)", {t: row for (t, b), row in sorted(latest.items()) if b == 1}),
        (f"batch ({smallest} tokens)", {b: row for (t, b), row in sorted(latest.items()) if t == smallest}),
    )
    for axes, (title, points) in zip(panels, series, strict=True):
        x = list(points)
        low, middle, high = (
            [float(row[c]) for row in points.values()] for c in ("speedup_p20", "speedup", "speedup_p80")
        )
        axes.fill_between(x, low, high, color=COLOURS["merged"], alpha=0.3, lw=0)
        axes.plot(x, middle, "o-", color=COLOURS["merged compiled"], label="tokenmerge, eager")
        axes.plot(x, [float(row["flops_ratio"]) for row in points.values()], "k--", lw=1.2, label="FLOPs ratio")
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(one) for one in x])
        axes.minorticks_off()
        axes.set_xlabel(title)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("speed-up over dense")
    panels[0].legend(frameon=False, loc="lower right")
    return save(figure, "scaling.svg")


def plot_finetuning(processor: str | None) -> Path | None:
    """Plot merged top-1 without fine-tuning and after fine-tuning with and without merging; unmerged top-1 as lines."""
    rows = rows_of("finetune", processor)
    if not rows:
        return None
    last = [row for row in rows if all(row[name] == rows[-1][name] for name in ("date", "commit", "command"))]
    variants = list(dict.fromkeys(row["variant"] for row in last))
    top1 = {(row["variant"], row["r"] == "0"): float(row["top1"]) for row in last}
    figure, axes = plt.subplots(figsize=(8, 1.9))
    for place, variant in enumerate(variants):
        merged, unmerged = top1[variant, False], top1[variant, True]
        label = {"merged": "merged", "unmerged": "the same, unmerged"} if not place else {}
        axes.plot([unmerged, merged], [place] * 2, color=COLOURS["dense"], lw=1)
        axes.plot(unmerged, place, "o", color=COLOURS["dense compiled"], label=label.get("unmerged"))
        axes.plot(merged, place, "o", color=COLOURS["merged compiled"], label=label.get("merged"))
        axes.annotate(f"{merged:.2f}", (merged, place), (0, 6), textcoords="offset points", ha="center")
        axes.annotate(f"{unmerged:.2f}", (unmerged, place), (0, 6), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(variants)), variants)
    axes.set_ylim(len(variants) - 0.6, -0.6)
    r = next(row["r"] for row in last if row["r"] != "0")
    axes.set_xlabel(f"top-1 in %, merged with r={r} and unmerged")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return save(figure, "finetune.svg")


def main() -> None:
    """Draw all figures that results.csv has rows for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processor", help="use the rows of this processor (default: the processor of the latest row)")
    args = parser.parse_args()
    for draw in (plot_models, plot_scaling, plot_finetuning):
        path = draw(args.processor)
        print(f"wrote {path}" if path else f"{draw.__name__}: no rows")


if __name__ == "__main__":
    main()
