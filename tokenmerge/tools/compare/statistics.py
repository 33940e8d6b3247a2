"""Confidence intervals by paired bootstrap, for results on the same images."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Interval:
    """Mean with its 95 % confidence interval.

    Attributes:
        mean: mean of the values.
        low: 2.5th percentile of the resampled means.
        high: 97.5th percentile of the resampled means.
    """

    mean: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def bootstrap(values: Tensor, resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the mean of `values [n]` with its 95 % bootstrap interval over images.

    Pass the differences of two methods for each image: images on which both agree then contribute no variance, which makes
    the paired test more sensitive than two separate intervals.
    """
    values = values.double()
    draw = torch.Generator().manual_seed(seed)
    count = len(values)
    means = [values[torch.randint(count, (64, count), generator=draw)].mean(dim=1) for _ in range(-(-resamples // 64))]
    low, high = torch.cat(means)[:resamples].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high)
