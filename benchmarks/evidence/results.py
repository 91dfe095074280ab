"""Reads the committed results: facts of pieces and streams, and paired differences of a table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from timm_castream.metrics import METRICS

from .pieces import read_values
from .setup import read_json
from .statistics import Difference, compare

Values = dict[str, np.ndarray]


class Results:
    """The folder of results.

    Args:
        folder: The folder that the program filled.
        settings: The settings of the full experiments.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = settings

    @cached_property
    def facts(self) -> dict[str, dict[str, Any]]:
        """The facts of every finished piece, by name."""
        return self._read('pieces/*.json')

    @cached_property
    def streams(self) -> dict[str, dict[str, Any]]:
        """The facts of every trained stream, by name."""
        return self._read('streams/*.json')

    @cached_property
    def choices(self) -> dict[str, dict[str, Any]]:
        """The settings tried and taken, by kind of stream."""
        return self._read('choices/*.json')

    @cached_property
    def classifier(self) -> dict[str, Any] | None:
        """The settings tried for the classifier under GAP."""
        return self._read('classifier.json').get('classifier')

    def strip(self) -> dict[str, Any] | None:
        """The facts of the strip of photographs."""
        return self._read('strip.json').get('strip')

    def _read(self, pattern: str) -> dict[str, dict[str, Any]]:
        return {path.stem: read_json(path) for path in sorted(self.folder.glob(pattern))}

    def values(self, name: str) -> Values:
        """The values of every image of a piece."""
        return read_values(self.folder / 'pieces' / f'{name}.csv.gz')

    def table(self, name: str) -> Table:
        """The finished pieces of a table."""
        plan = self.settings['tables'][name]
        source = f'{plan.get("gap", name)}-gap'
        # Every table has the first images of the validation set.
        gap = None
        if source in self.facts:
            gap = {column: values[: plan['images']] for column, values in self.values(source).items()}
        streams: dict[str, dict[int, Values]] = {}
        for stream in plan['streams']:
            seeds = sorted(f['seed'] for f in self.facts.values() if (f['table'], f['stream']) == (name, stream))
            if seeds:
                streams[stream] = {seed: self.values(f'{name}-{stream}-{seed}') for seed in seeds}
        return Table(name, plan, gap, streams)

    def seconds(self) -> float:
        """Seconds of training and evaluation behind all results; caching and settings tried are not in it."""
        return sum(facts['seconds'] for facts in (*self.facts.values(), *self.streams.values()))


@dataclass(frozen=True)
class Table:
    """The finished pieces of one table.

    Args:
        name: Its name in the settings.
        plan: Its settings.
        gap: GAP's values, or None.
        streams: The streams' values, by kind and seed.
    """

    name: str
    plan: dict[str, Any]
    gap: Values | None
    streams: dict[str, dict[int, Values]]

    @property
    def num_images(self) -> int:
        runs = [run for seeds in self.streams.values() for run in seeds.values()]
        runs += [] if self.gap is None else [self.gap]
        return max((len(run['image']) for run in runs), default=0)

    def difference(self, stream: str, column: str, gap_column: str | None = None) -> Difference | None:
        """CA - GAP of a column, paired by image, one interval a seed; None where one of them has not run.

        Args:
            stream: Kind of stream.
            column: `accuracy`, `prob`, or `METHOD/METRIC`.
            gap_column: Another column of GAP to compare with.
        """
        seeds = self.streams.get(stream)
        if self.gap is None or not seeds or (gap_column or column) not in self.gap:
            return None
        runs = [values for values in seeds.values() if column in values]
        if not runs:
            return None
        scale = 100 if column == 'prob' else 1
        metric = column.rpartition('/')[2]
        lower_is_better = None if metric == 'prob' else metric in METRICS and not METRICS[metric].higher_is_better
        count = min(len(self.gap['image']), *(len(values['image']) for values in runs))  # a table may be half rerun
        return compare(
            scale * self.gap[gap_column or column][:count],
            [scale * values[column][:count] for values in runs],
            lower_is_better,
        )
