"""Measure the implementations of proportional attention, forward and with backward, for sizes of real models.

    python benchmarks/attention.py [--device cuda --dtype bfloat16]

`speedup` is relative to PyTorch's attention without sizes; `gap` is the largest difference from a float64 result, relative
to the largest output.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import Row, record
from torch import Tensor
from torch.nn import functional as F

from tokenmerge.attention.call import AttentionCall
from tokenmerge.attention.forms import FORMS
from tokenmerge.ops.timing import Call
from tokenmerge.tools.device import DTYPES
from tokenmerge.tools.report import Report

SHAPES = {  # B, H, N, D
    "cpu": [(16, 3, 119, 64), (8, 6, 197, 64), (4, 12, 101, 64), (2, 12, 577, 64), (1, 16, 585, 64), (1, 16, 1025, 64)],
    "cuda": [
        (256, 6, 197, 64),
        (64, 12, 197, 64),
        (64, 16, 577, 64),
        (64, 16, 1025, 64),
        (64, 16, 1370, 80),
        (1, 16, 577, 64),
    ],
}


def calls_for(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, forms: list[str], backward: bool) -> dict[str, Call]:
    """Return one call per implementation, attention without sizes first."""

    def one(form: str | None) -> Call:
        def call() -> Any:
            with torch.set_grad_enabled(backward):
                out = F.scaled_dot_product_attention(q, k, v) if form is None else attend(form, q, k, v, mask)
                return torch.autograd.grad(out, (q, k, v), v) if backward else out

        return call

    return {"no sizes": one(None), **{form: one(form) for form in forms}}


def attend(form: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Call attention as upstream does, computed by one implementation."""
    if form == "mask":
        return F.scaled_dot_product_attention(q, k, v, mask)
    with AttentionCall(form):
        return F.scaled_dot_product_attention(q, k, v, mask)


def gap(form: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> float:
    """Return the error of an implementation against float64 on one image, relative to the largest output."""
    q, k, v, mask = (x[:1].detach() for x in (q, k, v, mask))
    scores = q.double() @ k.double().transpose(2, 3) * q.shape[-1] ** -0.5 + mask.double()
    wanted = scores.softmax(dim=-1) @ v.double()
    found = attend(form, q, k, v, mask)
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def main() -> None:
    """Measure all implementations, append the rows to results.csv, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    report = Report()
    on_cpu = args.device == "cpu"
    forms = [f for f in FORMS if f != "auto" and not (on_cpu and f in ("cudnn", "efficient", "flex"))]
    for batch, heads, tokens, dim in SHAPES["cpu" if on_cpu else "cuda"]:
        qkv = torch.randn(batch, tokens, 3, heads, dim).to(args.device, DTYPES[args.dtype])
        q, k, v = (
            x.requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0)
        )  # strided like the output of a fused projection
        mask = torch.randint(1, 9, (batch, tokens)).float().log().to(v)[:, None, None, :]
        gaps: dict[str, Row] = {form: {"gap": gap(form, q, k, v, mask)} for form in forms}
        for backward in (False, True):
            calls = calls_for(q, k, v, mask, forms, backward)
            shape = {"batch_size": batch, "heads": heads, "tokens": tokens, "head_dim": dim, "dtype": args.dtype}
            columns = {**shape, "backward": backward}
            rows = record("attention", calls, args.device, columns, rounds=args.rounds, extra=gaps, warmup=5)
            report.say(
                f"B{batch} H{heads} N{tokens} D{dim}{' with backward' if backward else ''}, time / without sizes:"
            )
            report.say("  " + ", ".join(f"{name} {1 / row['speedup']:.2f}" for name, row in rows.items()))


if __name__ == "__main__":
    main()
