"""Options of `tokenmerge bench`."""

from __future__ import annotations

import dataclasses

from tokenmerge.tools.common import DeviceOptions, MergeOptions, PageOptions, TuneOptions, batch_size
from tokenmerge.tools.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions(DeviceOptions, MergeOptions, TuneOptions, PageOptions):
    """Options of `tokenmerge bench`.

    Attributes:
        batch_size: images per forward pass; with `break_even` the largest batch size.
        warmup: warm-up passes of each model before measuring.
        rounds: measured passes of each model; the models take turns in every round.
        statistic: how speed-up and overhead are computed: "median" of the ratios of paired rounds, or ratio of minima ("min").
        compile: whether to `torch.compile` every model.
        break_even: whether to find the smallest r that is faster, for each batch size.
    """

    batch_size: int = batch_size(8)
    warmup: int = option(
        3, "warm-up passes before measuring", "measuring", "--num-warm-iter", "--warmup", least=0, metavar="N"
    )
    rounds: int = option(
        15, "interleaved rounds to measure", "measuring", "--num-bench-iter", "--rounds", least=1, metavar="N"
    )
    statistic: str = option(
        "median", "statistic of the times; min is steadier on shared machines", "measuring", choices=("median", "min")
    )
    compile: bool = option(False, "run torch.compile on the unmerged and the merged models", "measuring")
    break_even: bool = option(
        False, "find the smallest r that is faster for batches of 1, 2, 4, … up to --batch-size", "measuring"
    )
