"""The result of an evaluation: values with intervals, printed as the paper's tables, saved as CSV and JSON."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from .._utils.files import make_folder, write_whole
from ..attribution.methods import method_title
from ..metrics.table import METRICS
from . import tables
from .bootstrap import Bootstrap, Estimate
from .resume import SETTINGS
from .values import ImageValues

__all__ = ['Estimate', 'ImageValues', 'Report']

DIFFERENCE = 'ca-gap'  # in the column `pooling` of the files


@dataclass(frozen=True)
class Report:
    """The table of a network, pooling x method x metric: `report['ca', 'score_cam', 'average_drop']` is an `Estimate`.

    Attributes:
        network: Name of the network.
        poolings, methods, metrics: In the order of the table.
        accuracy: By pooling: top-1 accuracy, or the mean average precision of multi-label data.
        accuracy_name: `'accuracy'` or `'mAP'`.
        confidence: By pooling: mean probability of the class explained. AG and AI depend on it.
        figures: By (pooling, method, metric).
        differences: CA - GAP, paired by image: by (method, metric), `('accuracy',)` or `('confidence',)`.
        num_images: N.
        settings: Everything that the values depend on: arguments, seed, versions. Plain data.
        values: Values of every image.
        resampled: The resamples that the intervals are made of; those of `compare` and `best` too.
        unreadable: Images that could not be read and are left out of all results: reason by name.
        files: Names of the images by their positions in the data set.
        label_names: Names of the model's classes, where they are known.
        not_finite: Images with NaN in a map, which its method leaves out, or in the scores, left out of all results:
            reason by name.
        not_finite_maps: Number of maps with NaN, by (pooling, method).
        pooling_names: What the network pools by, `'GAP'` or `'class token'`, and `'CA'`, by pooling.
    """

    network: str
    poolings: tuple[str, ...]
    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    accuracy: dict[str, Estimate]
    accuracy_name: str
    confidence: dict[str, Estimate]
    figures: dict[tuple[str, str, str], Estimate]
    differences: dict[tuple[str, ...], Estimate]
    num_images: int
    settings: dict[str, Any]
    values: ImageValues
    resampled: Bootstrap = field(repr=False, compare=False)
    unreadable: dict[str, str] = field(default_factory=dict)
    files: dict[int, str] | None = None
    label_names: list[str] | None = None
    not_finite: dict[str, str] = field(default_factory=dict)
    not_finite_maps: dict[tuple[str, str], int] = field(default_factory=dict)
    pooling_names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_values(
        cls,
        network: str,
        poolings: Sequence[str],
        methods: Sequence[str],
        metrics: Sequence[str],
        values: ImageValues,
        seed: int,
        settings: dict[str, Any],
        unreadable: Mapping[str, str] | None = None,
        files: Mapping[int, str] | None = None,
        label_names: Sequence[str] | None = None,
        pooling_names: Mapping[str, str] | None = None,
    ) -> Report:
        """Averages over all pairs, with intervals from resamples of the images.

        Args:
            network, poolings, methods, metrics, settings, unreadable, files, label_names, pooling_names: As the
                attributes.
            values: Values of every image.
            seed: Seed of the resamples, at least 0.

        Raises:
            ValueError: If no method has an image without NaN in its map and in the scores.
        """
        lost = values.without_scores(poolings)
        not_finite = dict(sorted((values.not_measured(poolings, methods) | lost).items()))
        not_finite_maps = {(p, m): values.count(p, m, 'not_finite') for p in poolings for m in methods}
        values = values.without(lost)
        if not_finite and not any(values.is_measured(poolings, m).any() for m in methods):
            raise ValueError(f'No image has finite maps and scores: {next(iter(not_finite.values()))}.')
        bootstrap = Bootstrap(values, poolings, methods, metrics, seed)
        estimates = bootstrap.estimates()
        return cls(
            network=network,
            poolings=tuple(poolings),
            methods=tuple(methods),
            metrics=tuple(metrics),
            accuracy={p: estimates[p, 'accuracy'] for p in poolings},
            accuracy_name='mAP' if values.is_multilabel else 'accuracy',
            confidence={p: estimates[p, 'confidence'] for p in poolings},
            figures={(p, m, k): estimates[p, m, k] for m in methods for p in poolings for k in metrics},
            differences=bootstrap.differences(),
            num_images=len(values.images['image']),
            settings=settings,
            values=values,
            resampled=bootstrap,
            unreadable=dict(unreadable or {}),
            files=None if files is None else dict(files),
            label_names=None if label_names is None else list(label_names),
            not_finite={(files or {}).get(index, f'image {index}'): reason for index, reason in not_finite.items()},
            not_finite_maps={key: count for key, count in not_finite_maps.items() if count},
            pooling_names=dict(pooling_names or {}),
        )

    def num_maps(self, method: str, other: str | None = None) -> int:
        """Number of maps in the figures of a method: those without NaN under every pooling. With another method, those
        that both have, which `compare` counts."""
        measured = [self.values.is_measured(self.poolings, name) for name in (method, other or method)]
        return int(np.logical_and(*measured).sum())

    @property
    def constant_maps(self) -> dict[tuple[str, str], int]:
        """Number of maps that say nothing, constant or zero, by (pooling, method)."""
        counts = {(p, m): self.values.count(p, m, 'constant') for m in self.methods for p in self.poolings}
        return {key: count for key, count in counts.items() if count}

    def pooling_name(self, pooling: str) -> str:
        """The name of a pooling in tables and pictures."""
        return self.pooling_names.get(pooling, pooling.upper())

    @property
    def difference_name(self) -> str:
        """The name of the differences, `'CA - GAP'`."""
        return f'{self.pooling_name("ca")} - {self.pooling_name("gap")}'

    @property
    def curves(self) -> dict[tuple[str, str, str], np.ndarray]:
        """By (pooling, method, `'insertion'` or `'deletion'`): (R, n + 1) curves, where they were kept."""
        names = {
            (p, m, k): f'{p}/{m}/{METRICS[k].curve}' for p in self.poolings for k in self.metrics for m in self.methods
        }
        return {key: self.values.pairs[name] for key, name in names.items() if name in self.values.pairs}

    def __getitem__(self, key: tuple[str, str, str]) -> Estimate:
        if key not in self.figures:
            raise KeyError(f'there is no value {key!r}; {self._contents}')
        return self.figures[key]

    @property
    def _contents(self) -> str:
        return '; '.join(
            f'{kind} {", ".join(map(repr, names))}'
            for kind, names in (('poolings:', self.poolings), ('methods:', self.methods), ('metrics:', self.metrics))
        )

    @property
    def num_boxed(self) -> int | None:
        """Number of pairs with a box of the class under every pooling, or None where no metric needs boxes."""
        needs_boxes = any('boxes' in METRICS[k].needs for k in self.metrics)
        return int(self.values.has_box(self.poolings).sum()) if needs_boxes else None

    def difference(self, method: str, metric: str) -> Estimate:
        """CA - GAP of a metric, paired by image, with its own interval.

        Raises:
            KeyError: If the evaluation did not have both poolings, the method or the metric.
        """
        if (method, metric) not in self.differences:
            need = '' if self.differences else ', which needs both poolings'
            raise KeyError(f'there is no difference {(method, metric)!r}{need}; {self._contents}')
        return self.differences[method, metric]

    def verdict(self, method: str, metric: str) -> str:
        """`'better'`, `'worse'` or `'no difference seen'`: CA against GAP. The interval of a difference excludes 0."""
        return tables.verdict(self.difference(method, metric), METRICS[metric].higher_is_better)

    def summary(self) -> str:
        """One line a method with the verdict of every metric, or nothing for a report of one pooling."""
        if not self.differences:
            return ''
        return '\n'.join(
            f'CA against {self.pooling_name("gap")}, {method_title(m)}: '
            + ', '.join(f'{METRICS[k].symbol} {self.verdict(m, k)}' for k in self.metrics)
            for m in self.methods
        )

    def compare(self, method: str, other: str) -> dict[tuple[str, str], Estimate]:
        """A method minus another one, paired by image, with its own interval: by (pooling, metric).

        Images count for which both methods have a map without NaN.

        Raises:
            KeyError: If the evaluation did not have one of the methods.
        """
        for name in (method, other):
            if name not in self.methods:
                raise KeyError(f'there is no method {name!r}; {self._contents}')
        return {
            (p, k): self.resampled.paired((p, method, k), (p, other, k)) for p in self.poolings for k in self.metrics
        }

    def best(self, pooling: str, metric: str) -> str | None:
        """The method with the best value, or None where its paired difference from the second includes 0."""
        sign = 1 if METRICS[metric].higher_is_better else -1
        ranked = sorted(
            self.methods, key=lambda m: -sign * np.nan_to_num(self[pooling, m, metric].value, nan=-np.inf * sign)
        )
        if len(ranked) < 2:
            return None
        first, second = ranked[:2]
        difference = self.resampled.paired((pooling, first, metric), (pooling, second, metric))
        return first if tables.verdict(difference, METRICS[metric].higher_is_better) == 'better' else None

    def has_same_values(self, pooling: str, method: str, other: str) -> bool:
        """Whether two methods have the same values on every image, up to rounding, and their maps say something.

        Where all values are 0 or 100, such as hits, different maps often agree: then nothing is said. Nor is it where a
        difference counts among the images, as of a network whose probabilities hardly change.
        """
        pairs = [
            [self.values.pairs[f'{pooling}/{name}/{k}'].astype(float) for name in (method, other)] for k in self.metrics
        ]
        spread = any(len(np.unique(one[(one > 1) & (one != 100)])) > 1 for one, _ in pairs)
        return spread and all(_are_equal(one, two) for one, two in pairs)

    def __str__(self) -> str:
        return tables.to_text(self)

    def to_markdown(self) -> str:
        """The table of methods in Markdown, the best of a column bold."""
        return tables.to_markdown(self)

    def to_latex(self, intervals: bool = True) -> str:
        """The table of methods in LaTeX with booktabs, the best of a column bold.

        Args:
            intervals: Print the intervals, small, behind the values.
        """
        return tables.to_latex(self, intervals)

    def to_dataframe(self) -> Any:
        """A pandas DataFrame: a row a method and pooling, columns (metric, `value`, `low` or `high`), in percent.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        return tables.to_dataframe(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: everything but the values of single images."""
        return {
            'network': self.network,
            'num_images': self.num_images,
            self.accuracy_name: {p: _plain(estimate.value) for p, estimate in self.accuracy.items()},
            'confidence': {p: estimate.value for p, estimate in self.confidence.items()},
            'titles': {
                'methods': {name: method_title(name) for name in self.methods},
                'metrics': {name: METRICS[name].title for name in self.metrics},
                'poolings': {name: self.pooling_name(name) for name in self.poolings},
            },
            'rows': self._table_rows(),
            'num_boxed': self.num_boxed,
            'unreadable': self.unreadable,
            'not_finite': self.not_finite,
            'settings': self.settings,
        }

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `table.csv`, `evaluation.json` and `images.csv`, each whole or not at all.

        `values.npz` has every value in full; `load` reads it.
        """
        folder = make_folder(folder)
        with write_whole(folder / 'images.csv') as file:
            self.values.write_csv(file, self.files, self.label_names)
        with write_whole(folder / 'values.npz', 'wb') as file:
            np.savez_compressed(file, **self._arrays())  # type: ignore[arg-type]
        with write_whole(folder / 'table.csv') as file:
            rows = self._table_rows()
            writer = csv.DictWriter(file, rows[0], lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
        with write_whole(folder / 'evaluation.json') as file:
            json.dump(self.to_dict(), file, indent=2)
            file.write('\n')

    def _arrays(self) -> dict[str, np.ndarray]:
        """The values of every image by name, and the names of files and classes."""
        arrays = {f'images/{name}': array for name, array in self.values.images.items()}
        arrays |= {f'pairs/{name}': array for name, array in self.values.pairs.items()}
        if self.files is not None:
            arrays['files'] = np.array([self.files.get(i, '') for i in self.values.images['image'].tolist()], dtype=str)
        if self.label_names is not None:
            arrays['label_names'] = np.array(self.label_names, dtype=str)
        return arrays

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Report:
        """The report of a folder of a finished evaluation, without its model.

        Raises:
            ValueError: If the folder holds none.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(
                f'{folder} is a file: name a folder.' if folder.exists() else f'There is no folder {folder}.'
            )
        try:
            facts = json.loads((folder / 'evaluation.json').read_text(encoding='utf-8'))
            with np.load(folder / 'values.npz', allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            titles = facts['titles']
            parts = [
                {name.removeprefix(kind): array for name, array in arrays.items() if name.startswith(kind)}
                for kind in ('images/', 'pairs/')
            ]
            values = ImageValues(*parts)
            files = arrays.get('files')
            report = cls.from_values(
                facts['network'],
                list(titles['poolings']),
                list(titles['methods']),
                list(titles['metrics']),
                values,
                facts['settings']['seed'],
                facts['settings'],
                facts['unreadable'],
                None if files is None else dict(zip(values.images['image'].tolist(), files.tolist(), strict=True)),
                arrays['label_names'].tolist() if 'label_names' in arrays else None,
                titles['poolings'],
            )
        except FileNotFoundError as error:
            missing = f'{folder} holds no finished evaluation: {Path(str(error.filename)).name} is missing'
            begun = (
                ', and the same castream evaluate resumes the one that was begun'
                if (folder / SETTINGS).is_file()
                else ''
            )
            raise ValueError(f'{missing}, which castream evaluate writes at its end{begun}.') from None
        except (OSError, KeyError, TypeError, AttributeError, ValueError, EOFError, BadZipFile) as error:
            raise ValueError(
                f'{folder} holds no evaluation that can be read: evaluation.json or values.npz is damaged '
                f'({type(error).__name__}: {error}).'
            ) from None
        counts = {(row['pooling'], row['method']): row.get('nan_maps', 0) for row in facts['rows']}
        not_finite_maps = {key: count for key, count in counts.items() if count}
        return replace(report, not_finite=facts['not_finite'], not_finite_maps=not_finite_maps)

    def _table_rows(self) -> list[dict[str, Any]]:
        rows = [
            self._table_row(
                m,
                p,
                {
                    self.accuracy_name: self.accuracy[p],
                    **{k: self[p, m, k] for k in self.metrics},
                    'confidence': self.confidence[p],
                },
            )
            for m in self.methods
            for p in self.poolings
        ]
        if self.differences:
            rows += [
                self._table_row(
                    m,
                    DIFFERENCE,
                    {
                        self.accuracy_name: self.differences['accuracy',],
                        **{k: self.difference(m, k) for k in self.metrics},
                        'confidence': self.differences['confidence',],
                    },
                )
                for m in self.methods
            ]
        return rows

    def _table_row(self, method: str, pooling: str, estimates: Mapping[str, Estimate]) -> dict[str, Any]:
        row: dict[str, Any] = {'network': self.network, 'method': method, 'pooling': pooling}
        for name, (value, low, high) in estimates.items():
            row |= {name: _plain(value), f'{name}_low': _plain(low), f'{name}_high': _plain(high)}
        row['maps'] = self.num_maps(method)
        if pooling != DIFFERENCE:
            row['constant_maps'] = self.values.count(pooling, method, 'constant')
            row['nan_maps'] = self.not_finite_maps.get((pooling, method), 0)
        return row


def _are_equal(one: np.ndarray, two: np.ndarray) -> bool:
    """Whether values are the same up to rounding, which is far below the differences between images."""
    if not np.allclose(one, two, rtol=1e-3, atol=2e-3, equal_nan=True):
        return False
    known = one[~np.isnan(one)]
    return not known.size or bool(np.nanmax(np.abs(one - two)) <= max(2e-3, np.ptp(known) / 20))


def _plain(value: float) -> float | None:
    """The value for files: JSON has no NaN."""
    return None if math.isnan(value) else value
