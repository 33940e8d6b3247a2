"""`tokenmerge inspect`: check whether a model is supported, and show tokens and FLOPs per block."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from tokenmerge.errors import UnsupportedModelError
from tokenmerge.patching import Summary, patched
from tokenmerge.patching.check import check_block
from tokenmerge.patching.target import find_target
from tokenmerge.tools.common import MergeOptions, ModelOptions, PageOptions
from tokenmerge.tools.models import skeleton
from tokenmerge.tools.pages import title_of
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.saved import merging_of
from tokenmerge.tools.settings import Setting


def _with_values(block: nn.Module) -> Any:
    """Return a copy of a block on the meta device with random values, on the CPU."""
    filled = copy.deepcopy(block).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*filled.parameters(), *filled.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.5, generator=generator)
    return filled


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectOptions(ModelOptions, MergeOptions, PageOptions):
    """Options of `tokenmerge inspect`."""


def run(options: InspectOptions, report: Report | None = None) -> list[Row]:
    """Inspect a model, print and write one row per setting, and return the rows.

    Args:
        options: what to inspect.
        report: receiver of the results; `None` prints them.

    Raises:
        InputError: if the model cannot be made.
    """
    report = report or Report(options.json, options.html)
    settings, fields = merging_of(options, report.say, usual=["8"])
    model = skeleton(options)
    try:
        target = find_target(model)
        block, row = target.blocks[0]
        check_block(row, _with_values(block), target.channels, "block 0", target.family.library)
    except UnsupportedModelError as error:
        report.say(f"{options.model}: not supported")
        for reason in error.reasons or (str(error),):
            report.say(f"  - {reason}")
        report.say(f"  {error}", style="dim")
        refused = {"model": options.model, "supported": False, "reasons": list(error.reasons), "message": str(error)}
        report.write([refused])
        return [refused]
    rows = []
    for setting in settings:
        with patched(model, setting.config(**fields)) as handle:
            summary, config = handle.summary(), handle.config.to_json()
        rows.append({**_row(options.model, setting, summary), "config": config})
        _print(report, options.model, setting, summary)
    report.write(rows)
    return rows


def _row(model: str, setting: Setting, summary: Summary) -> Row:
    return {
        "model": model,
        "supported": True,
        "reasons": [],
        "r": setting.label,
        "class": summary.model,
        "blocks": summary.blocks,
        "prefix_tokens": summary.protected,
        "pooling": summary.pooling,
        "prop_attn": summary.prop_attn,
        "prop_attn_reason": summary.prop_attn_reason,
        "r_per_block": list(summary.r),
        "tokens": list(summary.tokens),
        "gflops": summary.flops_after / 1e9,
        "gflops_before": summary.flops_before / 1e9,
        "gflops_per_block": [flops / 1e9 for flops in summary.block_flops],
        "flops_ratio": summary.flops_ratio,
        "adaptive": summary.adaptive,
        "matching_gflops": None if summary.matching_flops is None else summary.matching_flops / 1e9,
    }


def _print(report: Report, model: str, setting: Setting, summary: Summary) -> None:
    cuts = any(asked != r for asked, r in zip(summary.requested, summary.r, strict=True))
    report.table(
        f"{title_of(model)}, {setting.title}: supported",
        ("block", "tokens in", "merged", "tokens out", "GFLOPs", *(("asked for",) if cuts else ())),
        (
            (
                str(i),
                str(summary.tokens[i]),
                str(r),
                str(summary.tokens[i + 1]),
                f"{summary.block_flops[i] / 1e9:.4g}",
                *((str(summary.requested[i]),) if cuts else ()),
            )
            for i, r in enumerate(summary.r)
        ),
    )
    report.say(
        f"{summary.model}, {summary.protected} prefix tokens, pooling {summary.pooling}, "
        f"proportional attention {'on' if summary.prop_attn else 'off'}"
    )
    report.say(
        f"{summary.flops_before / 1e9:.4g} -> {summary.flops_after / 1e9:.4g} GFLOPs per image, "
        f"{summary.flops_ratio:.2f}x less; {summary.matching_in_words}"
    )
    if summary.adaptive:
        report.say(summary.adaptive_in_words)
    if cuts:
        report.say("r was cut where a block has too few tokens (at most half of the unprotected ones can merge)")
