"""Writes docs/which-method.md from the committed values of which_method.py. Every number in it is computed here."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from timm_castream.metrics.table import METRICS

RESULTS = Path(__file__).with_name('which_method_results')
BASELINES = ('random', 'centre')
REFERENCE = 'grad_cam'
RESAMPLES = 10_000
SEED = 0
SAME_VALUES = 0.05  # percent: two methods, or two metrics, with no larger difference on any photograph are one

# Tables of metrics, each with a title.
TABLES = {
    'Masks and curves': (
        *('average_drop', 'average_gain', 'average_increase'),
        *('average_drop_top50', 'average_gain_top50', 'average_increase_top50', 'complexity'),
        *('insertion', 'deletion', 'insertion_share', 'deletion_share'),
        *('pointing_game', 'energy_pointing_game', 'localization_error'),
    ),
    'More metrics': (
        *('insertion_black', 'insertion_mean', 'deletion_black', 'deletion_blur', 'road_morf', 'road_lerf'),
        *('coherency', 'adcc', 'randomisation', 'randomisation_ssim', 'stability'),
    ),
}
DESCRIPTIVE = ('complexity',)
"""Metrics that say nothing about the network: a map of one pixel has the best value."""
PLAIN = {'grad_cam': 'Grad-CAM', 'random': 'Random', 'centre': 'Centre'}


class Result:
    """Committed values of one network."""

    def __init__(self, name: str) -> None:
        self.facts = json.loads((RESULTS / f'{name}.json').read_text(encoding='utf-8'))
        text = gzip.decompress((RESULTS / f'{name}.csv.gz').read_bytes()).decode()
        rows = list(csv.DictReader(io.StringIO(text)))
        self.columns = {key: np.array([float(row[key] or 'nan') for row in rows]) for key in rows[0] if key != 'image'}
        self.poolings = [p for p in self.facts['poolings'] if any(key.startswith(f'{p}/') for key in self.columns)]
        self.num_images = len(rows)
        self._same_methods: dict[str, dict[str, str]] = {}

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics measured. One that has the values of an earlier one everywhere is left out."""
        kept: list[str] = []
        for name in self.facts['metrics']:
            if not any(self._same(name, other) for other in kept):
                kept.append(name)
        return kept

    @cached_property
    def same_metrics(self) -> dict[str, str]:
        """{metric: the earlier one with the same values}."""
        left = [name for name in self.facts['metrics'] if name not in self.metrics]
        return {name: next(other for other in self.metrics if self._same(name, other)) for name in left}

    def _same(self, name: str, other: str) -> bool:
        pairs = [(f'{p}/{m}/{name}', f'{p}/{m}/{other}') for p in self.poolings for m in self.methods(p)]
        both = [(self.columns[a], self.columns[b]) for a, b in pairs if a in self.columns and b in self.columns]
        return bool(both) and all(_differ_by_less(a, b) for a, b in both)

    def methods(self, pooling: str) -> list[str]:
        return [m for m in self.facts['methods'] if any(key.startswith(f'{pooling}/{m}/') for key in self.columns)]

    def same_methods(self, pooling: str) -> dict[str, str]:
        """{method: an earlier one with the same values of all metrics on all photographs}."""
        if pooling not in self._same_methods:
            self._same_methods[pooling] = self._find_same_methods(pooling)
        return self._same_methods[pooling]

    def _find_same_methods(self, pooling: str) -> dict[str, str]:
        found: dict[str, str] = {}
        methods = self.methods(pooling)
        for position, method in enumerate(methods):
            for other in methods[:position]:
                if other in found or method in BASELINES:
                    continue
                both = [
                    (self.values(pooling, method, name), self.values(pooling, other, name)) for name in self.metrics
                ]
                both = [(a, b) for a, b in both if not np.isnan(a - b).all()]
                if both and all(_differ_by_less(a, b) for a, b in both):
                    found[method] = other
                    break
        return found

    def values(self, pooling: str, method: str, metric: str) -> np.ndarray:
        """(N,) values of the photographs in percent, NaN where there is none."""
        return self.columns.get(f'{pooling}/{method}/{metric}', np.full(self.num_images, np.nan))

    def count(self, pooling: str, method: str, metric: str) -> int:
        return int((~np.isnan(self.values(pooling, method, metric))).sum())

    def mean(self, pooling: str, method: str, metric: str) -> float:
        """Over the photographs of the method, NaN where there are none."""
        values = self.values(pooling, method, metric)
        return float(np.nanmean(values)) if not np.isnan(values).all() else float('nan')

    def blank(self, pooling: str, method: str) -> float:
        """The share of the maps that say nothing, or, where that was not counted, that are 0 in the box."""
        if f'{pooling}/{method}/constant' in self.columns:
            return self.mean(pooling, method, 'constant')
        energy = self.values(pooling, method, 'energy_pointing_game')
        return float((energy[~np.isnan(energy)] == 0).mean()) if not np.isnan(energy).all() else float('nan')

    def gain(self, pooling: str, method: str, metric: str, other: str = REFERENCE) -> np.ndarray:
        """(N,) differences to another method, positive where the method is better."""
        sign = 1 if self.facts['metrics'][metric]['higher'] else -1
        return sign * (self.values(pooling, method, metric) - self.values(pooling, other, metric))

    def interval(self, pooling: str, method: str, metric: str, other: str = REFERENCE) -> tuple[float, float]:
        """The 95 % interval of the mean of `gain`."""
        pairs = self.gain(pooling, method, metric, other)
        pairs = pairs[~np.isnan(pairs)]
        low, high = np.percentile(_resamples(len(pairs)) @ pairs, (2.5, 97.5))
        return float(low), float(high)

    @cached_property
    def verdicts(self) -> dict[tuple[str, str, str], int]:
        """By pooling, method and metric: 1 better than Grad-CAM, -1 worse, 0 not told apart, by paired intervals.

        2 and -2 where the difference holds for all comparisons of the network at once: its mean over its standard error
        exceeds the 95 % quantile of the largest such ratio under a Gaussian multiplier bootstrap over the photographs.
        """
        keys, columns, found = [], [], {}
        for p in self.poolings:
            same = self.same_methods(p)
            for method in self.methods(p):
                for metric in self.metrics:
                    pairs = self.gain(p, method, metric)
                    if method == REFERENCE or method in same or metric in DESCRIPTIVE or np.isnan(pairs).all():
                        continue
                    low, high = self.interval(p, method, metric)
                    keys.append((p, method, metric))
                    columns.append(pairs)
                    found[keys[-1]] = int(low > 0) - int(high < 0)
        pairs = np.stack(columns, 1)
        count = (~np.isnan(pairs)).sum(0)
        means = np.nanmean(pairs, 0)
        centred = np.nan_to_num(pairs - means)
        error = np.sqrt((centred**2).sum(0) / (count - 1)) / np.sqrt(count)
        known = error > 0
        weights = np.random.default_rng(SEED).standard_normal((RESAMPLES, len(pairs)))
        ratios = np.abs(weights @ centred[:, known]) / (count[known] * error[known])
        self.bound = float(np.percentile(ratios.max(1), 95))
        for key, mean, spread in zip(keys, means, error, strict=True):
            if found[key] and spread > 0 and abs(mean) / spread > self.bound:
                found[key] *= 2
        return found

    def ranks(self, pooling: str, metric: str, methods: Sequence[str], picks: np.ndarray | None = None) -> np.ndarray:
        """Means of the methods over the photographs that all of them have, higher better."""
        sign = 1 if self.facts['metrics'][metric]['higher'] else -1
        values = np.stack([self.values(pooling, method, metric) for method in methods])
        values = values[:, ~np.isnan(values).any(0)]
        return sign * (values if picks is None else values[:, picks % values.shape[1]]).mean(1)

    def ranked_methods(self, pooling: str) -> list[str]:
        """Methods that all metrics of the pooling have measured, each map once."""
        metrics, same = self.metrics_of(pooling), self.same_methods(pooling)
        return [
            m
            for m in self.methods(pooling)
            if m not in same and all(self.count(pooling, m, metric) for metric in metrics)
        ]

    def metrics_of(self, pooling: str) -> list[str]:
        return [name for name in self.metrics if self.count(pooling, REFERENCE, name)]

    def tau(self, pooling: str, one: str, other: str) -> tuple[float, float, float]:
        """Kendall's tau between the orders of the methods, and its 95 % interval over resampled photographs."""
        methods = self.ranked_methods(pooling)
        middle = kendalltau(self.ranks(pooling, one, methods), self.ranks(pooling, other, methods)).statistic
        rng = np.random.default_rng(SEED)
        taus = []
        for _ in range(200):
            picks = rng.integers(2**31, size=self.num_images)
            taus.append(
                kendalltau(
                    self.ranks(pooling, one, methods, picks), self.ranks(pooling, other, methods, picks)
                ).statistic
            )
        low, high = np.nanpercentile(taus, (2.5, 97.5))
        return float(middle), float(low), float(high)


@cache
def _resamples(count: int) -> np.ndarray:
    """(RESAMPLES, count) share of each photograph in each resample."""
    picks = np.random.default_rng(SEED).integers(count, size=(RESAMPLES, count))
    return np.stack([np.bincount(row, minlength=count) for row in picks]) / count


def _differ_by_less(one: np.ndarray, other: np.ndarray) -> bool:
    difference = np.abs(one - other)
    return not np.isnan(difference).all() and bool(np.nanmax(difference) < SAME_VALUES)


def write(results: Sequence[Result], path: Path) -> None:
    """Writes the page."""
    parts = [
        '# Which method?',
        '',
        '<!-- Written by benchmarks/which_method.py page from benchmarks/which_method_results. Do not edit. -->',
        '',
        *_answer(results),
        '',
        *_measured(results),
        '',
        *_reading(),
    ]
    for result in results:
        for pooling in result.poolings:
            parts += ['', *_section(result, pooling)]
    parts += ['', *_agreement(results), '', *_equal(results), '', *_limits(results)]
    path.write_text('\n'.join(parts).rstrip() + '\n', encoding='utf-8')


def _answer(results: Sequence[Result]) -> Iterable[str]:
    first = results[0]
    pooling = first.poolings[0]
    names = _names_of_one_map(first, pooling).get(REFERENCE, [])
    alike = sorted(m for m in _own_maps(first, pooling) if not any(_verdicts(first, pooling, m)))
    better = [
        f'{_listed(found) if len(found) < 4 else f"{len(found)} methods"} on {_place(result, p)}'
        for result in results
        for p in result.poolings
        if (found := _better_at_once(result, p))
    ]
    winners = _never_worse(results)
    tests = {_place(result, p): _against_baselines(result, p) for result in results for p in result.poolings}
    weak = [place for place, (better_in, _, count) in tests.items() if 2 * better_in < count]
    all_cells = sum(len(r.verdicts) for r in results)
    apart = sum(v != 0 for r in results for v in r.verdicts.values())
    sure = sum(abs(v) == 2 for r in results for v in r.verdicts.values())
    worse = sum(v == -2 for r in results for v in r.verdicts.values())
    beaten = [m for m in _own_maps(first, pooling) if _loses(first, pooling, m)]
    parts = [
        '**Take Grad-CAM, measure it against `random` and `centre` on your network, and quote no small difference to another '
        'method.** It costs one forward and one backward through the last layers.'
        + (
            f' On {" and ".join(weak)} it is no better than these baselines, or not told apart from them, in most metrics.'
            if weak
            else ''
        ),
        (
            f'{_listed(winners)} {"is" if len(winners) == 1 else "are"} better than it in some metric and worse in none, on '
            'every network below.'
            if winners
            else 'No method that all networks below measured is better than it in some metric and worse in none.'
        ),
        (
            f'On single networks some are, by intervals that hold for all comparisons of the network at once: '
            f'{"; ".join(better)}.'
            if better
            else 'On no single network is one, by intervals that hold for all comparisons of the network at once.'
        ),
        f'No metric can tell {len(names)} other names apart from it on {_place(first, pooling)}, because their map is the '
        f'same: {_listed(names)}.',
        (
            f'No metric tells {_listed(alike)} apart from it there either, whose map is another one.'
            if alike
            else 'Every other map is told apart from it by some metric, if only by an interval that holds alone.'
        ),
        f'Of {all_cells} comparisons with Grad-CAM {apart} have a paired 95 % interval that excludes 0, and {sure} hold '
        f'for all comparisons of a network at once: {worse} times the other method is worse, {sure - worse} times better.',
        (
            f'A Gaussian in the middle of the image, which knows neither the image nor the network, is better than '
            f'{_listed(beaten)} in at least half of the metrics on {_place(first, pooling)}.'
            if beaten
            else ''
        ),
        'Grad-CAM is better than both baselines in '
        + ', '.join(f'{better} of {count} metrics on {place}' for place, (better, _, count) in tests.items())
        + '; worse than one of them in '
        + (', '.join(f'{lost} on {place}' for place, (_, lost, _) in tests.items() if lost) or 'none')
        + '.',
        'Metrics disagree: the choice of one moves methods up and down, see [how far they agree]'
        '(#how-far-metrics-agree).',
    ]
    yield ' '.join(filter(None, [*parts[:5], parts[-1]]))
    yield ''
    yield ' '.join(filter(None, parts[5:-1]))


def _against_baselines(result: Result, pooling: str) -> tuple[int, int, int]:
    """In how many metrics Grad-CAM is better than both baselines, worse than one of them, and how many metrics."""
    metrics = [name for name in result.metrics_of(pooling) if name not in DESCRIPTIVE]
    # The gain of a baseline over Grad-CAM: an interval below 0 says that Grad-CAM is better.
    ends = {name: [result.interval(pooling, other, name) for other in BASELINES] for name in metrics}
    better = sum(all(high < 0 for _, high in found) for found in ends.values())
    worse = sum(any(low > 0 for low, _ in found) for found in ends.values())
    return better, worse, len(metrics)


def _place(result: Result, pooling: str) -> str:
    return f'{result.facts["heading"]}' + (f' under {pooling.upper()}' if len(result.facts['poolings']) > 1 else '')


def _own_maps(result: Result, pooling: str) -> list[str]:
    """Methods with a map of their own, without the baselines and Grad-CAM."""
    same = result.same_methods(pooling)
    return [m for m in result.methods(pooling) if m not in (REFERENCE, *BASELINES, *same)]


def _verdicts(result: Result, pooling: str, method: str) -> list[int]:
    return [v for (p, m, _), v in result.verdicts.items() if (p, m) == (pooling, method)]


def _never_worse(results: Sequence[Result]) -> list[str]:
    """Methods that every network measured, and that are better than Grad-CAM somewhere and worse nowhere.

    Each interval counts by itself.
    """
    found: dict[str, list[int]] = {}
    networks: dict[str, set[str]] = {}
    for result in results:
        for p in result.poolings:
            same = {**result.facts['equal'], **result.same_methods(p)}
            for method in _own_maps(result, p):
                for name in (method, *(name for name, other in same.items() if other == method)):
                    found.setdefault(name, []).extend(_verdicts(result, p, method))
                    networks.setdefault(name, set()).add(result.facts['name'])
    everywhere = [m for m in found if len(networks[m]) == len(results)]
    return sorted(m for m in everywhere if max(found[m], default=0) > 0 and min(found[m]) >= 0)


def _better_at_once(result: Result, pooling: str) -> list[str]:
    """Methods that are better than Grad-CAM for all comparisons at once somewhere, and worse nowhere."""
    found = {m: _verdicts(result, pooling, m) for m in _own_maps(result, pooling)}
    return sorted(m for m, values in found.items() if values and max(values) == 2 and min(values) >= 0)


def _loses(result: Result, pooling: str, method: str) -> bool:
    """Whether a method is worse than the centre in at least half of the metrics."""
    metrics = [
        name for name in result.metrics_of(pooling) if name not in DESCRIPTIVE and result.count(pooling, method, name)
    ]
    lost = [result.interval(pooling, method, metric, 'centre')[1] < 0 for metric in metrics]
    return 2 * sum(lost) >= len(lost)


def _names_of_one_map(result: Result, pooling: str) -> dict[str, list[str]]:
    """{method: other names of its map under a pooling}."""
    groups: dict[str, list[str]] = {}
    same = result.same_methods(pooling)
    for name, other in {**result.facts['equal'], **same}.items():
        groups.setdefault(same.get(other, other), []).append(name)
    return {name: sorted(others) for name, others in groups.items()}


def _measured(results: Sequence[Result]) -> Iterable[str]:
    yield '## What was measured'
    yield ''
    for result in results:
        facts = result.facts
        accuracy = ', '.join(f'{p.upper()} {facts["accuracy"][p]:.1f} %' for p in result.poolings)
        sure = ', '.join(f'{p.upper()} {facts["confidence"][p]:.1f} %' for p in result.poolings)
        yield (
            f'- **{facts["heading"]}**: {facts["network"]}; {result.num_images} {facts["photographs"]}, '
            f'{facts["side"]} x {facts["side"]} pixels, seed {facts["seed"]}. Accuracy {accuracy}; mean probability of '
            f'the class {sure}. {_seconds(facts)}'
            + ', '.join(f'`{command}`' for command in facts['commands'])
            + (f' (the program of commit {facts["program"]}).' if 'program' in facts else '.')
        )
    yield ''
    left = sorted({name for result in results for name in result.facts['left_out']})
    versions = results[0].facts['versions']
    yield (
        'The class explained is the label, also where the network predicts another one. What costs much was measured on '
        'fewer photographs: *n* in a table is the number of a column, and a method with fewer has its own number. '
        f'Left out on some networks, because they take many forwards: {_listed(left)}. Measured nowhere: `grad-cam:SESS`, '
        '`torchcam:SSCAM` and `torchcam:ISCAM`, which take more; methods that [do not run](methods.md) on a network; '
        'MaxBoxAccV2, which has no value for one image.'
    )
    known = {name for result in results for name in result.facts['metrics']} | {'max_box_acc_v2'}
    missing = [row.title for name, row in METRICS.items() if name not in known]
    if missing:
        yield ''
        yield f'These metrics are not measured on this page: {", ".join(missing)}.'
    yield ''
    yield 'Versions: ' + ', '.join(f'{name} {text}' for name, text in versions.items()) + '.'


def _seconds(facts: dict[str, Any]) -> str:
    where = f'{facts["machine"]}. '
    if 'forward_seconds' not in facts:
        return where
    return f'A forward of one image takes {1000 * facts["forward_seconds"]:.0f} ms of CPU time, {where}'


def _reading() -> Iterable[str]:
    yield '## How to read the tables'
    yield ''
    yield (
        '- Values are means over the photographs in percent; arrows point to better values, and the [protocol]'
        '(protocol.md) defines them.\n'
        '- **Bold**: better than Grad-CAM, *italic*: worse, where the paired 95 % interval of the difference (10,000 '
        'resamples of the photographs) excludes 0. Many comparisons are made: among 100 that are all equal in truth, about '
        '5 such intervals exclude 0 by chance. An asterisk marks those that hold for all comparisons of the network at '
        'once. An interval that includes 0 says that so many photographs do not decide, not that two methods are equal.\n'
        '- Order of the rows: the mean of the ranks over the metrics of the first table, the best on top; baselines stand '
        'last. Neighbours need not differ.\n'
        '- *Blank*: share of the maps that are constant, which say nothing. AD of such a map is that of a black image. '
        'Where boxes were measured and blank maps were not counted, it is the share of the maps that are 0 in the box.\n'
        '- *Forwards*: CPU time of one map in forwards of one image by itself, on a machine with other work. Methods of '
        'this package run several images in a faster memory format, so that some take less than one.\n'
        '- A method whose map is that of an earlier one stands in [names of one map](#names-of-one-map) and not in a '
        'table.'
    )


def _section(result: Result, pooling: str) -> Iterable[str]:
    yield f'## {result.facts["heading"]}, {pooling.upper()}'
    for title, names in TABLES.items():
        metrics = [name for name in names if name in result.metrics_of(pooling)]
        if metrics:
            yield ''
            yield from _table(result, pooling, title, metrics)


def _table(result: Result, pooling: str, title: str, metrics: Sequence[str]) -> Iterable[str]:
    facts = result.facts
    same = result.same_methods(pooling)
    methods = [
        m for m in result.methods(pooling) if m not in same and any(result.count(pooling, m, n) for n in metrics)
    ]
    order = sorted(methods, key=lambda m: (m in BASELINES, _mean_rank(result, pooling, m)))
    full = {name: result.count(pooling, REFERENCE, name) for name in metrics}
    head = [
        f'{facts["metrics"][name]["symbol"]} {"↑" if facts["metrics"][name]["higher"] else "↓"}' for name in metrics
    ]
    is_first = title == next(iter(TABLES))
    yield f'### {title}: {facts["heading"]}, {pooling.upper()}'
    yield ''
    yield '| method | ' + ' | '.join(head) + (' | blank | forwards |' if is_first else ' |')
    yield '| --- |' + ' ---: |' * (len(metrics) + 2 * is_first)
    yield '| *n* | ' + ' | '.join(str(full[name]) for name in metrics) + (' | | |' if is_first else ' |')
    for method in order:
        cells = [_cell(result, pooling, method, name, full[name]) for name in metrics]
        extra = ''
        if is_first:
            blank = result.blank(pooling, method)
            share = '' if np.isnan(blank) else f'{100 * blank:.0f} %'
            extra = f' {share} | {facts["forwards"][method]:.1f} |'
        yield f'| {_name(method)} | ' + ' | '.join(cells) + ' |' + extra


def _cell(result: Result, pooling: str, method: str, metric: str, full: int) -> str:
    count = result.count(pooling, method, metric)
    if not count:
        return ''
    text = f'{result.mean(pooling, method, metric):.1f}'
    verdict = result.verdicts.get((pooling, method, metric), 0)
    mark = '**' if verdict > 0 else '*' if verdict < 0 else ''
    star = '\\*' if abs(verdict) == 2 else ''
    return f'{mark}{text}{mark}{star}' + (f' ({count})' if count != full else '')


def _mean_rank(result: Result, pooling: str, method: str) -> float:
    """The mean over metrics of the method's place, from 0, the best, to 1."""
    same = result.same_methods(pooling)
    methods = [m for m in result.methods(pooling) if m not in same]
    places = []
    for metric in result.metrics_of(pooling):
        if metric in DESCRIPTIVE or metric not in next(iter(TABLES.values())):
            continue
        sign = 1 if result.facts['metrics'][metric]['higher'] else -1
        values = {m: sign * result.mean(pooling, m, metric) for m in methods if result.count(pooling, m, metric)}
        if method in values:
            places.append(sum(v > values[method] for v in values.values()) / max(1, len(values) - 1))
    return float(np.mean(places)) if places else 1.0


def _agreement(results: Sequence[Result]) -> Iterable[str]:
    yield '## How far metrics agree'
    yield ''
    yield (
        "Kendall's tau between the orders in which two metrics put the methods: 1 is the same order, 0 is none, -1 is the "
        'reverse. Baselines are among the methods. In brackets: the 95 % interval over 200 resamples of the photographs, '
        'for the pairs that are quoted most; resampling adds noise, which lowers tau, so that an interval lies below its '
        'value. Methods that some metric did not measure are left out.'
    )
    yield ''
    pairs = (
        ('average_drop', 'average_drop_top50'),
        ('average_drop', 'insertion'),
        ('average_drop', 'deletion'),
        ('insertion', 'deletion'),
        ('average_drop', 'road_lerf'),
        ('average_drop', 'energy_pointing_game'),
    )
    shown = {name: row['symbol'] for result in results for name, row in result.facts['metrics'].items()}
    pairs = tuple(pair for pair in pairs if set(pair) <= shown.keys())
    heads = ' | '.join(f'{shown[one]} and {shown[other]}' for one, other in pairs)
    yield f'| network | pooling | {heads} | methods |'
    yield '| --- | --- |' + ' ---: |' * (len(pairs) + 1)
    for result in results:
        for pooling in result.poolings:
            cells = []
            for one, other in pairs:
                there = {one, other} <= set(result.metrics_of(pooling))
                cells.append('{:.2f} [{:.2f}, {:.2f}]'.format(*result.tau(pooling, one, other)) if there else '')
            if any(cells):
                yield (
                    f'| {result.facts["heading"]} | {pooling.upper()} | {" | ".join(cells)} | '
                    f'{len(result.ranked_methods(pooling))} |'
                )
    for result in results:
        for pooling in result.poolings:
            metrics = [name for name in result.metrics_of(pooling) if name not in DESCRIPTIVE]
            methods = result.ranked_methods(pooling)
            symbols = [result.facts['metrics'][name]['symbol'] for name in metrics]
            yield ''
            yield f'### Agreement: {result.facts["heading"]}, {pooling.upper()}, {len(methods)} methods'
            yield ''
            yield '| | ' + ' | '.join(symbols[:-1]) + ' |'
            yield '| --- |' + ' ---: |' * (len(metrics) - 1)
            for position, (first, symbol) in enumerate(zip(metrics, symbols, strict=True)):
                if not position:
                    continue
                taus = [
                    kendalltau(result.ranks(pooling, first, methods), result.ranks(pooling, second, methods)).statistic
                    for second in metrics[:position]
                ]
                cells = [f'{tau:.2f}' for tau in taus] + [''] * (len(metrics) - 1 - position)
                yield f'| {symbol} | ' + ' | '.join(cells) + ' |'


def _equal(results: Sequence[Result]) -> Iterable[str]:
    yield '## Names of one map'
    yield ''
    probed = results[0].facts['probed']
    yield (
        f'Maps that differ by less than 0.01 at every pixel, under every pooling, on the {probed} photographs that were '
        f'compared, were measured once. Methods whose values differ by less than {SAME_VALUES} on every photograph and in '
        'every metric are joined under that pooling. On a network that averages its last map before a linear classifier '
        'the gradient of a class is the same at every location: Grad-CAM, HiResCAM, XGrad-CAM and the plain class '
        'activation map are then one formula.'
    )
    for result in results:
        for pooling in result.poolings:
            groups = _names_of_one_map(result, pooling)
            yield ''
            yield f'**{result.facts["heading"]}, {pooling.upper()}**'
            yield ''
            yield from (f'- {_name(name)}: {_listed(others)}' for name, others in groups.items())
        if result.same_metrics:
            yield ''
            yield ' '.join(
                f'{result.facts["metrics"][name]["symbol"]} has the values of '
                f'{result.facts["metrics"][other]["symbol"]} there: all steps of the curve are equal.'
                for name, other in result.same_metrics.items()
            )


def _limits(results: Sequence[Result]) -> Iterable[str]:
    yield '## What this page does not show'
    yield ''
    yield (
        '- Which map is true. No metric here knows what a network looks at; each asks how a probability changes on images '
        'that no camera takes.\n'
        '- Average Gain and Average Increase reward any map that covers the image: a masked image is more probable when '
        'more of it is left. Complexity rewards the opposite, and a map of one pixel has the best value; it counts neither '
        'in the order of the rows nor above.\n'
        '- The Pointing Game counts one pixel, so a map with one sharp maximum and a bad rest can win it.\n'
        '- The centre is strong wherever objects are in the middle. A method that does not beat it tells nothing about '
        'this network.\n'
        '- Random weights of the channels (`grad-cam:RandomCAM`) still follow the feature maps. Beating `random` is no '
        'achievement; beating `grad-cam:RandomCAM` means that the weights count.\n'
        '- Whether CA is better than GAP. The stream of EfficientNet-Lite0 was fitted to training photographs of these 20 '
        'classes, among others; [Networks with a stream](pretrained.md) compares the poolings.\n'
        '- Large ResNets. The package index has no trained weights of one in a small wheel that we found: the ResNet here '
        'is a small one, and its photographs have drawn digits.\n'
        '- Your network and images may order the methods otherwise: `castream evaluate --methods all` measures them.'
    )


def _name(method: str) -> str:
    return PLAIN.get(method, f'`{method}`')


def _listed(names: Sequence[str]) -> str:
    shown = [_name(name) for name in names]
    if not shown:
        return 'none'
    return shown[0] if len(shown) == 1 else ', '.join(shown[:-1]) + ' and ' + shown[-1]
