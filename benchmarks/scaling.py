"""Measure time and peak memory of a ViT by number of tokens (196 to 16,384) and by batch size.

    python benchmarks/scaling.py [--device cuda --dtype bfloat16]

The model has four blocks of ViT-B, so that 16,384 tokens run on a CPU. The four blocks merge the same fraction of the tokens as
twelve blocks with r = 16 do at 197 tokens; the last block merges the remainder.
"""

from __future__ import annotations

import argparse

import torch
from common import Row, record
from timm.models.vision_transformer import VisionTransformer

import tokenmerge
from tokenmerge.ops.timing import Call, peak_memory
from tokenmerge.tools.device import DTYPES
from tokenmerge.tools.report import Report
from tokenmerge.tools.variants import share_weights

SIDES = (14, 24, 32, 64, 128)  # patches along each side
BATCHES = {"cpu": (1, 2, 4, 8, 16), "cuda": (1, 8, 64, 256)}
DEPTH = 4


def compare(side: int, batch: int, args: argparse.Namespace) -> dict[str, Row]:
    """Measure the dense and the merged model, and return their rows."""
    model = VisionTransformer(img_size=16 * side, embed_dim=768, depth=DEPTH, num_heads=12, num_classes=10).eval()
    model = model.to(args.device, DTYPES[args.dtype])
    tokens = side * side + 1
    r = round(tokens * 16 / 197 * 12 / DEPTH)
    merged = share_weights(model)
    ratio = tokenmerge.patch(merged, r=r).summary().flops_ratio
    images = torch.randn(batch, 3, 16 * side, 16 * side).to(args.device, DTYPES[args.dtype])

    def one(forward: torch.nn.Module) -> Call:
        def call() -> None:
            with torch.inference_mode():
                forward(images)

        return call

    calls = {"dense": one(model), "merged": one(merged)}
    for call in calls.values():  # so that libraries allocate their workspaces
        call()
    memory: dict[str, Row] = {n: {"peak_memory_mb": peak_memory(c, images.device) / 2**20} for n, c in calls.items()}
    columns = {"tokens": tokens, "r": r, "batch_size": batch, "dtype": args.dtype, "flops_ratio": ratio}
    return record("scaling", calls, args.device, columns, rounds=args.rounds, warmup=1, extra=memory)


def main() -> None:
    """Measure all sizes, append the rows to results.csv, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    report = Report()
    batches = BATCHES["cpu" if args.device == "cpu" else "cuda"]
    for side, batch in [*((side, 1) for side in SIDES), *((SIDES[0], batch) for batch in batches[1:])]:
        rows = compare(side, batch, args)
        merged = rows["merged"]
        memory = merged["peak_memory_mb"] / rows["dense"]["peak_memory_mb"]
        report.say(
            f"N={merged['tokens']}, B={batch}, r={merged['r']}: {merged['speedup']:.2f}x, FLOPs {merged['flops_ratio']:.2f}, "
            f"peak memory x{memory:.2f}"
        )


if __name__ == "__main__":
    main()
