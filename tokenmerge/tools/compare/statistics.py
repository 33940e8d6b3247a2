"""Intervals for what was measured on the same images: paired bootstrap."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval.

    Attributes:
        mean: of the values.
        low: 2.5th percentile of resampled means.
        high: 97.5th percentile.
    """

    mean: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether 0 lies outside."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def bootstrap(values: Tensor, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean of `values [n]` over images drawn again with replacement.

    Give it the differences of two methods image by image, and what both get right or wrong falls out: that is
    what makes the test sharp.
    """
    values = values.double()
    draw = torch.Generator().manual_seed(seed)
    count = len(values)
    means = [values[torch.randint(count, (64, count), generator=draw)].mean(dim=1) for _ in range(-(-resamples // 64))]
    low, high = torch.cat(means)[:resamples].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high)
