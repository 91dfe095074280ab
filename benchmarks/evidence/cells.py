"""Names, cells and sentences of the page."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .results import Table
from .statistics import LOWER_IS_BETTER, Difference, compare

METHODS = {
    'grad_cam': 'Grad-CAM', 'grad_cam_pp': 'Grad-CAM++', 'score_cam': 'Score-CAM', 'attention': 'attention',
    'random': 'random', 'centre': 'centre'}
METRICS = {
    'average_drop': 'AD ↓', 'average_gain': 'AG ↑', 'average_increase': 'AI ↑', 'insertion': 'I ↑', 'deletion': 'D ↓',
    'pointing_game': 'SP ↑', 'energy_pointing_game': 'EP ↑'}
MASKED = ('average_drop', 'average_gain', 'average_increase')
CURVES = ('insertion', 'deletion')
BOXES = ('pointing_game', 'energy_pointing_game')
STREAMS = {
    'gap_start': "S_0 - S_4, `'gap'` start", 'paper_start': "S_0 - S_4, `'paper'` start", 's1': 'S_1 - S_4',
    's2': 'S_2 - S_4', 's3': 'S_3 - S_4', 's4': 'S_4 - S_4', 'proj_ca': 'PROJ -> CA',
    'class_specific': 'class specific'}


def cells(difference: Difference) -> str:
    """Four cells: GAP, CA, the difference with its interval, the verdict."""
    mean = sum(difference.ca) / len(difference.ca)
    verdict = f'**{difference.verdict}**' if difference.verdict in ('better', 'worse') else difference.verdict
    return f'{difference.gap:.1f} | {mean:.1f} | {span(difference)} | {verdict}'


def span(difference: Difference) -> str:
    """`+7.1 [6.0, 8.2]`."""
    return f'{signed(difference.value)} [{unsigned(difference.low)}, {unsigned(difference.high)}]'


def signed(value: float) -> str:
    """`+7.1`, `-0.4`, `0.0`."""
    text = f'{value:+.1f}'
    return '0.0' if text in ('+0.0', '-0.0') else text


def unsigned(value: float) -> str:
    """`7.1`, `-0.4`, `0.0`."""
    text = f'{value:.1f}'
    return '0.0' if text == '-0.0' else text


def mean_text(table: Table, stream: str, pooling: str, column: str) -> str:
    """Mean of a column under a pooling, over the seeds under CA; empty where it has not run."""
    runs = [table.gap] if pooling == 'gap' else list(table.streams.get(stream, {}).values())
    values = [float(run[column].mean()) for run in runs if run is not None and column in run]
    return f'{sum(values) / len(values):.1f}' if values else ''


def tried_cells(entry: dict[str, float]) -> str:
    """Cells of the table of settings tried."""
    return ' | '.join([*(f'{entry[k]:.1f}' for k in ('accuracy', 'probability', 'AD', 'AG', 'AI')),
                       f'{entry["temperature"]:.2f}'])


def settings_text(recipe: dict[str, Any]) -> str:
    """`epochs 4, lr 0.0001`."""
    return ', '.join(f'{name} {value}' for name, value in recipe.items())


def listed(items: Sequence[str]) -> str:
    """`a, b and c`, or `nothing`."""
    items = list(items)
    return ' and '.join([*filter(None, [', '.join(items[:-1])]), items[-1]]) if items else 'nothing'


def plural(count: int, noun: str) -> str:
    """`1 seed`, `5 seeds`."""
    return f'{count} {noun}' + ('' if count == 1 else 's')


def wrap(text: str, width: int = 120) -> str:
    """Lines of at most `width` characters."""
    lines = ['']
    # A line that begins with a minus sign would be a list.
    for word in text.replace(' - ', '\0-\0').split():
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append('')
        lines[-1] = f'{lines[-1]} {word}'.strip()
    return '\n'.join(lines).replace('\0', ' ')


def against_centre(table: Table) -> str:
    """Attention's SP and EP minus those of the map `centre`, paired by image."""
    parts = []
    for metric in BOXES:
        runs = [run[f'attention/{metric}'] - run[f'centre/{metric}'] for run in table.streams['gap_start'].values()]
        difference = compare(np.zeros(len(runs[0])), runs)
        parts.append(f'{METRICS[metric].rstrip(" ↑↓")} {span(difference)} ({difference.verdict})')
    return listed(parts)


def excess(main: Table, attention: Table, baseline: str, metric: str) -> Difference | None:
    """How much more CA changes a metric of Grad-CAM than that of a map that looks at nothing.

    Args:
        main: The main table.
        attention: The table with the baselines, on the first images of the main table.
        baseline: `random` or `centre`.
        metric: AD, AG or AI.

    Returns:
        (CA - GAP of Grad-CAM) - (CA - GAP of the baseline), paired by image, or None where a part has not run.
    """
    streams, column, other = 'gap_start', f'grad_cam/{metric}', f'{baseline}/{metric}'
    seeds = main.streams.get(streams, {}).keys() & attention.streams.get(streams, {}).keys()
    if main.gap is None or attention.gap is None or not seeds:
        return None
    count = attention.num_images
    runs = [
        main.streams[streams][seed][column][:count] - main.gap[column][:count]
        - attention.streams[streams][seed][other] + attention.gap[other] for seed in sorted(seeds)]
    return compare(np.zeros(count), runs, metric in LOWER_IS_BETTER)
