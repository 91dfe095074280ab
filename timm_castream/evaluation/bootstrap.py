"""Averages over images with percentile bootstrap intervals, paired between the poolings.

One set of resamples serves all figures, so that a difference between two figures is paired by image.

N images, C classes, P poolings, S samples; R rows, one for each image and class evaluated: N of them, or one a positive
label.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TextIO

import numpy as np

from ..metrics.average_precision import mean_average_precision
from ..metrics.table import METRICS

RESAMPLES = 1000
_LEVELS = (0.025, 0.975)
_PAIR = ('ca', 'gap')  # a difference is the first minus the second

Column = tuple[str, ...]
# (pooling, method, metric), (pooling, 'accuracy') or (pooling, 'confidence')
Figure = tuple[str, ...]


class Estimate(NamedTuple):
    """A figure and its bootstrap 95 % interval, all in percent."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f'{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]'


@dataclass(frozen=True)
class ImageValues:
    """Values of every image, in float64.

    Attributes:
        row_columns: Names of the columns of `rows`: `('image',)`, and under each pooling p `(p, 'class')`,
            `(p, 'prob')` and `(p, method, metric)`. A metric of several columns has their positions behind its name.
        image_columns: Names of the columns of `images`: `('image',)`, then `(p, 'accuracy')` under each pooling. For
            multi-label data instead `('label', c)` of every class c (1, 0 or negative: not counted), and the
            probabilities `(p, 'score', c)`.
        rows: (R, columns), in the order of the images.
        images: (N, columns), in the order of the images.
    """

    row_columns: tuple[Column, ...]
    image_columns: tuple[Column, ...]
    rows: np.ndarray
    images: np.ndarray

    @property
    def is_multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return any(column[0] == 'label' for column in self.image_columns)

    @property
    def has_box(self) -> np.ndarray:
        """(R,) bool: rows whose class has a box under every pooling.

        The metrics of boxes count these rows alone, so that GAP and CA have the same images. Each pooling may explain
        its own prediction, and one of the two classes may have no box in the image.
        """
        boxed = [
            i
            for i, column in enumerate(self.row_columns)
            if column[2:3] and column[2] in METRICS and 'boxes' in METRICS[column[2]].needs
        ]
        return ~np.isnan(self.rows[:, boxed]).any(1)

    def row_values(self, *name: str) -> np.ndarray:
        """The columns of `rows` whose names begin with `name`, (R, columns)."""
        return self.rows[:, [i for i, column in enumerate(self.row_columns) if column[: len(name)] == name]]

    def write_csv(self, file: TextIO) -> None:
        """Writes one line a row, with the columns of its image. The line of an image without a row ends there."""
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(['/'.join(column) for column in (*self.image_columns, *self.row_columns[1:])])
        starts = np.searchsorted(self.rows[:, 0], self.images[:, 0])
        ends = np.searchsorted(self.rows[:, 0], self.images[:, 0], side='right')
        for image, start, end in zip(self.images, starts, ends, strict=True):
            for row in self.rows[start:end, 1:] if start < end else [np.empty(0)]:
                writer.writerow([_text(value) for value in (*image, *row)])


def _text(value: float) -> str:
    """Ten digits, and all digits of an integer: max_box_acc_v2 packs 48 results into one."""
    return str(int(value)) if value.is_integer() and abs(value) >= 1e10 else f'{value:.10g}'


class Bootstrap:
    """Figures of all images and of resamples of the images.

    Images are resampled instead of rows, since the labels of one image are no independent observations.

    Args:
        values: Values of every image.
        poolings: The poolings.
        seed: Seed of the resamples.
    """

    def __init__(self, values: ImageValues, poolings: Sequence[str], seed: int) -> None:
        self._values = values
        self._poolings = tuple(poolings)
        self._image_of_row = np.searchsorted(values.images[:, 0], values.rows[:, 0])
        names = dict.fromkeys(column[:3] for column in values.row_columns if column[2:3] and column[2] in METRICS)
        # Metrics without boxes are defined for every row, so one product serves all of them.
        everywhere = [name for name in names if 'boxes' not in METRICS[name[2]].needs]
        self._groups: list[tuple[list[Figure], tuple[np.ndarray, np.ndarray]]] = [
            (everywhere, self._sums([values.row_values(*name) for name in everywhere])),
            (
                [(p, 'confidence') for p in self._poolings],
                self._sums([100 * values.row_values(p, 'prob') for p in self._poolings]),
            ),
        ]
        self._boxed = [name for name in names if name not in everywhere]
        self._has_box = values.has_box[:, None]
        self._names: list[Figure] = [
            *(name for group, _ in self._groups for name in group),
            *self._boxed,
            *((p, 'accuracy') for p in poolings),
        ]
        point = self._figures(np.ones((1, len(values.images))))
        draws = np.concatenate([self._figures(weights) for weights in _resamples(len(values.images), seed)])
        self._point = dict(zip(self._names, point[0], strict=True))
        self._draws = dict(zip(self._names, draws.T, strict=True))

    def estimates(self) -> dict[Figure, Estimate]:
        """Every figure with its interval."""
        return {name: _estimate(self._point[name], self._draws[name]) for name in self._names}

    def differences(self) -> dict[Figure, Estimate]:
        """CA - GAP of every figure, by (method, metric), ('accuracy',) or ('confidence',). Empty without both."""
        first, second = _PAIR
        return {
            name[1:]: _estimate(
                self._point[name] - self._point[second, *name[1:]], self._draws[name] - self._draws[second, *name[1:]]
            )
            for name in self._names
            if name[0] == first and (second, *name[1:]) in self._point
        }

    def _sums(self, columns: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Sums over the rows of each image, (N, m), and the number of rows that are not NaN, (N,)."""
        num_images = len(self._values.images)
        rows = np.concatenate(columns, axis=1) if columns else np.zeros((len(self._image_of_row), 0))
        defined = ~np.isnan(rows).any(1)
        sums = np.zeros((num_images, rows.shape[1]))
        np.add.at(sums, self._image_of_row[defined], rows[defined])
        counts = np.bincount(self._image_of_row[defined], minlength=num_images).astype(float)
        return sums, counts

    def _figures(self, weights: np.ndarray) -> np.ndarray:
        """(S, figures) under (S, N) weights of the images."""
        with np.errstate(invalid='ignore'):
            parts = [(weights @ sums) / (weights @ counts)[:, None] for _, (sums, counts) in self._groups]
            for name in self._boxed:  # one after the other: MaxBoxAccV2 expands to 768 numbers a row
                numbers = METRICS[name[2]].expand(self._values.row_values(*name))
                sums, counts = self._sums([np.where(self._has_box, numbers, np.nan)])
                parts.append(METRICS[name[2]].figure((weights @ sums) / (weights @ counts)[:, None])[:, None])
        return np.concatenate([*parts, self._accuracy(weights)], axis=1)

    def _accuracy(self, weights: np.ndarray) -> np.ndarray:
        """(S, P) top-1 accuracy or mean average precision, in percent."""
        values = self._values
        if not values.is_multilabel:
            return weights @ values.images[:, 1:] / weights.sum(1, keepdims=True)
        labels, *scores = np.split(values.images[:, 1:], 1 + len(self._poolings), axis=1)
        return np.stack([mean_average_precision(labels, score, weights) for score in scores], axis=1)


def mean_curve(curves: np.ndarray, image_of_row: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean of curves and its bootstrap 95 % band.

    Args:
        curves: (R, n + 1) probabilities.
        image_of_row: (R,) index of the image of each curve. The curves of one image are resampled together.
        seed: Seed of the resamples, at least 0.

    Returns:
        Mean, lower and upper end of the band, (n + 1,) each.
    """
    _, index = np.unique(image_of_row, return_inverse=True)
    num_images = index.max() + 1
    sums = np.zeros((num_images, curves.shape[1]))
    np.add.at(sums, index, curves)
    counts = np.bincount(index, minlength=num_images).astype(float)
    draws = np.concatenate([(w @ sums) / (w @ counts)[:, None] for w in _resamples(num_images, seed)])
    low, high = np.quantile(draws, _LEVELS, axis=0)
    return curves.mean(0), low, high


def _estimate(value: Any, draws: np.ndarray) -> Estimate:
    if np.isnan(value):
        return Estimate(float('nan'), float('nan'), float('nan'))
    return Estimate(float(value), *np.nanquantile(draws, _LEVELS).tolist())


def _resamples(num_images: int, seed: int) -> Iterator[np.ndarray]:
    """`RESAMPLES` draws of N images with replacement, as counts (S, N), in blocks that fit in memory."""
    rng = np.random.default_rng(seed)
    block = max(1, 4_000_000 // num_images)
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        drawn = rng.integers(num_images, size=(size, num_images)) + np.arange(size)[:, None] * num_images
        yield np.bincount(drawn.ravel(), minlength=size * num_images).reshape(size, num_images).astype(float)
