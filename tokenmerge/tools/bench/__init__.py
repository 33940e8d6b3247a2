"""`tokenmerge bench`: measure the speed-up of merging, and the smallest r that pays."""

from __future__ import annotations

from tokenmerge.tools.bench.break_even import run_break_even
from tokenmerge.tools.bench.measure import run_bench
from tokenmerge.tools.bench.options import BenchOptions
from tokenmerge.tools.report import Report, Row

__all__ = ["BenchOptions", "run"]


def run(options: BenchOptions, report: Report | None = None) -> list[Row]:
    """Measure a model, print the rows, write the files that the options name, and return the rows.

    Args:
        options: what to measure.
        report: receiver of the results; `None` prints them.

    Raises:
        InputError: if the model cannot be made, or an option does not fit it.
        UnsupportedModelError: if the model cannot be patched.

    Example:
        >>> from tokenmerge.tools.bench import BenchOptions, run
        >>> rows = run(BenchOptions(model="vit_tiny_patch16_224", r=[8], batch_size=1, rounds=1, warmup=0))  # doctest: +SKIP
    """
    report = report or Report(options.json, options.html)
    return run_break_even(options, report) if options.break_even else run_bench(options, report)
