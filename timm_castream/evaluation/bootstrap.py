"""Averages over images with percentile bootstrap intervals, paired between the poolings.

One set of resamples serves all values, so that a difference between two values is paired by image.

N images, C classes, P poolings, S samples; R pairs of an image and a class explained: N of them, or one a positive label.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..metrics.average_precision import mean_average_precision
from ..metrics.table import METRICS
from .values import ImageValues

RESAMPLES = 1000
_LEVELS = (0.025, 0.975)
_PAIR = ('ca', 'gap')  # a difference is the first minus the second

# (pooling, method, metric), (pooling, 'accuracy') or (pooling, 'confidence')
Cell = tuple[str, ...]


class Estimate(NamedTuple):
    """A value and its bootstrap 95 % interval, all in percent. NaN where there is no value, or of one image no interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return '-'
        if math.isnan(self.low):
            return f'{self.value:.2f}'
        return f'{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]'


class Bootstrap:
    """Values of all images, and of resamples of the images.

    Images are resampled instead of pairs, since the labels of one image are no independent observations.

    Args:
        values: Values of every image.
        poolings, methods, metrics: Names, in the order of the table.
        seed: Seed of the resamples.
    """

    def __init__(
        self, values: ImageValues, poolings: Sequence[str], methods: Sequence[str], metrics: Sequence[str], seed: int
    ) -> None:
        self._values = values
        self._poolings = tuple(poolings)
        self._seed = seed
        self._image_of_pair = np.searchsorted(values.images['image'], values.pairs['image'])
        cells: list[Cell] = [(p, m, k) for p in poolings for m in methods for k in metrics]
        self._boxed = [cell for cell in cells if 'boxes' in METRICS[cell[2]].needs]
        # MaxBoxAccV2 has many numbers a pair, so metrics of boxes are averaged one by one, the others in one product.
        others = [cell for cell in cells if cell not in self._boxed]
        self._groups: list[tuple[list[Cell], tuple[np.ndarray, np.ndarray]]] = [
            (others, self._sums([self._column(cell) for cell in others])),
            (
                [(p, 'confidence') for p in self._poolings],
                self._sums([100 * values.pairs[f'{p}/prob'] for p in self._poolings]),
            ),
        ]
        self._names: list[Cell] = [
            *(name for group, _ in self._groups for name in group),
            *self._boxed,
            *((p, 'accuracy') for p in poolings),
        ]
        point = self._averages(np.ones((1, len(values.images['image']))))
        draws = np.concatenate([self._averages(weights) for weights in _resamples(len(values.images['image']), seed)])
        self._point = dict(zip(self._names, point[0], strict=True))
        self._draws = dict(zip(self._names, draws.T, strict=True))

    def estimates(self) -> dict[Cell, Estimate]:
        """Every value with its interval."""
        return {name: _estimate(self._point[name], self._draws[name], self._count(name)) for name in self._names}

    def paired(self, cell: Cell, other: Cell) -> Estimate:
        """A value of a metric minus another one, over the pairs that have both, with the interval of the difference."""
        both = self.has_value(cell), self.has_value(other)
        if np.array_equal(*both):
            difference = self._point[cell] - self._point[other]
            return _estimate(difference, self._draws[cell] - self._draws[other], self._count(cell))
        shared = np.logical_and(*both)
        weights = [
            np.ones((1, len(self._values.images['image']))),
            *_resamples(len(self._values.images['image']), self._seed),
        ]
        point, *draws = (self._average(cell, shared, part) - self._average(other, shared, part) for part in weights)
        return _estimate(point[0], np.concatenate(draws), len(np.unique(self._image_of_pair[shared])))

    def differences(self) -> dict[Cell, Estimate]:
        """CA - GAP of every value, by (method, metric), ('accuracy',) or ('confidence',). Empty without both."""
        first, second = _PAIR
        return {
            name[1:]: _estimate(
                self._point[name] - self._point[second, *name[1:]],
                self._draws[name] - self._draws[second, *name[1:]],
                self._count(name),
            )
            for name in self._names
            if name[0] == first and (second, *name[1:]) in self._point
        }

    def _count(self, name: Cell) -> int:
        """Number of images behind a value."""
        if len(name) < 3:
            return len(self._values.images['image'])
        return len(np.unique(self._image_of_pair[self.has_value(name)]))

    def has_value(self, cell: Cell) -> np.ndarray:
        """(R,) bool: pairs with a value of a metric under every pooling, so that the poolings have the same images."""
        _, method, metric = cell
        measured = self._values.is_measured(self._poolings, method)
        if 'boxes' in METRICS[metric].needs:
            return measured & self._values.has_box(self._poolings)
        arrays = [self._values.pairs[f'{p}/{method}/{metric}'] for p in self._poolings]
        return measured & ~np.any([np.isnan(array) for array in arrays], axis=0)

    def _column(self, cell: Cell) -> np.ndarray:
        """(R,) values of a metric, NaN for pairs without one."""
        return np.where(self.has_value(cell), self._values.pairs['/'.join(cell)], np.nan)

    def _average(self, cell: Cell, pairs: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """(S,) averages of a metric over some of the pairs, (R,) bool, under (S, N) weights of the images."""
        array = self._values.pairs['/'.join(cell)]
        # Each number of a pair that counts is there, so one count serves all.
        sums, counts = self._sums([np.where(pairs[:, None], array.reshape(len(array), -1), np.nan)])
        with np.errstate(invalid='ignore'):
            return METRICS[cell[2]].from_means((weights @ sums) / (weights @ counts[:, :1]))

    def _sums(self, columns: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Sums over the pairs of each image that are not NaN, and their number, (N, m) each.

        Args:
            columns: (R,) or (R, m) arrays.
        """
        num_images = len(self._values.images['image'])
        pairs = np.column_stack(columns) if columns else np.zeros((len(self._image_of_pair), 0))
        defined = ~np.isnan(pairs)
        sums, counts = np.zeros((num_images, pairs.shape[1])), np.zeros((num_images, pairs.shape[1]))
        np.add.at(sums, self._image_of_pair, np.where(defined, pairs, 0))
        np.add.at(counts, self._image_of_pair, defined)
        return sums, counts

    def _averages(self, weights: np.ndarray) -> np.ndarray:
        """(S, names) under (S, N) weights of the images."""
        with np.errstate(invalid='ignore'):
            parts = [(weights @ sums) / (weights @ counts) for _, (sums, counts) in self._groups]
            for cell in self._boxed:  # one after the other: MaxBoxAccV2 has 768 numbers a pair
                parts.append(self._average(cell, self.has_value(cell), weights)[:, None])
        return np.concatenate([*parts, self._accuracy(weights)], axis=1)

    def _accuracy(self, weights: np.ndarray) -> np.ndarray:
        """(S, P) top-1 accuracy or mean average precision, in percent."""
        images = self._values.images
        if not self._values.is_multilabel:
            right = np.stack([images[f'{p}/accuracy'] for p in self._poolings], axis=1)
            return weights @ right / weights.sum(1, keepdims=True)
        scores = [images[f'{p}/score'] for p in self._poolings]
        return np.stack([mean_average_precision(images['label'], score, weights) for score in scores], axis=1)


def mean_curve(curves: np.ndarray, image_of_pair: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean of curves and its bootstrap 95 % band.

    Args:
        curves: (R, n + 1) probabilities.
        image_of_pair: (R,) index of the image of each curve. The curves of one image are resampled together.
        seed: Seed of the resamples, at least 0.

    Returns:
        Mean, lower and upper end of the band, (n + 1,) each.
    """
    _, index = np.unique(image_of_pair, return_inverse=True)
    num_images = index.max() + 1
    sums = np.zeros((num_images, curves.shape[1]))
    np.add.at(sums, index, curves)
    counts = np.bincount(index, minlength=num_images).astype(float)
    draws = np.concatenate([(w @ sums) / (w @ counts)[:, None] for w in _resamples(num_images, seed)])
    low, high = np.quantile(draws, _LEVELS, axis=0)
    return curves.mean(0), low, high


def _estimate(value: Any, draws: np.ndarray, count: int) -> Estimate:
    """The interval of a value from the draws. Those of one image are all equal, which would look certain."""
    if np.isnan(value) or count < 2:
        return Estimate(float(value), float('nan'), float('nan'))
    return Estimate(float(value), *np.nanquantile(draws, _LEVELS).tolist())


def _resamples(num_images: int, seed: int) -> Iterator[np.ndarray]:
    """`RESAMPLES` draws of N images with replacement, as counts (S, N), in blocks that fit in memory."""
    rng = np.random.default_rng(seed)
    block = max(1, 4_000_000 // num_images)
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        drawn = rng.integers(num_images, size=(size, num_images)) + np.arange(size)[:, None] * num_images
        yield np.bincount(drawn.ravel(), minlength=size * num_images).reshape(size, num_images).astype(float)
