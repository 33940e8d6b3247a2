"""`tokenmerge bench`: is the merged model really faster, and what does the merging itself cost?

Three models that share their weights take turns in every round: the unmerged one, the merged ones, and for
each of those the paper's yardstick, which drops the same number of tokens by slicing and so pays for no
matching. Machines are noisy and drift; what is compared is compared within one run.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from tokenmerge.errors import InputError
from tokenmerge.patching import Summary, patch
from tokenmerge.tools.device import place, synchronize
from tokenmerge.tools.models import ModelArgs, input_shape, load_model
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.variants import share_weights, sliced

Forward = Callable[[Tensor], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchArgs:
    """How to measure.

    Attributes:
        batch_size: images per forward pass.
        warmup: passes of each model before measuring.
        rounds: measured passes of each model, in turns.
        statistic: "median" or "min", what speed-up and overhead compare; the minimum is steadier on a
            machine that others use.
        compile: whether to `torch.compile` every model.
    """

    batch_size: int = 8
    warmup: int = 3
    rounds: int = 15
    statistic: str = "median"
    compile: bool = False


def interleave(
    forwards: Sequence[Forward], images: Tensor, warmup: int, rounds: int, progress: Progress | None = None
) -> list[list[float]]:
    """Seconds of each measured pass, for each forward; they take turns, each round starting with another."""
    task = progress.add_task("measuring", total=(warmup + rounds) * len(forwards)) if progress else None
    seconds: list[list[float]] = [[] for _ in forwards]
    with torch.inference_mode():
        for turn in range(warmup + rounds):
            for step in range(len(forwards)):
                which = (turn + step) % len(forwards)
                synchronize(images.device)
                start = time.perf_counter()
                forwards[which](images)
                synchronize(images.device)
                if turn >= warmup:
                    seconds[which].append(time.perf_counter() - start)
                if progress is not None and task is not None:
                    progress.advance(task)
    return seconds


def peak_memory(forward: Forward, images: Tensor) -> int:
    """Bytes that one pass allocates at its peak, above what was allocated before it."""
    device = images.device
    with torch.inference_mode():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            forward(images)
            synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own notes would run through the progress bar
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            forward(images)
    events: Any = profile.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@dataclasses.dataclass(frozen=True)
class _Variant:
    setting: Setting
    summary: Summary | None
    merged: Forward
    yardstick: Forward | None


def prepare(module: Any, compiled: bool) -> Forward:
    """The module, compiled if asked for."""
    forward: Forward = torch.compile(module) if compiled else module
    return forward


def _variants(model: Any, settings: Sequence[Setting], fields: dict[str, Any], compiled: bool) -> list[_Variant]:
    """The unmerged model first, then one entry per setting that merges."""
    variants = [_Variant(Setting(0, {"r": 0}), None, prepare(model, compiled), None)]
    for setting in settings:
        if setting.is_baseline:
            continue
        copy = share_weights(model)
        handle = patch(copy, setting.config(**fields))
        yardstick = sliced(model, handle.schedule)
        forward = None if yardstick is None else prepare(yardstick, compiled)
        variants.append(_Variant(setting, handle.summary(), prepare(copy, compiled), forward))
    return variants


def measure(
    args: ModelArgs, bench: BenchArgs, settings: Sequence[Setting], fields: dict[str, Any], report: Report
) -> list[Row]:
    """One row for the unmerged model and one per setting that merges.

    Raises:
        InputError: if the model cannot be made.
        UnsupportedModelError: if it cannot be patched.
    """
    model = load_model(args)
    images = torch.randn(bench.batch_size, *input_shape(model), generator=torch.Generator().manual_seed(0))
    images = place(images, args.device, args.dtype, args.channels_last)
    variants = _variants(model, settings, fields, bench.compile)
    forwards = [f for v in variants for f in (v.merged, v.yardstick) if f is not None]
    if bench.compile:
        compile_now(forwards, images)
    with report.progress() as progress:
        seconds = iter(interleave(forwards, images, bench.warmup, bench.rounds, progress))
    rows: list[Row] = []
    for variant in variants:
        times = next(seconds)
        yardstick = next(seconds) if variant.yardstick is not None else times if variant.summary is None else None
        memory = peak_memory(variant.merged, images)
        rows.append(_row(args, bench, variant, times, yardstick, rows[0] if rows else None, memory))
    return rows


def compile_now(forwards: Sequence[Forward], images: Tensor) -> None:
    """Run each compiled model once.

    Raises:
        InputError: if it cannot be compiled here, for want of a C++ compiler, say.
    """
    with torch.inference_mode():
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
    """Measure, print and write one row per r; the unmerged model is always among them. Returns 0."""
    rows = measure(args, bench, settings, fields, report)
    _print(report, args, bench, rows)
    report.write(rows)
    return 0


def _row(
    args: ModelArgs,
    bench: BenchArgs,
    variant: _Variant,
    times: list[float],
    yardstick: list[float] | None,
    base: Row | None,
    memory: int,
) -> Row:
    compare = min if bench.statistic == "min" else statistics.median
    ms = 1e3 * compare(times)
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 2
    speedup = 1.0 if base is None else base["ms"] / ms
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
        "ms_p20": 1e3 * low,
        "ms_p80": 1e3 * high,
        "images_per_second": 1e3 * bench.batch_size / ms,
        "speedup": speedup,
        "flops_ratio": flops_ratio,
        "realised": speedup / flops_ratio,
        "overhead": None if yardstick is None else compare(times) / compare(yardstick),
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
        "overhead = time / time when the same number of tokens is simply sliced off"
    )
    for row in rows[1:]:
        if row["speedup"] < 1.02:
            report.say(
                f"Merging does not pay at this shape: r={row['r']} runs at {row['speedup']:.2f}x the unmerged speed. "
                f"Try a larger batch, larger images or a larger r{'' if bench.compile else ', or --compile'}.",
                style="bold yellow",
            )
