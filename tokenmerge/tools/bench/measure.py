"""`tokenmerge bench`: measure the speed-up of merging, and the cost of matching and merging themselves.

Models that share their weights take turns in every round: the unmerged model, the merged models, and for each of these the
sliced model, the paper's baseline, which drops the same number of tokens without matching.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from tokenmerge.errors import InputError
from tokenmerge.ops.timing import Call, Spread, peak_memory, ratio, take_turns
from tokenmerge.patching import Summary, patch
from tokenmerge.patching.seen import flops_of
from tokenmerge.tools.bench.options import BenchOptions
from tokenmerge.tools.device import place
from tokenmerge.tools.models import input_shape, load_model
from tokenmerge.tools.pages import Figure, title_of
from tokenmerge.tools.pages.figures import Axis, captioned, lines
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.saved import merging_of
from tokenmerge.tools.settings import Setting, title_of_label
from tokenmerge.tools.tuning import check_tuning, tune
from tokenmerge.tools.variants import share_weights, sliced

Forward = Callable[[Tensor], Any]


def passes(forwards: Sequence[Forward], images: Tensor) -> list[Call]:
    """Return one function per model that runs an inference pass on `images`."""

    def one(forward: Forward) -> Call:
        def call() -> None:
            with torch.inference_mode():
                forward(images)

        return call

    return [one(forward) for forward in forwards]


@dataclasses.dataclass(frozen=True)
class _Variant:
    setting: Setting
    summary: Summary | None
    merged: Forward
    yardstick: Forward | None
    config: str | None = None
    flops_ratio: float = 1.0


def prepare(module: Any, compiled: bool) -> Forward:
    """Return the module, compiled if `compiled` is set."""
    forward: Forward = torch.compile(module) if compiled else module
    return forward


def _variants(
    model: Any,
    options: BenchOptions,
    settings: Sequence[Setting],
    fields: dict[str, Any],
    images: Tensor,
    report: Report,
) -> list[_Variant]:
    """Return the unmerged model first, then one variant per setting that merges."""
    compiled = options.compile
    variants = [_Variant(Setting(0, {"r": 0}), None, prepare(model, compiled), None)]
    for setting in settings:
        if setting.is_baseline:
            continue
        copy = share_weights(model)
        handle = patch(copy, setting.config(**fields))
        tune(copy, handle, images, options, setting.title, report.say)
        summary = handle.summary()
        found = summary.flops_ratio
        if summary.adaptive:  # neither the schedule nor a model sliced by it says what runs
            found = summary.flops_before / flops_of(copy, [images])
            report.warn(
                f"bench runs on noise, but how many tokens matcher {summary.matcher.split(',')[0]!r} leaves depends on the images: use "
                "eval or compare"
            )
        yardstick = None if summary.adaptive else sliced(model, handle.schedule)
        forward = None if yardstick is None else prepare(yardstick, compiled)
        merged = prepare(copy, compiled)
        variants.append(_Variant(setting, summary, merged, forward, handle.config.to_json(), found))
    return variants


def measure(options: BenchOptions, report: Report, settings: Sequence[Setting], fields: dict[str, Any]) -> list[Row]:
    """Measure the unmerged model and all settings that merge, and return one row for each.

    Args:
        options: what to measure.
        report: receiver of messages.
        settings: schedules.
        fields: fields of `MergeConfig` other than the schedule.

    Raises:
        InputError: if the model cannot be created.
        UnsupportedModelError: if it cannot be patched.
    """
    model = load_model(options)
    images = torch.randn(options.batch_size, *input_shape(model), generator=torch.Generator().manual_seed(0))
    images = place(images, options.device, options.dtype, options.channels_last)
    variants = _variants(model, options, settings, fields, images, report)
    forwards = [f for v in variants for f in (v.merged, v.yardstick) if f is not None]
    if options.compile:
        compile_now(forwards, images)
    with report.progress() as progress:
        task = progress.add_task("measuring", total=(options.warmup + options.rounds) * len(forwards))
        calls = passes(forwards, images)
        times_of = take_turns(calls, images.device, options.warmup, options.rounds, lambda: progress.advance(task))
    seconds = iter(times_of)
    rows: list[Row] = []
    base: list[float] = []
    for variant in variants:
        times = next(seconds)
        yardstick = next(seconds) if variant.yardstick is not None else times if variant.summary is None else None
        memory = peak_memory(passes([variant.merged], images)[0], images.device)
        base = base or times
        rows.append(_row(options, variant, times, yardstick, base, memory))
    return rows


def compile_now(forwards: Sequence[Forward], images: Tensor) -> None:
    """Compile each model by running it once, after resetting the compiler.

    Without a reset, sizes that changed since the previous model would be compiled as dynamic sizes, which gives slower
    code. All copies of a model share one code object, whose recompilations count towards one limit; hence the larger limit.

    Raises:
        InputError: if a model cannot be compiled on this machine, for example without a C++ compiler.
    """
    torch.compiler.reset()
    limit = torch._dynamo.config.patch(recompile_limit=4 * len(forwards) + 8, fail_on_recompile_limit_hit=True)
    with torch.inference_mode(), limit:
        for forward in forwards:
            try:
                forward(images)
            except TorchDynamoException as error:
                reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                raise InputError(
                    f"torch.compile cannot compile the model here ({reason}): run without --compile"
                ) from None


def run_bench(options: BenchOptions, report: Report) -> list[Row]:
    """Measure a model, print and write one row for the unmerged model and one per r, and return them."""
    settings, fields = merging_of(options, report.say)
    check_tuning(options, settings, options.compile)
    rows = measure(options, report, settings, fields)
    _print(report, options, rows)
    report.write(rows, lambda: _figures(rows))
    return rows


def _figures(rows: Sequence[Row]) -> list[Figure | None]:
    labelled = [{**row, "name": title_of_label(row["r"])} for row in rows]
    fewer = Axis("flops_ratio", "FLOPs before ÷ after", 0, mark=1)
    speed = Axis("speedup", "speed-up, measured", 0, mark=1)
    times = Axis("ms_p50", "milliseconds per batch", 0, ends=("ms_p20", "ms_p80"))
    return [
        captioned(
            "Speed-up and saved computation; on the dashed line, time falls as much as FLOPs.",
            lines(labelled, fewer, speed, names="name", diagonal=True),
        ),
        captioned(
            "Median time of a batch; bars: 20th to 80th percentile of the rounds.",
            lines(labelled, fewer, times, names="name"),
        ),
    ]


def _row(
    options: BenchOptions,
    variant: _Variant,
    times: list[float],
    yardstick: list[float] | None,
    base: list[float],
    memory: int,
) -> Row:
    spread = Spread.of(times)
    ms = 1e3 * (min(times) if options.statistic == "min" else spread.p50)
    speedup = ratio(base, times, options.statistic)
    return {
        "model": options.model,
        "r": variant.setting.label,
        "batch_size": options.batch_size,
        "img_size": options.img_size,
        "device": options.device,
        "dtype": options.dtype,
        "compile": options.compile,
        "channels_last": options.channels_last,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "statistic": options.statistic,
        "rounds": options.rounds,
        "ms": ms,
        "ms_min": 1e3 * min(times),
        "ms_p20": 1e3 * spread.p20,
        "ms_p50": 1e3 * spread.p50,
        "ms_p80": 1e3 * spread.p80,
        "images_per_second": 1e3 * options.batch_size / ms,
        "schedule": None if variant.summary is None else list(variant.summary.r),
        "tuned": None if variant.summary is None else variant.summary.tuned,
        "speedup": speedup,
        "flops_ratio": variant.flops_ratio,
        "realised": speedup / variant.flops_ratio,
        "overhead": None if yardstick is None else ratio(times, yardstick, options.statistic),
        "peak_memory_mb": memory / 2**20,
        "config": variant.config,
    }


def further(options: BenchOptions) -> list[str]:
    """Return other ways to run a model in which merging may pay.

    On a GPU, an eager pass of a small model waits for its kernel launches, which merging adds to; a CUDA graph has none.
    """
    graph = torch.device(options.device).type == "cuda"
    return [*([] if options.compile else ["--compile"]), *(["a CUDA graph"] if graph else [])]


def _print(report: Report, options: BenchOptions, rows: Sequence[Row]) -> None:
    report.table(
        f"{title_of(options.model)}, batch {options.batch_size}, {options.device}, {options.dtype}{', compiled' if options.compile else ''}",
        ("r", "ms", "p20-p80", "img/s", "speed-\nup", "FLOPs\nratio", "real-\nised", "over-\nhead", "MiB"),
        (
            (
                str(row["r"]),
                f"{row['ms']:.1f}",
                "-".join(f"{row[name]:.{0 if row['ms_p80'] >= 100 else 1}f}" for name in ("ms_p20", "ms_p80")),
                f"{row['images_per_second']:.1f}",
                f"{row['speedup']:.2f}x",
                f"{row['flops_ratio']:.2f}",
                f"{row['realised']:.2f}",
                "-" if row["overhead"] is None else f"{row['overhead']:.2f}",
                f"{row['peak_memory_mb']:.0f}",
            )
            for row in rows
        ),
    )
    report.say(
        f"{options.rounds} interleaved rounds, {options.statistic} of each; realised = speed-up / FLOPs ratio; "
        "overhead = time / time when the same number of tokens is sliced off"
    )
    for row in rows[1:]:
        if row["speedup"] < 1.02:
            report.say(
                f"Merging does not pay at this shape: r={row['r']} runs at {row['speedup']:.2f}x the unmerged speed. "
                f"Try a larger batch, larger images or a larger r{''.join(f', or {way}' for way in further(options))}.",
                style="bold yellow",
            )
