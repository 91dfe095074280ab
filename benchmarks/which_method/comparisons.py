"""Paired comparisons of methods, and the agreement of metrics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.stats import t

from .values import BASELINES, REFERENCE, Result

FLIPS = 20_000  # of all tests taken together
FLIPS_ALONE = 200_000  # of one test, where there are more photographs than EXACT
EXACT = 24  # photographs, whose flips are all counted
HALVES = 1000
LEVEL = 0.95
SEED = 0


class Tests(NamedTuple):
    """Tests of K means of paired differences.

    Attributes:
        verdicts: (K,) 0 where the mean is not told apart from 0, its sign where it is, and twice its sign where it is
            with all K tests taken together.
        seen: (K,) half of the width of Student's 95 % interval of the mean.
    """

    verdicts: np.ndarray
    seen: np.ndarray


def sign_flip_tests(differences: np.ndarray) -> Tests:
    """Tests whether means are 0 by flips of the signs of whole photographs.

    If two methods are equal, a difference is as likely as the opposite one. The differences of a photograph flip
    together, so that tests that depend on each other are not counted as many; the largest score of each flip is the
    bound of all tests together (Westfall and Young, 1993). A score is Student's t as a normal quantile (Wallace, 1959),
    since columns have different numbers of photographs.

    Args:
        differences: (N, K) differences of N photographs, NaN where there is none.
    """
    known = ~np.isnan(differences)
    values = np.nan_to_num(differences)
    count = known.sum(0)
    squares = (values**2).sum(0)
    signs = np.random.default_rng(SEED).choice([-1.0, 1.0], size=(FLIPS, len(values)))

    def scores(sums: np.ndarray) -> np.ndarray:
        # t^2 / (n - 1) = u / (1 - u) with u, the share of the squares that the mean has
        share = np.clip(sums**2 / np.maximum(count * squares, 1e-12), 0, 1 - 1e-9)
        free = np.maximum(count - 1, 1)
        return np.sqrt(-free * np.log1p(-share)) * (8 * free + 1) / (8 * free + 3)

    found = scores(values.sum(0)) + 1e-9
    alone = p_values(differences) <= 1 - LEVEL
    together = found > np.quantile(scores(signs @ values).max(1), LEVEL) + 2e-9
    spread = np.sqrt(np.maximum(squares - values.sum(0) ** 2 / count, 0) / np.maximum(count - 1, 1) / count)
    verdicts = np.sign(values.sum(0)).astype(int) * (alone.astype(int) + (alone & together))
    return Tests(verdicts, t.ppf((1 + LEVEL) / 2, np.maximum(count - 1, 1)) * spread)


def p_values(differences: np.ndarray) -> np.ndarray:
    """(K,) two-sided p of the test of each column by itself: the share of the flips that are at least as clear.

    All flips of up to EXACT photographs are counted, the others are drawn.

    Args:
        differences: (N, K) differences of N photographs, NaN where there is none.
    """
    found = np.ones(differences.shape[1])
    groups: dict[bytes, list[int]] = {}  # columns with the same photographs share the drawn flips
    for k, known in enumerate((~np.isnan(differences)).T):
        if known.sum() > EXACT:
            groups.setdefault(known.tobytes(), []).append(k)
        elif known.any():
            found[k] = _exact_p(differences[known, k])
    for columns in groups.values():
        values = differences[:, columns]
        values = values[~np.isnan(values[:, 0])]
        rng, count, bound = np.random.default_rng(SEED), 0, _bound(values)
        for _ in range(FLIPS_ALONE // FLIPS):
            signs = rng.choice([-1.0, 1.0], size=(FLIPS, len(values)))
            count += (np.abs(signs @ values) >= bound).sum(0)
        found[columns] = (count + 1) / (FLIPS_ALONE + 1)
    return found


def _exact_p(values: np.ndarray) -> float:
    """Of one column, (n,), from the sums of its two halves under all flips of each."""
    half = len(values) // 2
    first, second = (_all_sums(part) for part in (values[:half], values[half:]))
    second.sort()
    above = len(second) - np.searchsorted(second, _bound(values) - first)  # a sum and its opposite are as clear
    return min(1.0, 2 * above.sum() / 2 ** len(values))


def _all_sums(values: np.ndarray) -> np.ndarray:
    """(2**n,) the sums of n values under all flips of their signs."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums - value, sums + value])
    return sums


def _bound(values: np.ndarray) -> np.ndarray:
    """The size of the sum, and a little less, since sums are rounded."""
    return np.abs(values.sum(0)) - 1e-9 * np.abs(values).sum(0) - 1e-12


def taus(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(H,) Kendall's tau-b of the rows of two arrays, (H, M)."""
    first, second = np.triu_indices(one.shape[1], 1)
    signs = [np.sign(np.round(array[:, first] - array[:, second], 9)) for array in (one, other)]
    sizes = [np.abs(sign).sum(1) for sign in signs]
    with np.errstate(invalid='ignore'):
        return (signs[0] * signs[1]).sum(1) / np.sqrt(sizes[0] * sizes[1])


class Comparisons:
    """The comparisons of a network.

    Slow methods were measured on fewer photographs. They are tested together and apart from the others.
    """

    def __init__(self, result: Result) -> None:
        self.result = result

    @cached_property
    def against_reference(self) -> dict[tuple[str, str, str], tuple[int, float]]:
        """{(pooling, method, metric): verdict, positive if better than Grad-CAM, and the half width of the interval}."""
        return self._against(REFERENCE)

    @cached_property
    def against_centre(self) -> dict[tuple[str, str, str], tuple[int, float]]:
        return self._against('centre')

    @cached_property
    def against_random(self) -> dict[tuple[str, str, str], tuple[int, float]]:
        return self._against('random')

    def _against(self, other: str) -> dict[tuple[str, str, str], tuple[int, float]]:
        found = {}
        for slow in (False, True):
            keys = [
                (p, method, metric)
                for p in self.result.poolings
                for method in self.result.own_maps(p, slow)
                for metric in self.result.metrics_of(p, method)
                if method != other and metric != 'complexity'
            ]
            gains = [self.result.gain(p, method, metric, other) for p, method, metric in keys]
            keys = [key for key, gain in zip(keys, gains, strict=True) if (~np.isnan(gain)).sum() > 1]
            gains = [gain for gain in gains if (~np.isnan(gain)).sum() > 1]
            if keys:
                tests = sign_flip_tests(np.stack(gains, 1))
                found |= dict(zip(keys, zip(tests.verdicts.tolist(), tests.seen.tolist(), strict=True), strict=True))
        return found

    def verdicts(self, pooling: str, method: str, metrics: Sequence[str], other: str = REFERENCE) -> list[int]:
        """Of a method against another, for those of the metrics that both have."""
        table = {REFERENCE: self.against_reference, 'centre': self.against_centre, 'random': self.against_random}[other]
        return [table[pooling, method, name][0] for name in metrics if (pooling, method, name) in table]

    def beside_baselines(self, pooling: str, method: str) -> tuple[int, int]:
        """In how many questions a method is better than both baselines, and worse than one, each test by itself."""
        asked = self.result.asked(pooling)
        pairs = list(zip(*(self.verdicts(pooling, method, asked, other) for other in BASELINES), strict=True))
        return sum(min(pair) > 0 for pair in pairs), sum(min(pair) < 0 for pair in pairs)

    def mean_places(self, pooling: str, methods: Sequence[str]) -> dict[str, float]:
        """{method: its mean place among the methods, from 0, the best, to 1}, on the photographs that all of them have.

        The mean is over the questions, of which the first metric speaks. Without a question every metric is one.
        """
        asked = self.result.asked(pooling) or self.result.metrics_of(pooling)
        orders = [order for name in asked if not np.isnan(order := self.means(pooling, methods, name)).any()]
        shares = [(order[:, None] < order).mean(1) for order in orders]
        places = np.mean(shares, 0) if shares else np.zeros(len(methods))
        return dict(zip(methods, places.tolist(), strict=True))

    def means(self, pooling: str, methods: Sequence[str], metric: str) -> np.ndarray:
        """(M,) means over the photographs that all methods have; higher is better."""
        values = np.stack([self.result.values(pooling, method, metric) for method in methods])
        shared = ~np.isnan(values).any(0)
        if not shared.any():
            return np.full(len(methods), np.nan)
        return self.result.sign(metric) * values[:, shared].mean(1)

    def tau(self, pooling: str, one: str, other: str) -> float:
        """Kendall's tau between the orders in which two metrics put the methods, or a metric and itself.

        It is the mean over random halves of the photographs that both have: of the order that one metric gives on one
        half and the other one on the other half. So two metrics agree on no photograph's noise, as a metric does not
        with itself.
        """
        methods = self.ordered_methods(pooling)
        values = [np.stack([self.result.values(pooling, m, name) for m in methods], 1) for name in (one, other)]
        photographs = np.flatnonzero(~np.isnan(values[0] + values[1]).any(1))
        rng = np.random.default_rng(SEED)
        first = rng.permuted(np.tile(np.arange(len(photographs)), (HALVES, 1)), axis=1) < len(photographs) // 2
        means = [
            self.result.sign(name) * (half @ value[photographs]) / half.sum(1, keepdims=True)
            for name, value, half in zip((one, other), values, (first, ~first), strict=True)
        ]
        return float(np.nanmean(taus(*means)))

    def ordered_methods(self, pooling: str) -> list[str]:
        """Methods that are not slow and have all metrics of the pooling, without the baselines."""
        metrics = self.result.metrics_of(pooling)
        return [
            m
            for m in self.result.own_maps(pooling, slow=False)
            if m not in BASELINES and all(self.result.count(pooling, m, metric) for metric in metrics)
        ]
