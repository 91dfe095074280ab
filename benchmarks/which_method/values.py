"""The committed values of a network, read from benchmarks/which_method_results."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

BASELINES = ('random', 'centre')
REFERENCE = 'grad_cam'
SLOW = 20  # forwards of one map
REPEATS = 3  # calls that are timed
EQUAL = 0.002  # between maps of values in [0, 1] at the size of the image that are one
SAME_VALUES = 0.05  # percent: two methods, or two metrics, with no larger difference on any photograph are one

QUESTIONS = {
    'Masked image': ('average_drop', 'average_gain', 'average_increase'),
    'Top half': ('average_drop_top50', 'average_gain_top50', 'average_increase_top50'),
    'Insertion': ('insertion', 'insertion_share'),
    'Insertion into black': ('insertion_black',),
    'Insertion into the mean colour': ('insertion_mean',),
    'Deletion': ('deletion', 'deletion_share'),
    'Deletion to black': ('deletion_black',),
    'Deletion to the blurred image': ('deletion_blur',),
    'ROAD, most relevant first': ('road_morf',),
    'ROAD, least relevant first': ('road_lerf',),
}
"""Metrics that ask the network about changed images. Those of one question share images or differ in a detail, so that
they agree by construction: the first speaks for the question wherever something is counted."""
MAP_CHECKS = ('complexity', 'coherency', 'adcc', 'randomisation', 'randomisation_ssim', 'stability')
"""Metrics of the map alone, or with such a part: a map that is the same for all images is coherent and stable."""

BOXES = ('pointing_game', 'energy_pointing_game', 'localization_error')
"""Metrics of boxes with a value of each photograph. MaxBoxAccV2 has none: it is the best of thresholds for a data set."""

CLASS_FREE = (
    *(
        'attention',
        'captum:LayerActivation',
        'grad-cam:EigenCAM',
        'grad-cam:KPCA_CAM',
        'grad-cam:FEM',
        'grad-cam:RandomCAM',
    ),
    *BASELINES,
)
"""Methods that do not read the class, by their formula."""


class Result:
    """The values of one network.

    Attributes:
        facts: What is known about the network, the photographs and the run.
        columns: {'pooling/method/metric': (N,) values of the photographs in percent, NaN where there is none}.
        images: Position of each photograph in the order that is drawn.
        poolings: Those that were measured.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.facts = json.loads((folder / f'{name}.json').read_text(encoding='utf-8'))
        text = gzip.decompress((folder / f'{name}.csv.gz').read_bytes()).decode()
        rows = list(csv.DictReader(io.StringIO(text)))
        self.columns = {key: np.array([float(row[key] or 'nan') for row in rows]) for key in rows[0] if key != 'image'}
        self.poolings = [p for p in self.facts['poolings'] if self.methods(p)]
        self.images = [int(row['image']) for row in rows]
        self.num_images = len(rows)
        self._same_methods: dict[str, dict[str, str]] = {}

    @property
    def heading(self) -> str:
        return self.facts['heading']

    def place(self, pooling: str) -> str:
        """The network, and the pooling if it has two."""
        return self.heading + (f', {pooling.upper()}' if len(self.poolings) > 1 else '')

    def methods(self, pooling: str) -> list[str]:
        """Methods with values under a pooling."""
        return [m for m in self.facts['methods'] if any(key.startswith(f'{pooling}/{m}/') for key in self.columns)]

    def is_slow(self, method: str) -> bool:
        """Whether the method takes many forwards, and was measured on fewer photographs for this reason."""
        return method in self.facts['slow']

    def values(self, pooling: str, method: str, metric: str) -> np.ndarray:
        """(N,) values of the photographs in percent, NaN where there is none."""
        return self.columns.get(f'{pooling}/{method}/{metric}', np.full(self.num_images, np.nan))

    def count(self, pooling: str, method: str, metric: str) -> int:
        """Photographs with a value."""
        return int((~np.isnan(self.values(pooling, method, metric))).sum())

    def photographs(self, pooling: str, methods: Sequence[str], metric: str) -> np.ndarray:
        """(N,) bool: the photographs on which one of the methods has a value."""
        return ~np.isnan([self.values(pooling, m, metric) for m in methods]).all(0)

    def sign(self, metric: str) -> int:
        """1 if higher is better, else -1."""
        return 1 if self.facts['metrics'][metric]['higher'] else -1

    def gain(self, pooling: str, method: str, metric: str, other: str = REFERENCE) -> np.ndarray:
        """(N,) differences to another method, positive where the method is better."""
        return self.sign(metric) * (self.values(pooling, method, metric) - self.values(pooling, other, metric))

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics measured. One that has the values of an earlier one everywhere is left out."""
        return [name for name in self.facts['metrics'] if name not in self.same_metrics]

    @cached_property
    def same_metrics(self) -> dict[str, str]:
        """{metric: the earlier one with the same values}."""
        found: dict[str, str] = {}
        names = list(self.facts['metrics'])
        for position, name in enumerate(names):
            for other in names[:position]:
                if other not in found and self._are_one(name, other):
                    found[name] = other
                    break
        return found

    def _are_one(self, name: str, other: str) -> bool:
        pairs = [(self.values(p, m, name), self.values(p, m, other)) for p in self.poolings for m in self.methods(p)]
        both = [(a, b) for a, b in pairs if not np.isnan(a - b).all()]
        return bool(both) and all(_differ_by_less(a, b) for a, b in both)

    def same_methods(self, pooling: str) -> dict[str, str]:
        """{method: an earlier one, as fast, with the same values of all metrics on all photographs that both have}."""
        if pooling not in self._same_methods:
            found: dict[str, str] = {}
            methods = [m for m in self.methods(pooling) if m not in BASELINES]
            for position, method in enumerate(methods):
                for other in methods[:position]:
                    if self.is_slow(method) != self.is_slow(other):  # one has fewer photographs
                        continue
                    pairs = [(self.values(pooling, method, n), self.values(pooling, other, n)) for n in self.metrics]
                    both = [(a, b) for a, b in pairs if not np.isnan(a - b).all()]
                    if other not in found and both and all(_differ_by_less(a, b) for a, b in both):
                        found[method] = other
                        break
            self._same_methods[pooling] = found
        return self._same_methods[pooling]

    def own_maps(self, pooling: str, slow: bool | None = None) -> list[str]:
        """Methods whose map is no other method's, baselines among them; the slow ones, the others, or both."""
        same = self.same_methods(pooling)
        return [m for m in self.methods(pooling) if m not in same and slow in (None, self.is_slow(m))]

    def names_of_one_map(self, pooling: str) -> dict[str, list[str]]:
        """{method: other names of its map under a pooling}."""
        groups: dict[str, list[str]] = {}
        same = self.same_methods(pooling)
        for name, other in {**self.facts['equal'], **same}.items():
            groups.setdefault(same.get(other, other), []).append(name)
        return {name: sorted(others) for name, others in groups.items()}

    def metrics_of(self, pooling: str, method: str = REFERENCE) -> list[str]:
        """The metrics that a method has values of, in the order of the page."""
        order = [name for names in QUESTIONS.values() for name in names] + [*MAP_CHECKS, *BOXES]
        return [name for name in order if name in self.metrics and self.count(pooling, method, name)]

    def asked(self, pooling: str) -> list[str]:
        """The first metric of each question."""
        measured = self.metrics_of(pooling)
        return [names[0] for names in QUESTIONS.values() if names[0] in measured]


def _differ_by_less(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.nanmax(np.abs(one - other)) < SAME_VALUES)
