"""Paired differences with bootstrap intervals, over the values of every image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2000
LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Difference:
    """CA - GAP of one metric over several seeds of the stream.

    Attributes:
        gap: GAP's figure.
        ca: The stream's figures, one a seed.
        values: CA - GAP, one a seed.
        lows, highs: Ends of the 95 % intervals, one a seed.
        lower_is_better: Direction of the metric; None where neither is better.
    """

    gap: float
    ca: tuple[float, ...]
    values: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]
    lower_is_better: bool | None = False

    @property
    def value(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.values))

    @property
    def low(self) -> float:
        """Lowest end of the intervals of all seeds."""
        return min(self.lows)

    @property
    def high(self) -> float:
        """Highest end of the intervals of all seeds."""
        return max(self.highs)

    @property
    def verdict(self) -> str:
        """'better' or 'worse' where the interval of every seed is on one side of 0, 'higher' or 'lower' where the
        metric has no direction; else 'no difference seen'."""
        if self.low > 0 or self.high < 0:
            if self.lower_is_better is None:
                return 'higher' if self.low > 0 else 'lower'
            return 'better' if (self.high < 0) == self.lower_is_better else 'worse'
        return 'no difference seen'


@lru_cache(maxsize=8)
def resamples(num_images: int) -> np.ndarray:
    """(S, N) how often each image is drawn in each of S resamples, divided by N. The same for every figure."""
    rng = np.random.default_rng(0)
    return rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=RESAMPLES) / num_images


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of the values of the images and its 95 % interval; images without a value (NaN) are left out."""
    values = values[~np.isnan(values)]
    low, high = np.quantile(resamples(len(values)) @ values, LEVELS)
    return float(values.mean()), float(low), float(high)


def compare(gap: np.ndarray, ca: Sequence[np.ndarray], lower_is_better: bool | None = False) -> Difference:
    """The paired difference of each seed's values from GAP's, image by image.

    Args:
        gap: (N,) GAP's values.
        ca: (N,) values of each seed.
        lower_is_better: Direction of the metric; None where neither is better.
    """
    triples = [interval(values - gap) for values in ca]
    return Difference(
        float(np.nanmean(gap)),
        tuple(float(np.nanmean(values)) for values in ca),
        *(tuple(triple[i] for triple in triples) for i in range(3)),
        lower_is_better,
    )
