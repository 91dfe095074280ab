"""The committed results: facts, the values of every image, and paired differences with bootstrap intervals."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from timm_castream.evaluation.bootstrap import Estimate
from timm_castream.evaluation.tables import verdict
from timm_castream.metrics import METRICS

from .pieces import read_values

RESAMPLES = 2000
LEVELS = (0.025, 0.975)
STREAM = 'gap_start'  # the stream of the main table

Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Difference:
    """The mean of differences that are paired by image, over several seeds of the stream.

    Attributes:
        seeds: The mean of each seed and its 95 % interval.
        higher_is_better: Direction of the metric; None where neither is better.
    """

    seeds: tuple[Estimate, ...]
    higher_is_better: bool | None = True

    @property
    def total(self) -> Estimate:
        """Mean over the seeds, with the lowest and the highest end of their intervals."""
        values, lows, highs = zip(*self.seeds, strict=True)
        return Estimate(float(np.mean(values)), min(lows), max(highs))

    @property
    def verdict(self) -> str:
        """'better' or 'worse' where the interval of every seed is on one side of 0, 'higher' or 'lower' where the
        metric has no direction; else 'no difference seen'."""
        word = verdict(self.total, self.higher_is_better is not False)
        return {'better': 'higher', 'worse': 'lower'}.get(word, word) if self.higher_is_better is None else word


def compare(runs: Iterable[np.ndarray], higher_is_better: bool | None = True) -> Difference:
    """The paired differences of each seed, (N,) image by image, with intervals. Images with NaN are left out."""
    defined = [differences[~np.isnan(differences)] for differences in runs]
    return Difference(
        tuple(Estimate(float(d.mean()), *np.quantile(resamples(len(d)) @ d, LEVELS).tolist()) for d in defined),
        higher_is_better,
    )


@lru_cache(maxsize=8)
def resamples(num_images: int) -> np.ndarray:
    """(S, N) how often each image is drawn in each of S resamples, divided by N. The same for every value."""
    rng = np.random.default_rng(0)
    return rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=RESAMPLES) / num_images


@dataclass(frozen=True)
class Table:
    """The finished pieces of one table.

    Args:
        gap: GAP's values, or None.
        streams: The streams' values, by kind and seed.
    """

    gap: Values | None
    streams: dict[str, dict[int, Values]]

    @property
    def num_images(self) -> int:
        runs = [self.gap or {'image': []}, *(run for seeds in self.streams.values() for run in seeds.values())]
        return max(len(run['image']) for run in runs)

    def size(self, stream: str = STREAM) -> str:
        """`2000 images, 5 seeds`."""
        seeds = len(self.streams.get(stream, {}))
        return f'{self.num_images} images, {seeds} seed{"s"[: seeds != 1]}'

    def mean(self, pooling: str, column: str) -> str:
        """Mean of a column under a pooling, over the seeds under CA; empty where it has not run."""
        runs = [self.gap or {}] if pooling == 'gap' else self.streams.get(STREAM, {}).values()
        means = [float(np.nanmean(run[column])) for run in runs if column in run]
        return f'{sum(means) / len(means):.1f}' if means else ''

    def changes(self, column: str, stream: str = STREAM) -> Values:
        """CA - GAP of a column by seed, (N,) paired by image, for the seeds that have run."""
        seeds = self.streams.get(stream, {}) if self.gap and column in self.gap else {}
        return {seed: values[column] - self.gap[column] for seed, values in seeds.items() if column in values}

    def difference(self, column: str, stream: str = STREAM) -> Difference | None:
        """CA - GAP of a column, `accuracy`, `prob` or `METHOD/METRIC`, or None where one of them has not run."""
        runs = self.changes(column, stream)
        return compare(runs.values(), direction(column)) if runs else None

    def excess(self, baselines: Table, baseline: str, metric: str, stream: str = STREAM) -> Difference | None:
        """(CA - GAP of Grad-CAM) - (CA - GAP of a baseline map), paired by image, or None where a part has not run.

        Args:
            baselines: A table with the baselines, on the first images of this one.
            baseline: `random` or `centre`.
            metric: AD, AG or AI.
            stream: Kind of stream.
        """
        ours, theirs = self.changes(f'grad_cam/{metric}', stream), baselines.changes(f'{baseline}/{metric}', stream)
        runs = [ours[seed][: len(theirs[seed])] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
        return compare(runs, direction(metric)) if runs else None

    def against(self, metric: str, other: str, pooling: str) -> Difference:
        """A metric of the attention minus that of another method under a pooling, paired by image."""
        runs = self.streams[STREAM].values()
        return compare(
            run[f'attention/{metric}'] - (self.gap if pooling == 'gap' else run)[f'{other}/{metric}'] for run in runs
        )


def direction(column: str) -> bool | None:
    """Whether higher values of a column are better; None where neither is."""
    metric = column.rpartition('/')[2]
    return None if metric == 'prob' else metric not in METRICS or METRICS[metric].higher_is_better


class Results:
    """The folder of results.

    Args:
        folder: The folder that the program filled.
        settings: The settings of the experiments.

    Attributes:
        facts: Of every finished piece, by name.
        streams: The facts of every trained stream, by name.
        choices: The settings tried and taken, by kind of stream.
        single: `classifier`, the settings tried for the classifier under GAP, and `strip`, the photographs.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        patterns = ('pieces/*.json', 'streams/*.json', 'choices/*.json', '*.json')
        self.facts, self.streams, self.choices, self.single = (
            {path.stem: json.loads(path.read_text(encoding='utf-8')) for path in sorted(folder.glob(pattern))}
            for pattern in patterns
        )

    @cached_property
    def tables(self) -> defaultdict[str, Table]:
        """The finished pieces of every table."""
        tables = {name: self._table(name, plan) for name, plan in self.settings['tables'].items()}
        return defaultdict(lambda: Table(None, {}), tables)

    def _table(self, name: str, plan: dict[str, Any]) -> Table:
        def values(piece: str) -> Values:
            found = read_values(self.folder / 'pieces' / f'{piece}.csv.gz')
            return {column: (100 if column == 'prob' else 1) * array for column, array in found.items()}

        source = f'{plan.get("gap", name)}-gap'
        gap = None
        if source in self.facts:  # every table has the first images of the validation set
            gap = {column: array[: plan['images']] for column, array in values(source).items()}
        streams: dict[str, dict[int, Values]] = {}
        for facts in self.facts.values():
            if facts['table'] == name and facts['stream'] in plan['streams']:
                seed = facts['seed']
                streams.setdefault(facts['stream'], {})[seed] = values(f'{name}-{facts["stream"]}-{seed}')
        return Table(gap, streams)

    def trained(self, kind: str, per_class: int | None = None) -> list[dict[str, Any]]:
        """Facts of the streams of `growth` that were trained on so many images of every class. None: on all."""
        count = None if per_class == self.settings['train_per_class'] else per_class
        wanted = {'kind': kind, 'per_class': count, 'classes': None}
        seeds = self.settings['growth']['seeds']
        return [facts for facts in self.streams.values() if facts['seed'] in seeds and wanted.items() <= facts.items()]
