"""`tokenmerge bench --break-even`: find the smallest r, for each batch size, at which merging is faster on this device.

For each batch size, the unmerged model and one merged copy per r take turns. A setting pays if the median speed-up over the
paired rounds is at least 1.02 and the merged model is faster in four of five rounds. If no setting pays, the merges of three
blocks are also tried in every third block, the last of the three, which runs matching a third as often.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from tokenmerge.config import MergeConfig
from tokenmerge.errors import InputError
from tokenmerge.ops.timing import Spread, take_turns
from tokenmerge.patching import patch
from tokenmerge.patching.target import find_target
from tokenmerge.patching.tuning.measure import GAIN, pays
from tokenmerge.patching.tuning.schedules import spaced
from tokenmerge.schedule import max_merges
from tokenmerge.tools.bench.measure import compile_now, further, passes, prepare
from tokenmerge.tools.bench.options import BenchOptions
from tokenmerge.tools.device import place
from tokenmerge.tools.models import input_shape, load_model
from tokenmerge.tools.pages import Figure, title_of
from tokenmerge.tools.pages.figures import Axis, captioned, lines
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.saved import on_saved, saved_with
from tokenmerge.tools.settings import Setting, without_schedule
from tokenmerge.tools.tuning import check_tuning, tune
from tokenmerge.tools.variants import share_weights

_SPARSE = 3


def batches_up_to(largest: int) -> list[int]:
    """Return the batch sizes 1, 2, 4, … below `largest`, and `largest` itself."""
    powers = [2**i for i in range(largest.bit_length()) if 2**i < largest]
    return [*powers, largest]


def ladder(model: Any) -> list[Setting]:
    """Return constant schedules with r = 1, 2, 4, …, up to the unprotected tokens divided by the blocks."""
    target = find_target(model)
    tokens, protected = target.family.tokens(target.model), target.family.protected(target.model)
    most = max(1, max_merges(tokens, protected) * 2 // len(target.blocks))
    return [Setting(r, {"r": r}) for r in (2**i for i in range(most.bit_length())) if r <= most]


def run_break_even(options: BenchOptions, report: Report) -> list[Row]:
    """Measure a model, print and write one row per batch size and setting, and return them.

    Args:
        options: what to measure; without `r`, r = 1, 2, 4, … are tried.
        report: receiver of the results.
    """
    settings = options.schedules()
    saved = saved_with(options)
    fields = options.merging(saved)
    model = load_model(options)
    wanted = [setting for setting in settings if not setting.is_baseline]
    if settings and not wanted:
        raise InputError(
            "--break-even was given r=0 alone, which is the unmerged model: give other r, or none for a ladder"
        )
    wanted = on_saved(wanted or ladder(model), saved, fields, report.say)
    check_tuning(options, wanted, options.compile)
    if options.tune_schedule or options.tuning is not None:
        raise InputError(
            "--break-even compares schedules at several batch sizes itself, but --tune-schedule or --tuning was given: give --tune alone"
        )
    rows: list[Row] = []
    with report.progress() as progress:
        task = progress.add_task("batch sizes", total=len(batches_up_to(options.batch_size)))
        for batch in batches_up_to(options.batch_size):
            rows += _measure(model, options, batch, wanted, fields, report)
            progress.advance(task)
    _print(report, options, rows)
    report.write(rows, lambda: _figures(rows))
    return rows


def _measure(
    model: Any,
    options: BenchOptions,
    batch: int,
    settings: Sequence[Setting],
    fields: dict[str, Any],
    report: Report,
) -> list[Row]:
    images = torch.randn(batch, *input_shape(model), generator=torch.Generator().manual_seed(0))
    images = place(images, options.device, options.dtype, options.channels_last)
    rows = _turns(model, options, images, [(s, s.config(**fields)) for s in settings], report)
    rows.sort(key=lambda row: (sum(row["schedule"]), row["schedule"]))
    if not any(row["pays"] for row in rows):
        schedule = list(spaced(tuple(rows[-1]["schedule"]), _SPARSE, late=True))
        setting = Setting(",".join(map(str, schedule)), {**without_schedule(settings[0].fields), "r": schedule})
        rows += _turns(model, options, images, [(setting, setting.config(**fields))], report, sparse=True)
    return rows


def _turns(
    model: Any,
    options: BenchOptions,
    images: torch.Tensor,
    configs: Sequence[tuple[Setting, MergeConfig]],
    report: Report,
    sparse: bool = False,
) -> list[Row]:
    copies = [share_weights(model) for _ in configs]
    handles = [patch(copy, config) for copy, (_, config) in zip(copies, configs, strict=True)]
    for copy, handle, (setting, _) in zip(copies, handles, configs, strict=True):
        tune(copy, handle, images, options, f"batch {images.shape[0]}, {setting.title}", report.say)
    summaries = [handle.summary() for handle in handles]
    odd = next((one.matcher for one in summaries if one.adaptive), None)
    if odd is not None:
        raise InputError(
            f"how many tokens matcher {odd.split(',')[0]!r} leaves depends on the images, but break-even measures on noise: use eval or compare"
        )
    forwards = [prepare(one, options.compile) for one in (model, *copies)]
    if options.compile:
        compile_now(forwards, images)
    dense, *merged = take_turns(passes(forwards, images), images.device, options.warmup, options.rounds)
    rows: list[Row] = []
    for (setting, _), summary, times in zip(configs, summaries, merged, strict=True):
        gain = Spread.of_ratios(dense, times)
        rows.append(
            {
                "model": options.model,
                "r": setting.label,
                "schedule": list(summary.r),
                "sparse": sparse,
                "batch_size": images.shape[0],
                "img_size": options.img_size,
                "device": options.device,
                "dtype": options.dtype,
                "compile": options.compile,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "rounds": options.rounds,
                "ms": 1e3 * statistics.median(times),
                "dense_ms": 1e3 * statistics.median(dense),
                "speedup": gain.p50,
                "speedup_p20": gain.p20,
                "speedup_p80": gain.p80,
                "flops_ratio": summary.flops_ratio,
                "pays": pays(gain),
            }
        )
    return rows


def _figures(rows: Sequence[Row]) -> list[Figure | None]:
    labelled = [{**row, "batch": f"batch {row['batch_size']}"} for row in rows]
    fewer = Axis("flops_ratio", "FLOPs before ÷ after", 0, mark=1)
    speed = Axis("speedup", "speed-up, measured", 0, ends=("speedup_p20", "speedup_p80"), mark=1)
    caption = "Speed-up over the unmerged model for each batch size; bars: 20th to 80th percentile of the rounds."
    return [captioned(caption, lines(labelled, fewer, speed, by="batch"))]


def _print(report: Report, options: BenchOptions, rows: Sequence[Row]) -> None:
    by_batch: dict[int, list[Row]] = {}
    for row in rows:
        by_batch.setdefault(row["batch_size"], []).append(row)
    table = []
    for batch, group in by_batch.items():
        paying = [row for row in group if row["pays"]]
        best = max(group, key=lambda row: float(row["speedup"]))
        first = f"{_short(paying[0])}: {paying[0]['speedup']:.2f}x" if paying else "none"
        table.append(
            (
                str(batch),
                first,
                f"{_short(best)}: {best['speedup']:.2f}x",
                f"{best['speedup_p20']:.2f}-{best['speedup_p80']:.2f}",
            )
        )
    compiled = ", compiled" if options.compile else ""
    report.table(
        f"{title_of(options.model)}, {options.device}, {options.dtype}{compiled}",
        ("batch", "smallest r that pays", "fastest r", "p20-p80"),
        table,
    )
    tried = ", ".join(dict.fromkeys(_short(row) for row in rows))
    report.say(
        f"tried r: {tried}; {options.rounds} interleaved rounds; pays = {GAIN:g}x as fast, and faster in 4 rounds of 5"
    )
    for line in _advice(options, by_batch):
        report.say(line, style="bold yellow")


def _short(row: Row) -> str:
    return f"{max(row['schedule'])} every {_SPARSE}rd block" if row["sparse"] else str(row["r"])


def _advice(options: BenchOptions, by_batch: dict[int, list[Row]]) -> list[str]:
    losing = [batch for batch, group in by_batch.items() if not any(row["pays"] for row in group)]
    if not losing:
        return []
    winning = [batch for batch in by_batch if batch > losing[-1]]
    tips = [
        f"use batches of {winning[0]} or more" if winning else "try larger batches or images (--batch-size, --img-size)"
    ]
    if ways := further(options):
        tips.append(f"try {' or '.join(ways)}")
    tips.append("or a larger r in fewer blocks (--r 24,0,0,24,0,0)")
    listed = ", ".join(map(str, losing))
    return [f"Merging does not pay at batch {listed} with any r that was tried: {'; '.join(tips)}."]
