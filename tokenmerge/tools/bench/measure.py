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
from tokenmerge.tools.device import place
from tokenmerge.tools.models import ModelArgs, input_shape, load_model
from tokenmerge.tools.pages.figures import lines
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.trained import as_trained
from tokenmerge.tools.tuning import NO_TUNING, TuneArgs, tune
from tokenmerge.tools.variants import share_weights, sliced

Forward = Callable[[Tensor], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchArgs:
    """Options of a measurement.

    Attributes:
        batch_size: images per forward pass.
        warmup: warm-up passes of each model before measuring.
        rounds: measured passes of each model; the models take turns in every round.
        statistic: how speed-up and overhead are computed: "median" of the ratios of paired rounds, or ratio of minima ("min").
        compile: whether to `torch.compile` every model.
        tuning: what to tune before measuring.
    """

    batch_size: int = 8
    warmup: int = 3
    rounds: int = 15
    statistic: str = "median"
    compile: bool = False
    tuning: TuneArgs = NO_TUNING


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


def prepare(module: Any, compiled: bool) -> Forward:
    """Return the module, compiled if `compiled` is set."""
    forward: Forward = torch.compile(module) if compiled else module
    return forward


def _variants(
    model: Any,
    settings: Sequence[Setting],
    fields: dict[str, Any],
    bench: BenchArgs,
    images: Tensor,
    report: Report,
) -> list[_Variant]:
    """Return the unmerged model first, then one variant per setting that merges."""
    compiled = bench.compile
    variants = [_Variant(Setting(0, {"r": 0}), None, prepare(model, compiled), None)]
    for setting in settings:
        if setting.is_baseline:
            continue
        copy = share_weights(model)
        handle = patch(copy, setting.config(**fields))
        tune(copy, handle, images, bench.tuning, setting.title, report.say)
        yardstick = sliced(model, handle.schedule)
        forward = None if yardstick is None else prepare(yardstick, compiled)
        variants.append(_Variant(setting, handle.summary(), prepare(copy, compiled), forward))
    return variants


def measure(
    args: ModelArgs, bench: BenchArgs, settings: Sequence[Setting], fields: dict[str, Any], report: Report
) -> list[Row]:
    """Measure the unmerged model and all settings that merge, and return one row for each.

    Raises:
        InputError: if the model cannot be created.
        UnsupportedModelError: if it cannot be patched.
    """
    model = load_model(args)
    images = torch.randn(bench.batch_size, *input_shape(model), generator=torch.Generator().manual_seed(0))
    images = place(images, args.device, args.dtype, args.channels_last)
    variants = _variants(model, settings, fields, bench, images, report)
    forwards = [f for v in variants for f in (v.merged, v.yardstick) if f is not None]
    if bench.compile:
        compile_now(forwards, images)
    with report.progress() as progress:
        task = progress.add_task("measuring", total=(bench.warmup + bench.rounds) * len(forwards))
        calls = passes(forwards, images)
        times_of = take_turns(calls, images.device, bench.warmup, bench.rounds, lambda: progress.advance(task))
    seconds = iter(times_of)
    rows: list[Row] = []
    base: list[float] = []
    for variant in variants:
        times = next(seconds)
        yardstick = next(seconds) if variant.yardstick is not None else times if variant.summary is None else None
        memory = peak_memory(passes([variant.merged], images)[0], images.device)
        base = base or times
        rows.append(_row(args, bench, variant, times, yardstick, base, memory))
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


def run_bench(
    args: ModelArgs, bench: BenchArgs, settings: Sequence[Setting], fields: dict[str, Any], report: Report
) -> int:
    """Measure a model, print and write one row for the unmerged model and one per r, and return 0."""
    bench.tuning.check(settings, bench.compile)
    fields = as_trained(args, fields)
    rows = measure(args, bench, settings, fields, report)
    _print(report, args, bench, rows)
    report.write(rows, lambda: _figures(rows))
    return 0


def _figures(rows: Sequence[Row]) -> list[str | None]:
    labels = ("FLOPs before ÷ after", "speed-up, measured")
    return [lines(rows, "flops_ratio", "speedup", labels, names="r")]


def _row(
    args: ModelArgs,
    bench: BenchArgs,
    variant: _Variant,
    times: list[float],
    yardstick: list[float] | None,
    base: list[float],
    memory: int,
) -> Row:
    spread = Spread.of(times)
    ms = 1e3 * (min(times) if bench.statistic == "min" else spread.p50)
    speedup = ratio(base, times, bench.statistic)
    flops_ratio = 1.0 if variant.summary is None else variant.summary.flops_ratio
    return {
        "model": args.model,
        "r": variant.setting.label,
        "batch_size": bench.batch_size,
        "img_size": args.img_size,
        "device": args.device,
        "dtype": args.dtype,
        "compile": bench.compile,
        "channels_last": args.channels_last,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "statistic": bench.statistic,
        "rounds": bench.rounds,
        "ms": ms,
        "ms_min": 1e3 * min(times),
        "ms_p20": 1e3 * spread.p20,
        "ms_p50": 1e3 * spread.p50,
        "ms_p80": 1e3 * spread.p80,
        "images_per_second": 1e3 * bench.batch_size / ms,
        "schedule": None if variant.summary is None else list(variant.summary.r),
        "tuned": None if variant.summary is None else variant.summary.tuned,
        "speedup": speedup,
        "flops_ratio": flops_ratio,
        "realised": speedup / flops_ratio,
        "overhead": None if yardstick is None else ratio(times, yardstick, bench.statistic),
        "peak_memory_mb": memory / 2**20,
    }


def _print(report: Report, args: ModelArgs, bench: BenchArgs, rows: Sequence[Row]) -> None:
    report.table(
        f"{args.model}, batch {bench.batch_size}, {args.device}, {args.dtype}{', compiled' if bench.compile else ''}",
        ("r", "ms", "p20-p80", "img/s", "speed-\nup", "FLOPs\nratio", "real-\nised", "over-\nhead", "MiB"),
        (
            (
                str(row["r"]),
                f"{row['ms']:.1f}",
                f"{row['ms_p20']:.0f}-{row['ms_p80']:.0f}",
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
        f"{bench.rounds} interleaved rounds, {bench.statistic} of each; realised = speed-up / FLOPs ratio; "
        "overhead = time / time when the same number of tokens is sliced off"
    )
    for row in rows[1:]:
        if row["speedup"] < 1.02:
            report.say(
                f"Merging does not pay at this shape: r={row['r']} runs at {row['speedup']:.2f}x the unmerged speed. "
                f"Try a larger batch, larger images or a larger r{'' if bench.compile else ', or --compile'}.",
                style="bold yellow",
            )
