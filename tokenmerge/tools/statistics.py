"""Confidence intervals of accuracies, and of differences on the same images: by score tests from counts, or by bootstrap."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Interval:
    """Mean with its 95 % confidence interval.

    Attributes:
        mean: mean of the values.
        low: lower end; for a bootstrap the 2.5th percentile of the resampled means.
        high: upper end; for a bootstrap the 97.5th percentile of the resampled means.
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


Z = 1.959963984540054
"""97.5th percentile of the standard normal distribution."""


def wilson(right: int, count: int) -> Interval:
    """Return the share of `right` among `count` images with its 95 % Wilson score interval, which stays within [0, 1].

    Args:
        right: number of images that were classified correctly.
        count: number of all images, at least 1.
    """
    share, squared = right / count, Z * Z / count
    middle = (share + squared / 2) / (1 + squared)
    reach = Z * math.sqrt(share * (1 - share) / count + squared / (4 * count)) / (1 + squared)
    low = 0.0 if right == 0 else max(0.0, middle - reach)
    high = 1.0 if right == count else min(1.0, middle + reach)
    return Interval(share, low, high)


def paired_difference(gained: int, lost: int, count: int) -> Interval:
    """Return the difference of two accuracies on the same images with its 95 % score interval (Tango, 1998).

    The interval excludes 0 exactly if McNemar's test (without correction) rejects equality. It has a width even if both methods agree
    on all images, where a bootstrap has none, because these images may still miss a difference that others would show. It
    depends on the counts alone, and hence not on the order of images or on how several processes shared them.

    Args:
        gained: number of images on which only the second method is right.
        lost: number of images on which only the first method is right.
        count: number of all images, at least 1.
    """
    difference = (gained - lost) / count

    def statistic(at: float) -> float:
        """Return the score statistic of the hypothesis that the difference is `at`; it falls as `at` grows."""
        linear = (2 * count - gained + lost) * at - gained - lost
        root = math.sqrt(max(0.0, linear * linear + 8 * count * lost * at * (1 - at)))
        only_first = max(0.0, (root - linear) / (4 * count))  # most likely share under the hypothesis
        variance = count * (2 * only_first + at * (1 - at))
        distance = gained - lost - count * at
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    def root_of(target: float, low: float, high: float) -> float:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if statistic(middle) > target else (low, middle)
        return (low + high) / 2

    return Interval(difference, root_of(Z, -1.0, difference), root_of(-Z, difference, 1.0))
