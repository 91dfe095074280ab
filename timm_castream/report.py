"""The result of an evaluation: figures with bootstrap intervals, printed as the paper's tables, saved as CSV and JSON.

N images, C classes, P poolings; R rows, one for each image and class evaluated: N of them, or one a positive label.
"""
from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from .attribution import METHOD_NAMES
from .average_precision import mean_average_precision
from .files import write_whole

METRICS = {
    'average_drop': 'AD ↓',
    'average_gain': 'AG ↑',
    'average_increase': 'AI ↑',
    'insertion': 'I ↑',
    'deletion': 'D ↓',
}

_RESAMPLES = 1000
_LEVELS = (0.025, 0.975)


class Estimate(NamedTuple):
    """A figure and its bootstrap 95 % interval, all in percent."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f'{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]'


@dataclass(frozen=True)
class ImageValues:
    """What was measured of every image, in float64.

    Attributes:
        row_names: Names of the columns of `rows`: `image`, and under each pooling p `p/class`, `p/prob` and the five
            metrics of each method m, `p/m/average_drop` and so on.
        image_names: Names of the columns of `images`: `image`, then `p/accuracy` under each pooling; of multi-label
            data instead `label/c` of every class c, 1, 0 or negative (not counted), and the probabilities `p/score/c`.
        rows: (R, columns), in the order of the images.
        images: (N, columns), in the order of the images.
    """

    row_names: tuple[str, ...]
    image_names: tuple[str, ...]
    rows: np.ndarray
    images: np.ndarray

    def write_csv(self, file: TextIO) -> None:
        """One line a row, with the columns of its image; the line of an image without a row ends there."""
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow([*self.image_names, *self.row_names[1:]])
        starts = np.searchsorted(self.rows[:, 0], self.images[:, 0])
        ends = np.searchsorted(self.rows[:, 0], self.images[:, 0], side='right')
        for image, start, end in zip(self.images, starts, ends, strict=True):
            for row in self.rows[start:end, 1:] if start < end else [np.empty(0)]:
                writer.writerow([f'{value:.10g}' for value in (*image, *row)])


@dataclass(frozen=True)
class Report:
    """The table of a network, pooling x method x metric: `report['ca', 'score_cam', 'average_drop']` is an `Estimate`.

    Attributes:
        network: Name of the network.
        poolings, methods: In the order of the table.
        accuracy: By pooling: top-1 accuracy, or the mean average precision of multi-label data.
        accuracy_name: `'accuracy'` or `'mAP'`.
        figures: By (pooling, method, metric).
        num_images: N.
        settings: What the figures depend on: arguments, seed, versions. Plain data.
        values: What the figures were computed from.
    """

    network: str
    poolings: tuple[str, ...]
    methods: tuple[str, ...]
    accuracy: dict[str, Estimate]
    accuracy_name: str
    figures: dict[tuple[str, str, str], Estimate]
    num_images: int
    settings: dict[str, Any]
    values: ImageValues

    @classmethod
    def from_values(
            cls,
            network: str,
            poolings: Sequence[str],
            methods: Sequence[str],
            values: ImageValues,
            seed: int,
            settings: dict[str, Any],
    ) -> Report:
        """Averages over all rows, with intervals from resampling the images, all figures from the same resamples."""
        figures = _bootstrap(poolings, values, seed).T.tolist()
        estimates = {name: Estimate(*f) for name, f in zip(_figure_names(poolings, values), figures, strict=True)}
        return cls(
            network=network,
            poolings=tuple(poolings),
            methods=tuple(methods),
            accuracy={p: estimates[f'{p}/accuracy'] for p in poolings},
            accuracy_name='mAP' if _is_multilabel(values) else 'accuracy',
            figures={(p, m, k): estimates[f'{p}/{m}/{k}'] for m in methods for p in poolings for k in METRICS},
            num_images=len(values.images),
            settings=settings,
            values=values,
        )

    def __getitem__(self, key: tuple[str, str, str]) -> Estimate:
        return self.figures[key]

    def __str__(self) -> str:
        accuracy = [('NETWORK', 'POOLING', f'{self.accuracy_name} ↑')]
        accuracy += [(self.network, p.upper(), str(self.accuracy[p])) for p in self.poolings]
        table = [('NETWORK', 'METHOD', 'POOLING', *METRICS.values())]
        table += [
            (self.network, METHOD_NAMES[m], p.upper(), *(str(self[p, m, k]) for k in METRICS))
            for m in self.methods for p in self.poolings
        ]
        note = (f'{self.num_images} images, class: {self.settings.get("target")}; in percent, with 95 % intervals from '
                f'{_RESAMPLES} bootstrap resamples')
        return '\n'.join([*_aligned(accuracy), '', *_aligned(table), '', note])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, all but the values of single images."""
        return {
            'network': self.network,
            'num_images': self.num_images,
            self.accuracy_name: {p: estimate.value for p, estimate in self.accuracy.items()},
            'rows': self._table_rows(),
            'settings': self.settings,
        }

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `table.csv`, `evaluation.json` and `images.csv`, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with write_whole(folder / 'images.csv') as file:
            self.values.write_csv(file)
        with write_whole(folder / 'table.csv') as file:
            rows = self._table_rows()
            writer = csv.DictWriter(file, rows[0], lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
        with write_whole(folder / 'evaluation.json') as file:
            json.dump(self.to_dict(), file, indent=2)
            file.write('\n')

    def _table_rows(self) -> list[dict[str, Any]]:
        rows = []
        for m in self.methods:
            for p in self.poolings:
                row: dict[str, Any] = {'network': self.network, 'method': m, 'pooling': p}
                figures = {self.accuracy_name: self.accuracy[p], **{k: self[p, m, k] for k in METRICS}}
                for name, (value, low, high) in figures.items():
                    row |= {name: value, f'{name}_low': low, f'{name}_high': high}
                rows.append(row)
        return rows


def _bootstrap(poolings: Sequence[str], values: ImageValues, seed: int) -> np.ndarray:
    """(3, figures): each figure of all images, and the ends of its interval."""
    num_images = len(values.images)
    # Resampled are images, not rows: the labels of an image are no independent observations.
    image_of_row = np.searchsorted(values.images[:, 0], values.rows[:, 0])
    columns = [i for i, name in enumerate(values.row_names) if name.rpartition('/')[2] in METRICS]
    sums = np.zeros((num_images, len(columns)))
    np.add.at(sums, image_of_row, values.rows[:, columns])
    counts = np.bincount(image_of_row, minlength=num_images).astype(float)

    def figures(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid='ignore'):
            means = (weights @ sums) / (weights @ counts)[:, None]
        return np.concatenate([means, _accuracy(poolings, values, weights)], axis=1)

    point = figures(np.ones((1, num_images)))
    draws = np.concatenate([figures(weights) for weights in _resamples(num_images, seed)])
    return np.concatenate([point, np.nanquantile(draws, _LEVELS, axis=0)])


def _figure_names(poolings: Sequence[str], values: ImageValues) -> list[str]:
    metrics = [name for name in values.row_names if name.rpartition('/')[2] in METRICS]
    return [*metrics, *(f'{p}/accuracy' for p in poolings)]


def _resamples(num_images: int, seed: int) -> Iterator[np.ndarray]:
    """`_RESAMPLES` draws of N images with replacement, as counts (S, N), in blocks that fit in memory."""
    rng = np.random.default_rng(seed)
    block = max(1, 4_000_000 // num_images)
    for start in range(0, _RESAMPLES, block):
        size = min(block, _RESAMPLES - start)
        drawn = rng.integers(num_images, size=(size, num_images)) + np.arange(size)[:, None] * num_images
        yield np.bincount(drawn.ravel(), minlength=size * num_images).reshape(size, num_images).astype(float)


def _accuracy(poolings: Sequence[str], values: ImageValues, weights: np.ndarray) -> np.ndarray:
    """(S, P) top-1 accuracy or mean average precision, in percent."""
    if not _is_multilabel(values):
        return weights @ values.images[:, 1:] / weights.sum(1, keepdims=True)
    labels, *scores = np.split(values.images[:, 1:], 1 + len(poolings), axis=1)
    return np.stack([mean_average_precision(labels, score, weights) for score in scores], axis=1)


def _is_multilabel(values: ImageValues) -> bool:
    return any(name.startswith('label/') for name in values.image_names)


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
