"""The tables of a report as text for the terminal, Markdown, LaTeX and a pandas DataFrame.

Values have three significant figures. The best method of a column is marked if its paired difference from the second
best has an interval that excludes 0.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..attribution.methods import method_title
from ..metrics.table import METRICS
from .bootstrap import RESAMPLES, Estimate

if TYPE_CHECKING:
    from .report import Report

WIDTH = 100
_TITLE = 36
_FEW = 6  # images: of fewer, chance alone gives all differences the same sign in more than one case of 20
BASELINES = ('random', 'centre')
FORMATS = ('text', 'markdown', 'latex')

_LATEX = {letter: f'\\{letter}' for letter in '&%$#_{}'} | {
    '\\': r'\textbackslash{}',
    '~': r'\textasciitilde{}',
    '^': r'\textasciicircum{}',
    '<': r'\textless{}',
    '>': r'\textgreater{}',
    '|': r'\textbar{}',
    '[': '{[}',  # after the \\ of the line before, these two are an argument
    '*': '{*}',
}

Row = tuple[str, str, dict[str, str]]


def figures(value: float) -> str:
    """Three significant figures, but at most two decimals: `35.4`, `5.54`, `0.05`, `100`."""
    if math.isnan(value):
        return '-'
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f'{value:.{decimals}f}'.replace('-0.00', '0.00')


def cell(estimate: Estimate, signed: bool = False) -> str:
    """`35.4 [34.2, 36.6]`, or `+4.90 [3.80, 6.10]`, or `35.4` without an interval."""
    value, low, high = map(figures, estimate)
    sign = '+' if signed and estimate.value > 0 else ''
    return f'{sign}{value}' + ('' if math.isnan(estimate.low) else f' [{low}, {high}]')


def rows(report: Report, text: Callable[[Estimate, bool], str], mark: Callable[[str], str]) -> Iterator[Row]:
    """A row a method and pooling, and one for the differences: title of the method, name of the pooling, cells.

    Args:
        report: The report.
        text: A cell of an estimate, signed or not.
        mark: What becomes of the cell of the best method of a column.
    """
    best = {(p, k): report.best(p, k) for p in report.poolings for k in report.metrics}
    for method in report.methods:
        for pooling in report.poolings:
            cells = {k: text(report[pooling, method, k], False) for k in report.metrics}
            cells |= {k: mark(cells[k]) for k in report.metrics if best[pooling, k] == method}
            yield method_title(method), report.pooling_name(pooling), cells
        if report.differences:
            cells = {k: text(report.difference(method, k), True) for k in report.metrics}
            yield method_title(method), report.difference_name, cells


def to_text(report: Report) -> str:
    """The tables, at most 100 columns wide, and the notes."""
    accuracy: list[Sequence[str]] = [('POOLING', f'{report.accuracy_name} ↑', 'probability')]
    accuracy += [
        (report.pooling_name(p), cell(report.accuracy[p]), cell(report.confidence[p])) for p in report.poolings
    ]
    if report.differences:
        pair = (cell(report.differences[k,], signed=True) for k in ('accuracy', 'confidence'))
        accuracy.append((report.difference_name, *pair))
    blocks = [report.network, *_aligned(accuracy)]
    short = _short_titles(report)
    marked = rows(report, cell, lambda text: f'{text} *')
    body = [(short.get(title, title), pooling, cells) for title, pooling, cells in marked]
    metrics = list(report.metrics)
    while metrics:
        taken = len(metrics)
        lines = _block(body, metrics)
        while taken > 1 and max(map(len, lines)) > WIDTH:
            taken -= 1
            lines = _block(body, metrics[:taken])
        blocks += ['', *lines]
        metrics = metrics[taken:]
    names = (line for title, text in short.items() for line in _wrapped(f'{text}: {title}'))
    return '\n'.join([*blocks, '', *names, to_notes(report)])


def to_notes(report: Report) -> str:
    """The notes, at most 100 columns wide."""
    return '\n'.join(line for note in notes(report) for line in _wrapped(note))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent='  ')


def _block(body: Iterable[Row], metrics: Sequence[str]) -> list[str]:
    head = ('METHOD', 'POOLING', *(METRICS[k].heading for k in metrics))
    return _aligned([head, *((title, pooling, *(cells[k] for k in metrics)) for title, pooling, cells in body)])


def _short_titles(report: Report) -> dict[str, str]:
    """The titles of methods that leave no room for two metrics, by title: their beginning and a number."""
    titles = enumerate(map(method_title, report.methods), start=1)
    return {title: f'{title[: _TITLE - 9]}... ({i})' for i, title in titles if len(title) > _TITLE}


def notes(report: Report) -> Iterator[str]:
    """What a reader of the table must know: images, intervals, baselines, equal methods, maps that say nothing."""
    by_network = report.settings.get('labels') == 'predicted'  # of castream fit
    explained = "GAP's prediction" if by_network else str(report.settings.get('target'))
    kind, mean = 'class', 'the class explained'
    if not by_network and ' ' in explained:  # the path and the hash of a function
        kind, mean, explained = 'function', 'its values', explained.partition(' ')[0].rpartition('.')[2]
    intervals = f'95 % intervals from {RESAMPLES} bootstrap resamples' if report.num_images > 1 else 'no intervals'
    yield (
        f'{_images(report.num_images)}, {kind}: {explained}; in percent, with {intervals}; probability: mean of {mean}'
    )
    if report.num_images == 1:
        yield 'One image says nothing about others, so no difference has a verdict'
    elif report.num_images < _FEW:
        yield (
            f'{report.num_images} images are few: by chance alone an interval of a difference excludes 0 in one case of '
            f'{2 ** (report.num_images - 1)} or more'
        )
    if by_network:
        yield "The labels are GAP's predictions: accuracy is the agreement with them"
    if report.differences:
        yield f'{report.difference_name}: paired by image'
    if any(report.best(p, k) for p in report.poolings for k in report.metrics):
        yield '*: the best method under its pooling; its paired difference from the second excludes 0'
    comparisons = len(report.poolings) * len(report.metrics) * (len(report.methods) * (len(report.methods) - 1) // 2)
    if comparisons >= 20 and report.num_images > 1:
        yield f'{comparisons} pairs of methods can be compared here: of 95 % intervals one in 20 excludes 0 by chance'
    yield from baseline_notes(report)
    yield from equal_notes(report)
    temperatures = report.settings.get('temperatures')
    if temperatures:
        yield 'Temperatures: ' + ', '.join(f'{report.pooling_name(p)} {t:.3f}' for p, t in temperatures.items())
    maps = len(report.values.pairs['image'])
    if report.num_boxed is not None:
        both = ' under both poolings' if len(report.poolings) > 1 else ''
        yield f'Localisation: {report.num_boxed} of {maps} maps have a box{both}'
    for counts, text in (
        (report.constant_maps, f'are constant and say nothing, of {maps}'),
        (report.not_finite_maps, 'have NaN and are left out of their method'),
    ):
        if counts:
            each = ', '.join(f'{method_title(m)} {report.pooling_name(p)} {n}' for (p, m), n in counts.items())
            yield f'Maps that {text}: {each}'
    fewer = [m for m in report.methods if report.num_maps(m) < maps]
    if fewer:
        each = ', '.join(f'{method_title(m)} {report.num_maps(m)}' for m in fewer)
        yield (
            f'Maps without NaN, of {maps}: {each}; the results of a method are of these maps alone, and a difference of '
            'two methods is of the maps without NaN in both'
        )
    for lost, text in (
        (report.unreadable, 'could not be read and {are} left out'),
        (report.not_finite, '{have} NaN in a map or in the scores'),
    ):
        if lost:
            one = len(lost) == 1
            names = ', '.join(list(lost)[:3]) + (', ...' if len(lost) > 3 else '')
            yield f'{_images(len(lost))} {text.format(are="is" if one else "are", have="has" if one else "have")}: {names}'


def baseline_notes(report: Report) -> Iterator[str]:
    """Which methods are worse than a baseline map, beyond their paired intervals: a sentence for each set of methods that
    the same baselines beat, with the metrics and poolings in which they do."""
    num_others = sum(name not in BASELINES for name in report.methods)
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[str, list[str]]] = {}
    for better, worse, pooling, metric in _beaten(report):
        groups.setdefault((better, worse), {}).setdefault(pooling, []).append(METRICS[metric].symbol)
    for (better, worse), symbols in groups.items():
        under: dict[str, list[str]] = {}  # poolings by metrics
        for pooling, names in symbols.items():
            under.setdefault(', '.join(names), []).append(report.pooling_name(pooling))
        where = under if len(report.poolings) == 1 else [f'{k} under {" and ".join(p)}' for k, p in under.items()]
        named = (
            f'all {num_others} other methods' if 2 < num_others == len(worse) else ', '.join(map(method_title, worse))
        )
        titles = ' and '.join(map(method_title, better))
        yield f'Worse than the baseline{"s" * (len(better) > 1)} {titles} in {" and ".join(where)}: {named}'


def _beaten(report: Report) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], str, str]]:
    """Baselines, the methods that just these baselines beat, and the pooling and metric in which they do."""
    baselines = [name for name in report.methods if name in BASELINES]
    others = [name for name in report.methods if name not in BASELINES]
    compared = {(method, baseline): report.compare(method, baseline) for method in others for baseline in baselines}
    for pooling in report.poolings:
        for metric in report.metrics:
            by: dict[tuple[str, ...], list[str]] = {}
            for m in others:
                verdicts = {
                    b: verdict(compared[m, b][pooling, metric], METRICS[metric].higher_is_better) for b in baselines
                }
                by.setdefault(tuple(b for b in baselines if verdicts[b] == 'worse'), []).append(m)
            yield from ((better, tuple(worse), pooling, metric) for better, worse in by.items() if better)


def equal_notes(report: Report) -> Iterator[str]:
    """A sentence for methods whose values are the same on every image, as those of equal maps are."""
    for pooling in report.poolings:
        left = list(report.methods)
        while left:
            first, *others = left
            same = [name for name in others if report.has_same_values(pooling, first, name)]
            left = [name for name in others if name not in same]
            if same:
                *before, last = (method_title(name) for name in (first, *same))
                yield (
                    f'{", ".join(before)} and {last} have the same values under {report.pooling_name(pooling)}: count '
                    'them as one method'
                )


def compared(report: Report, method: str, other: str) -> str:
    """A method minus another one, paired by image: a line a pooling and metric, with the verdict."""
    differences = report.compare(method, other)
    lines = [
        (
            report.pooling_name(p),
            METRICS[k].heading,
            cell(value, signed=True),
            '' if math.isnan(value.value) else verdict(value, METRICS[k].higher_is_better),
        )
        for (p, k), value in differences.items()
    ]
    count, maps = report.num_maps(method, other), len(report.values.pairs['image'])
    note = 'paired by image, 95 % intervals'
    if report.num_images == 1:
        note = 'one image has no interval'
    if count < maps:
        note += f'; {count} of {maps} maps, those without NaN in both methods'
    title = f'{method_title(method)} - {method_title(other)}'
    return '\n'.join([*_wrapped(title), *_aligned([('POOLING', 'METRIC', 'DIFFERENCE', ''), *lines]), '', note])


def to_markdown(report: Report) -> str:
    """The table of methods in Markdown, the best of a column bold."""
    head = ['method', 'pooling', *(METRICS[k].heading for k in report.metrics)]
    body = [
        [title.replace('|', r'\|'), pooling, *(cells[k] for k in report.metrics)]
        for title, pooling, cells in rows(report, cell, lambda text: f'**{text}**')
    ]
    lines = [head, ['---'] * len(head), *body]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def to_latex(report: Report, intervals: bool = True) -> str:
    """The table of methods in LaTeX with booktabs, the best of a column bold.

    Args:
        report: The report.
        intervals: Print the intervals, small, behind the values.
    """

    def text(estimate: Estimate, signed: bool) -> str:
        if math.isnan(estimate.value):
            return '-'
        sign = '+' if signed and estimate.value > 0 else ''
        low, high = figures(estimate.low), figures(estimate.high)
        interval = '' if math.isnan(estimate.low) or not intervals else rf' {{\scriptsize $[{low}, {high}]$}}'
        return f'${sign}{figures(estimate.value)}$' + interval

    def bold(text: str) -> str:
        return re.sub(r'^\$([^$]*)\$', r'$\\mathbf{\1}$', text)

    arrows = {True: r'$\uparrow$', False: r'$\downarrow$'}
    head = [f'{escaped(METRICS[k].symbol)} {arrows[METRICS[k].higher_is_better]}' for k in report.metrics]
    lines = [
        rf'\begin{{tabular}}{{ll{"r" * len(head)}}}',
        r'\toprule',
        ' & '.join(['Method', 'Pooling', *head]) + r' \\',
        r'\midrule',
    ]
    last = ''
    for title, pooling, cells in rows(report, text, bold):
        name = '' if title == last else escaped(title)
        last = title
        lines.append(' & '.join([name, escaped(pooling), *(cells[k] for k in report.metrics)]) + r' \\')
    return '\n'.join([*lines, r'\bottomrule', r'\end{tabular}'])


def to_dataframe(report: Report) -> Any:
    """A pandas DataFrame: a row a method and pooling, columns (metric, `value`, `low` or `high`), in percent.

    Raises:
        ModuleNotFoundError: If pandas is not installed.
    """
    import pandas as pd

    index, data = [], []
    for method in report.methods:
        index += [(method, pooling) for pooling in report.poolings]
        data += [[v for k in report.metrics for v in report[pooling, method, k]] for pooling in report.poolings]
        if report.differences:
            index.append((method, 'ca-gap'))
            data.append([v for k in report.metrics for v in report.difference(method, k)])
    return pd.DataFrame(
        data,
        pd.MultiIndex.from_tuples(index, names=['method', 'pooling']),
        pd.MultiIndex.from_product([report.metrics, ['value', 'low', 'high']], names=['metric', None]),
    )


def verdict(difference: Estimate, higher_is_better: bool) -> str:
    """`'better'`, `'worse'` or `'no difference seen'`: whether the interval of a difference excludes 0, and where."""
    value, low, high = difference
    if not (low > 0 or high < 0):
        return 'no difference seen'
    return 'better' if (value > 0) == higher_is_better else 'worse'


def escaped(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return ''.join(_LATEX.get(letter, letter) for letter in text)


def _images(count: int) -> str:
    return f'{count} image' if count == 1 else f'{count} images'


def _aligned(lines: Iterable[Sequence[str]]) -> list[str]:
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ['  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
