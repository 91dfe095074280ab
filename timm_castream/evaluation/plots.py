"""Plots of a report: mean curves of Insertion and Deletion, and the differences between the poolings.

Figures are matplotlib's, made without pyplot.
"""

from __future__ import annotations

import itertools
import textwrap

from matplotlib.figure import Figure

from ..attribution.methods import method_title
from ..metrics.table import METRICS
from .bootstrap import mean_curve
from .report import Report

_COLOURS = {'gap': 'tab:gray', 'ca': 'tab:blue'}
_LINES = {'gap': '--', 'ca': '-'}
# Colours that colour-blind readers tell apart, and a shape of its own.
_VERDICTS = {'better': ('tab:blue', '^'), 'worse': ('tab:orange', 'v'), 'no difference seen': ('tab:gray', 'o')}
_DPI = 200
_WIDTH = 3.4  # inches: the column of a paper


def draw_curves(report: Report) -> Figure:
    """Mean curves of every method, a line a pooling, with the bootstrap 95 % band of the mean, in two columns.

    Args:
        report: A report of `evaluate(..., keep_curves=True)`.

    Raises:
        ValueError: If the report has no curves.
    """
    kinds = list(dict.fromkeys(kind for _, _, kind in report.curves))
    if not kinds:
        raise ValueError(
            "The report has no curves: evaluate with keep_curves=True and the metrics 'insertion' or 'deletion'."
        )
    panels = list(itertools.product(report.methods, kinds))
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(_WIDTH, 1.4 * rows + 0.4), dpi=_DPI, layout='constrained')
    grid = list(figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True).flat)
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (method, kind) in zip(grid[: len(panels)], panels, strict=True):
        has_curve = report.values.is_measured(report.poolings, method)
        for pooling in report.poolings if has_curve.any() else ():
            curves = report.curves[pooling, method, kind][has_curve]
            image_of_pair = report.values.pairs['image'][has_curve]
            mean, low, high = mean_curve(curves, image_of_pair, report.settings['seed'])
            share = [i / (len(mean) - 1) for i in range(len(mean))]
            label = f'{report.pooling_name(pooling)} {report[pooling, method, kind].value:.1f} %'
            axes.plot(share, mean, color=_COLOURS[pooling], linestyle=_LINES[pooling], linewidth=1, label=label)
            axes.fill_between(share, low, high, color=_COLOURS[pooling], alpha=0.25, linewidth=0)
        axes.set_title(f'{_title(report, method)}\n{METRICS[kind].title}', fontsize=7)
        if axes.lines:
            axes.legend(fontsize=6, frameon=False)
        axes.tick_params(labelsize=6, labelbottom=True)
        axes.spines[['top', 'right']].set_visible(False)
    figure.supxlabel('share of the steps', fontsize=7)
    figure.supylabel('probability', fontsize=7)
    return figure


def draw_differences(report: Report) -> Figure:
    """CA - GAP of every metric, paired by image, a point with its 95 % interval for each method.

    Raises:
        ValueError: If the report has one pooling alone.
    """
    if not report.differences:
        raise ValueError('The report has one pooling alone, so it has no differences.')
    rows, methods = len(report.metrics), len(report.methods)
    titles = [_title(report, method) for method in report.methods]
    line = 0.1 + 0.1 * max(title.count('\n') + 1 for title in titles)  # inches
    figure = Figure(figsize=(_WIDTH, rows * (line * methods + 0.45) + 0.45), dpi=_DPI, layout='constrained')
    panels = figure.subplots(rows, 1, squeeze=False)[:, 0]
    positions = range(methods)
    for axes, metric in zip(panels, report.metrics, strict=True):
        axes.axvline(0, color='black', linewidth=0.8)
        for position, method in zip(positions, report.methods, strict=True):
            value, low, high = report.difference(method, metric)
            colour, marker = _VERDICTS[report.verdict(method, metric)]
            axes.plot([low, high], [position, position], color=colour, linewidth=1.5)
            axes.plot([value], [position], marker=marker, color=colour, markersize=4)
        row = METRICS[metric]
        axes.set_title(textwrap.fill(f'{row.title} ({row.heading})', 30), fontsize=7, loc='left')
        axes.set_yticks(list(positions), titles)
        axes.tick_params(labelsize=7)
        axes.set_ylim(methods - 0.4, -0.6)
        axes.spines[['top', 'right', 'left']].set_visible(False)
    figure.supxlabel(f'{report.difference_name} in points; ▲ better, ▼ worse, ● includes 0', fontsize=7)
    return figure


def _title(report: Report, method: str) -> str:
    """The title of a method in short lines, and how many of its maps say nothing."""
    counts = {p: report.constant_maps.get((p, method), 0) for p in report.poolings}
    each = ', '.join(f'{report.pooling_name(p)} {count}' for p, count in counts.items())
    title = f'{method_title(method)} (constant: {each})' if any(counts.values()) else method_title(method)
    return textwrap.fill(title, 28).replace('$', r'\$')  # matplotlib reads formulas between dollars
