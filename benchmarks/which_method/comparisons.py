"""Paired comparisons of methods, and the agreement of metrics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.stats import kendalltau, t

from .values import BASELINES, QUESTIONS, REFERENCE, Result

FLIPS = 10_000
HALVES = 100
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
    flipped = scores(signs @ values)
    alone = ((flipped >= found - 2e-9).sum(0) + 1) / (FLIPS + 1) <= 1 - LEVEL
    together = found > np.quantile(flipped.max(1), LEVEL) + 2e-9
    spread = np.sqrt(np.maximum(squares - values.sum(0) ** 2 / count, 0) / np.maximum(count - 1, 1) / count)
    verdicts = np.sign(values.sum(0)).astype(int) * (alone.astype(int) + (alone & together))
    return Tests(verdicts, t.ppf((1 + LEVEL) / 2, np.maximum(count - 1, 1)) * spread)


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

        The mean is over the questions, and in a question over its metrics. Without a question every metric is one.
        """
        measured = self.result.metrics_of(pooling)
        questions = []
        for names in QUESTIONS.values() if self.result.asked(pooling) else [(name,) for name in measured]:
            orders = [self.means(pooling, methods, name) for name in names if name in measured]
            shares = [(order[:, None] < order).mean(1) for order in orders if not np.isnan(order).any()]
            questions += [np.mean(shares, 0)] if shares else []
        places = np.mean(questions, 0) if questions else np.zeros(len(methods))
        return dict(zip(methods, places.tolist(), strict=True))

    def means(self, pooling: str, methods: Sequence[str], metric: str, part: np.ndarray | None = None) -> np.ndarray:
        """(M,) means over the photographs that all methods have, or over a part of them; higher is better."""
        values = np.stack([self.result.values(pooling, method, metric) for method in methods])
        if part is not None:
            values = values[:, part]
        shared = ~np.isnan(values).any(0)
        if not shared.any():
            return np.full(len(methods), np.nan)
        return self.result.sign(metric) * values[:, shared].mean(1)

    def tau(self, pooling: str, one: str, other: str) -> float:
        """Kendall's tau between the orders in which two metrics put the methods.

        For one metric twice it is the mean over random halves of the photographs: of the order of one half and that of
        the other.
        """
        methods = self.ordered_methods(pooling)
        if one != other:
            return float(kendalltau(self.means(pooling, methods, one), self.means(pooling, methods, other)).statistic)
        rng = np.random.default_rng(SEED)
        has_value = ~np.isnan([self.result.values(pooling, m, one) for m in methods]).any(0)
        photographs = np.flatnonzero(has_value)
        taus = []
        for _ in range(HALVES):
            order = rng.permutation(photographs)
            halves = order[: len(order) // 2], order[len(order) // 2 :]
            taus.append(kendalltau(*(self.means(pooling, methods, one, half) for half in halves)).statistic)
        return float(np.mean(taus))

    def ordered_methods(self, pooling: str) -> list[str]:
        """Methods that are not slow and have all metrics of the pooling, without the baselines."""
        metrics = self.result.metrics_of(pooling)
        return [
            m
            for m in self.result.own_maps(pooling, slow=False)
            if m not in BASELINES and all(self.result.count(pooling, m, metric) for metric in metrics)
        ]
