"""Values of an evaluation, image by image: arrays by the names of the columns of images.csv.

N images, C classes; R pairs of an image and a class explained: N of them, or one a positive label.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

Table = dict[str, np.ndarray]

# Columns of pairs whose metrics have no value, and why.
_NOT_MEASURED = {
    'not_finite': '{method} under {pooling} gives NaN',
    'unmeasured': 'NaN scores where {method} under {pooling} is measured',
}
_CLASS_BY_CLASS = ('label', 'score')  # arrays of images with a number a class


@dataclass(frozen=True)
class ImageValues:
    """Values of some images: of a batch, or of a whole evaluation.

    Attributes:
        images: `'image'`, (N,) positions in the data set, and under each pooling `'gap/accuracy'`, (N,) of 0 and 100.
            Multi-label data has instead `'label'`, (N, C) of 1, 0 or negative where a class does not count, and the
            probabilities `'gap/score'`, (N, C).
        pairs: `'image'`, (R,), and under each pooling `'gap/class'` and `'gap/prob'`, (R,), and the values of every
            metric, `'gap/METHOD/METRIC'`, (R,) or, of max_box_acc_v2, (R, 768) bool. Metrics of boxes add
            `'gap/has_box'`, (R,) bool. Every method has `'gap/METHOD/constant'`, (R,) bool, maps that say nothing, and
            `'gap/METHOD/not_finite'` and `'gap/METHOD/unmeasured'`, NaN in the map and in the scores of the network, where
            the values of the method are NaN. Kept curves are `'gap/METHOD/insertion_curve'`, (R, n + 1).
    """

    images: Table
    pairs: Table

    @classmethod
    def concatenate(cls, parts: Iterable[ImageValues]) -> ImageValues:
        """The values of all parts, in the order of the images. A name that a part lacks is left out."""
        parts = list(parts)
        return cls(_concatenate([part.images for part in parts]), _concatenate([part.pairs for part in parts]))

    def without(self, done: Collection[int]) -> ImageValues:
        """The values without those of some images."""
        images, pairs = (
            {name: array[~np.isin(table['image'], list(done))] for name, array in table.items()}
            for table in (self.images, self.pairs)
        )
        return ImageValues(images, pairs)

    @property
    def is_multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return 'label' in self.images

    def has_box(self, poolings: Sequence[str]) -> np.ndarray:
        """(R,) bool: pairs whose class has a box under every pooling.

        The metrics of boxes count these pairs alone, so that GAP and CA have the same images. Each pooling may explain
        its own prediction, and one of the two classes may have no box in the image.
        """
        return np.all([self.pairs[f'{pooling}/has_box'] for pooling in poolings], axis=0)

    def count(self, pooling: str, method: str, kind: str) -> int:
        """Number of maps of a method that are `'constant'` or `'not_finite'`."""
        return int(self.pairs.get(f'{pooling}/{method}/{kind}', np.zeros(0)).sum())

    def is_measured(self, poolings: Sequence[str], method: str) -> np.ndarray:
        """(R,) bool: pairs without NaN in the map of a method, and in the scores that measure it, under every pooling.

        The figures of the method count these pairs alone, so that GAP and CA have the same images.
        """
        bad = np.zeros(len(self.pairs['image']), dtype=bool)
        for pooling, kind in itertools.product(poolings, _NOT_MEASURED):
            bad |= self.pairs.get(f'{pooling}/{method}/{kind}', False)
        return ~bad

    def without_scores(self, poolings: Sequence[str]) -> dict[int, str]:
        """Images for which the network gives NaN, which are left out of all results: {position: reason}."""
        return self._named({f'NaN scores under {p}': np.isnan(self.pairs[f'{p}/prob']) for p in poolings})

    def not_measured(self, poolings: Sequence[str], methods: Sequence[str]) -> dict[int, str]:
        """Images with NaN in a map or in the scores that measure it: {position: reason}."""
        return self._named(
            {
                text.format(method=m, pooling=p): self.pairs[name]
                for (kind, text), m, p in itertools.product(_NOT_MEASURED.items(), methods, poolings)
                if (name := f'{p}/{m}/{kind}') in self.pairs
            }
        )

    def _named(self, reasons: Mapping[str, np.ndarray]) -> dict[int, str]:
        """The first reason of each image, of those that are given with the (R,) pairs for which they hold."""
        named: dict[int, str] = {}
        for reason, holds in reasons.items():
            named = {**dict.fromkeys(self.pairs['image'][holds].tolist(), reason), **named}
        return dict(sorted(named.items()))

    def means(self) -> dict[str, float]:
        """The mean of every column of images.csv that holds measurements, as plain numbers."""
        columns = {
            name: array
            for table in (self.images, self.pairs)
            for name, array in _columns(table).items()
            if array.dtype.kind == 'f' and not np.isnan(array).all()
        }
        return {name: float(np.nanmean(array)) for name, array in columns.items()}

    def write_csv(
        self, file: TextIO, files: Mapping[int, str] | None = None, label_names: Sequence[str] | None = None
    ) -> None:
        """Writes one line a pair, with the columns of its image. The line of an image without a pair ends there.

        Args:
            file: A text file.
            files: Names of the images by their positions, for the column `file`.
            label_names: Names of the classes, for the columns `gap/class_name` and `ca/class_name`.
        """
        of_image, of_pair = _columns(self.images), _columns(self.pairs)
        del of_pair['image']
        if files is not None:
            of_image = _after(of_image, 'image', 'file', [files.get(i, '') for i in of_image['image'].tolist()])
        if label_names is not None:
            for name in [name for name in of_pair if name.rpartition('/')[2] == 'class']:
                texts = [label_names[i] if i < len(label_names) else '' for i in of_pair[name].tolist()]
                of_pair = _after(of_pair, name, f'{name}_name', texts)
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow([*of_image, *of_pair])
        image_cells, pair_cells = (
            list(zip(*(map(_text, array.tolist()) for array in columns.values()), strict=True))
            for columns in (of_image, of_pair)
        )
        starts, ends = (
            np.searchsorted(self.pairs['image'], self.images['image'], side=side) for side in ('left', 'right')
        )
        for cells, start, end in zip(image_cells, starts, ends, strict=True):
            for more in pair_cells[start:end] or [()]:
                writer.writerow([*cells, *more])

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Plain data for JSON. `from_json` reads it."""
        return {
            kind: {name: _encode(array) for name, array in table.items()}
            for kind, table in (('images', self.images), ('pairs', self.pairs))
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Mapping[str, Any]]) -> ImageValues:
        """The values that `to_json` gave.

        Raises:
            ValueError: If the data are of another kind.
        """
        try:
            tables = [{name: _decode(value) for name, value in data[kind].items()} for kind in ('images', 'pairs')]
            lengths = [{len(array) for array in table.values()} for table in tables]
            if any('image' not in table for table in tables) or any(len(length) != 1 for length in lengths):
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError('These are no values of an evaluation.') from None
        return cls(*tables)


def _concatenate(tables: list[Table]) -> Table:
    filled = [table for table in tables if len(table['image'])]
    if not filled:
        return {'image': np.zeros(0, dtype=int)}
    order = np.argsort(np.concatenate([table['image'] for table in filled]), kind='stable')
    return {
        name: np.concatenate([table[name] for table in filled])[order]
        for name in filled[0]
        if all(name in table for table in filled)
    }


def _columns(table: Table) -> Table:
    """The columns of images.csv. An array of numbers a class has a column a class; yes and no are in values.npz."""
    columns: Table = {}
    for name, array in table.items():
        if array.ndim == 1 and array.dtype != bool:
            columns[name] = array
        elif array.ndim == 2 and name.rpartition('/')[2] in _CLASS_BY_CLASS:
            columns |= {f'{name}/{i}': column for i, column in enumerate(array.T)}
    return columns


def _after(table: Table, name: str, new: str, values: Sequence[str]) -> Table:
    """The table with a new column behind another one."""
    columns: Table = {}
    for key, array in table.items():
        columns[key] = array
        if key == name:
            columns[new] = np.array(values, dtype=object)
    return columns


def _text(value: Any) -> str:
    return f'{value:.10g}' if isinstance(value, float) else str(value)


def _encode(array: np.ndarray) -> Any:
    """A list; an array of yes and no with several a row as one hexadecimal number a row."""
    if array.dtype == bool and array.ndim > 1:
        packed = np.packbits(array.reshape(len(array), -1), axis=1)
        return {'shape': array.shape[1:], 'bits': [row.tobytes().hex() for row in packed]}
    return array.tolist()


def _decode(value: Any) -> np.ndarray:
    if not isinstance(value, Mapping):
        array = np.asarray(value)
        if array.dtype.kind not in 'bifU':
            raise ValueError
        return array
    rows = np.array([list(bytes.fromhex(row)) for row in value['bits']], dtype=np.uint8)
    shape = value['shape']
    return np.unpackbits(rows, axis=1, count=int(np.prod(shape))).astype(bool).reshape(-1, *shape)
