"""The two plots of the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .results import Results
from .statistics import Difference

GOOD, BAD, NEITHER = '#1b7f4d', '#b3382c', '#6b7280'


def plot_differences(rows: Sequence[tuple[str, Difference]], path: Path) -> None:
    """CA - GAP of every figure with the interval of every seed.

    Args:
        rows: Name and difference of each figure, top to bottom.
        path: Image file to write.
    """
    figure = Figure(figsize=(7, 0.8 + 0.42 * len(rows)), layout='constrained')
    axes = figure.subplots()
    axes.axvline(0, color='black', linewidth=0.8)
    for y, (_, difference) in enumerate(rows):
        color = {'better': GOOD, 'worse': BAD}.get(difference.verdict, NEITHER)
        seeds = len(difference.values)
        for i, (value, low, high) in enumerate(zip(difference.values, difference.lows, difference.highs, strict=True)):
            height = y + (0.0 if seeds == 1 else 0.5 * (i / (seeds - 1) - 0.5))
            axes.plot([low, high], [height, height], color=color, linewidth=1.3)
            axes.plot([value], [height], 'o', color=color, markersize=3)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel(
        'CA - GAP in points, 95 % interval of each seed\n'
        'green: better in every seed; red: worse in every seed; grey: neither'
    )
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=130, metadata={'Software': None})


def plot_growth(results: Results, path: Path) -> None:
    """Validation accuracy against training images of each class, for every start, and GAP's.

    Args:
        results: The results.
        path: Image file to write.
    """
    figure = Figure(figsize=(6, 3.6), layout='constrained')
    axes = figure.subplots()
    for (kind, title), color in zip(
        (('gap_start', "stream_init='gap'"), ('paper_start', "stream_init='paper'")), (GOOD, BAD), strict=True
    ):
        points = growth_points(results, kind)
        if points:
            means = [sum(values) / len(values) for _, values in points]
            axes.plot([n for n, _ in points], means, 'o-', color=color, label=title, markersize=4)
            for n, values in points:
                axes.plot([n, n], [min(values), max(values)], color=color, linewidth=1)
    gap = gap_accuracy(results)
    if gap is not None:
        axes.axhline(gap, color='black', linewidth=0.8, linestyle='--', label='GAP, all images')
    axes.set_xlabel('training images of each class (as many steps for each)\nbars: lowest to highest seed')
    axes.set_ylabel('validation accuracy, %')
    axes.legend(frameon=False)
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=130, metadata={'Software': None})


def growth_points(results: Results, kind: str) -> list[tuple[int, list[float]]]:
    """Validation accuracies of the seeds that have run, by number of training images of each class."""
    points = []
    for per_class in results.settings['growth']['per_class']:
        everything = per_class == results.settings['train_per_class']
        values = [
            facts['val_accuracy']
            for name, facts in results.streams.items()
            if facts['kind'] == kind
            and not name.startswith('choice-')
            and facts['classes'] is None
            and facts['per_class'] == (None if everything else per_class)
            and facts['seed'] in results.settings['growth']['seeds']
        ]
        if values:
            points.append((per_class, values))
    return points


def gap_accuracy(results: Results) -> float | None:
    """GAP's accuracy on the images of the main table, in percent."""
    gap = results.table('main').gap
    return None if gap is None else float(gap['accuracy'].mean())
