"""Names, cells, tables and paragraphs of the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..results import Table
from ..statistics import Difference

METHODS = {
    'grad_cam': 'Grad-CAM',
    'grad_cam_pp': 'Grad-CAM++',
    'score_cam': 'Score-CAM',
    'attention': 'attention',
    'random': 'random',
    'centre': 'centre',
}
ARROWS = ' ↑↓'
METRICS = {
    'average_drop': 'AD ↓',
    'average_gain': 'AG ↑',
    'average_increase': 'AI ↑',
    'insertion': 'I ↑',
    'deletion': 'D ↓',
    'pointing_game': 'SP ↑',
    'energy_pointing_game': 'EP ↑',
}
MASKED = ('average_drop', 'average_gain', 'average_increase')
CURVES = ('insertion', 'deletion')
BOXES = ('pointing_game', 'energy_pointing_game')
STREAMS = {
    'gap_start': "S_0 - S_4, `'gap'` start",
    'paper_start': "S_0 - S_4, `'paper'` start",
    's1': 'S_1 - S_4',
    's2': 'S_2 - S_4',
    's3': 'S_3 - S_4',
    's4': 'S_4 - S_4',
    'proj_ca': 'PROJ -> CA',
    'class_specific': 'class specific',
}
NOT_RUN = 'Not run yet.'


def section(title: str, *blocks: str) -> str:
    """A section of paragraphs and tables; empty ones are left out."""
    return '\n\n'.join([f'## {title}', *filter(None, blocks)]) + '\n'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('|' + '|'.join(f' {cell} ' if cell else ' ' for cell in line) + '|' for line in lines)


def cells(difference: Difference) -> list[str]:
    """Four cells: GAP, CA, the difference with its interval, the verdict."""
    mean = sum(difference.ca) / len(difference.ca)
    verdict = f'**{difference.verdict}**' if difference.verdict in ('better', 'worse') else difference.verdict
    return [f'{difference.gap:.1f}', f'{mean:.1f}', span(difference), verdict]


def bold_span(difference: Difference | None) -> str:
    """The difference with its interval, bold where it is better or worse; empty where it has not run."""
    if difference is None:
        return ''
    return f'**{span(difference)}**' if difference.verdict in ('better', 'worse') else span(difference)


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


def symbol(metric: str) -> str:
    """`AG` of `average_gain`."""
    return METRICS[metric].rstrip(ARROWS)


def mean_text(values: Table, stream: str, pooling: str, column: str) -> str:
    """Mean of a column under a pooling, over the seeds under CA; empty where it has not run."""
    runs = [values.gap] if pooling == 'gap' else list(values.streams.get(stream, {}).values())
    means = [float(run[column].mean()) for run in runs if run is not None and column in run]
    return f'{sum(means) / len(means):.1f}' if means else ''


def settings_text(recipe: dict[str, Any]) -> str:
    """`epochs 4, lr 0.0001`; a weight decay of 0 is left out."""
    return ', '.join(f'{name} {value}' for name, value in recipe.items() if (name, value) != ('weight_decay', 0.0))


def listed(items: Sequence[str]) -> str:
    """`a, b and c`, or `nothing`."""
    items = list(items)
    return ' and '.join([*filter(None, [', '.join(items[:-1])]), items[-1]]) if items else 'nothing'


def plural(count: int, noun: str) -> str:
    """`1 seed`, `5 seeds`."""
    return f'{count} {noun}' + ('' if count == 1 else 's')


def size_text(values: Table, stream: str = 'gap_start') -> str:
    """`2000 images, 5 seeds`."""
    return f'{values.num_images} images, {plural(len(values.streams[stream]), "seed")}'


def wrap(text: str, width: int = 120) -> str:
    """Lines of at most `width` characters."""
    lines = ['']
    # A line that begins with a minus sign would be a list.
    for word in text.replace(' - ', '\0-\0').split():
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append('')
        lines[-1] = f'{lines[-1]} {word}'.strip()
    return '\n'.join(lines).replace('\0', ' ')
