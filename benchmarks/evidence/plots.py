"""The two plots of the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .results import Difference, Results

GOOD, BAD, NEITHER = '#1b7f4d', '#b3382c', '#6b7280'


def plot_differences(rows: Sequence[tuple[str, Difference]], path: Path) -> None:
    """CA - GAP of every value with the interval of every seed.

    Args:
        rows: Name and difference of each value, top to bottom.
        path: Image file to write.
    """
    figure = Figure(figsize=(7, 0.8 + 0.42 * len(rows)), layout='constrained')
    axes = figure.subplots()
    axes.axvline(0, color='black', linewidth=0.8)
    for y, (_, difference) in enumerate(rows):
        color = {'better': GOOD, 'worse': BAD}.get(difference.verdict, NEITHER)
        last = len(difference.seeds) - 1
        for i, (value, low, high) in enumerate(difference.seeds):
            height = y + (0.5 * (i / last - 0.5) if last else 0.0)
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
    """Validation accuracy against training images of each class, for every start, and GAP's; nothing before they ran.

    Args:
        results: The results.
        path: Image file to write.
    """
    figure = Figure(figsize=(6, 3.6), layout='constrained')
    axes = figure.subplots()
    for kind, color in (('gap_start', GOOD), ('paper_start', BAD)):
        counts = [n for n in results.settings['growth']['per_class'] if results.trained(kind, n)]
        values = [[facts['val_accuracy'] for facts in results.trained(kind, n)] for n in counts]
        if kind == 'gap_start' and not values:
            return
        title = f'stream_init={kind.removesuffix("_start")!r}'
        axes.plot(counts, list(map(np.mean, values)), 'o-', color=color, label=title, markersize=4)
        for n, accuracies in zip(counts, values, strict=True):
            axes.plot([n, n], [min(accuracies), max(accuracies)], color=color, linewidth=1)
    gap = results.tables['main'].gap
    if gap is not None:
        axes.axhline(gap['accuracy'].mean(), color='black', linewidth=0.8, linestyle='--', label='GAP, all images')
    axes.set_xlabel('training images of each class (as many steps for each)\nbars: lowest to highest seed')
    axes.set_ylabel('validation accuracy, %')
    axes.legend(frameon=False)
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=130, metadata={'Software': None})
