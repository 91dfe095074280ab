"""Fills docs/evidence.md and the README's table from the committed results. The sentences are in `page.md.j2`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2

from timm_castream._utils.files import write_whole
from timm_castream.attribution.methods import METHODS
from timm_castream.metrics import METRICS

from .. import pretrained
from .pieces import METRICS as GROUPS
from .plots import plot_differences, plot_growth
from .results import Difference, Results

MARKS = ('<!-- evidence: written by make evidence -->', '<!-- end of evidence -->')


def write_page(results: Results, page: Path, readme: Path | None = None) -> None:
    """Writes the page with its plots beside it, and the README's table between its marks.

    Args:
        results: The results.
        page: The Markdown file.
        readme: A README with the two `MARKS`, or None.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    differences = [
        (', '.join(filter(None, (method, metric))), found)
        for method, metric, table, column in main_columns()
        if (found := results.tables[table].difference(column))
    ]
    if differences:
        plot_differences(differences, page.with_name(f'{page.stem}_differences.png'))
    plot_growth(results, page.with_name(f'{page.stem}_growth.png'))
    with write_whole(page) as file:
        file.write(render('page.md.j2', results, page.stem) + '\n')
    text = readme.read_text(encoding='utf-8') if readme is not None and readme.is_file() else ''
    if readme is not None and all(mark in text for mark in MARKS):
        before, after = text.partition(MARKS[0])[0], text.partition(MARKS[1])[2]
        with write_whole(readme) as file:
            file.write(f'{before}{MARKS[0]}\n{render("readme.md.j2", results)}\n{MARKS[1]}{after}')


def render(template: str, results: Results, stem: str = 'evidence') -> str:
    """Fills a template of this folder; names of pictures begin with `stem`. A table without rows has not run."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {'span': span, 'signed': signed, 'listed': listed, 'bold': bold}
    made = [facts['made_by'] for facts in (*results.facts.values(), *results.streams.values())]
    text = environment.get_template(template).render(
        results=results,
        settings=results.settings,
        tables=results.tables,
        stem=stem,
        columns=main_columns(),
        methods=METHODS,
        metrics=METRICS,
        masked=GROUPS['masked'],
        changes=changes_of_recipe(results.choices.get('gap_start', {})),
        pretrained=pretrained.table(),
        seconds=sum(facts['seconds'] for facts in (*results.facts.values(), *results.streams.values())),
        machines=sorted({m['machine'] for m in made}),
        versions=sorted({f'torch {m["torch"]}, timm {m["timm"]}, timm_castream {m["timm_castream"]}' for m in made}),
    )
    text = re.sub(r'\|  (?=\|)', '| ', text)
    text = re.sub(r'^\|.*\n\|( --- \|)+\n(?!\|)', 'Not run yet.\n', text, flags=re.MULTILINE)
    return '\n\n'.join(map(wrap, re.split(r'\n\s*\n', text.strip())))


def main_columns() -> list[tuple[str, str, str, str]]:
    """The rows of the main table: titles of method and metric, the table and its column."""
    columns = [('', 'accuracy ↑', 'main', 'accuracy'), ('', 'probability', 'main', 'prob')]
    for method in ('grad_cam', 'grad_cam_pp', 'score_cam'):
        tables = ('score_cam', 'score_cam') if method == 'score_cam' else ('main', 'curves')
        for table, names in zip(tables, (GROUPS['masked'], GROUPS['curves']), strict=True):
            columns += [(METHODS[method].title, METRICS[name].heading, table, f'{method}/{name}') for name in names]
    return columns


def changes_of_recipe(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What one more setting changed beside the recipe that was chosen, by the name of the setting."""
    found = {}
    chosen = next((entry for entry in facts.get('tried', []) if entry['recipe'] == facts.get('taken')), None)
    for entry in facts['tried'] if chosen else []:
        changed = dict(entry['recipe'].items() - chosen['recipe'].items())
        if len(changed) == 1 and not changed.keys() & {'epochs', 'lr'}:
            found[min(changed)] = {
                'recipe': changed,
                **{k: entry[k] - chosen[k] for k in ('accuracy', 'AD', 'AG', 'AI')},
            }
    return dict(sorted(found.items()))


def bold(found: Difference | None) -> str:
    """The difference with its interval, bold where it is better or worse; empty where it has not run."""
    return f'**{span(found)}**' if found and found.verdict in ('better', 'worse') else span(found)


def span(found: Difference | None) -> str:
    """`+7.1 [6.0, 8.2]`; empty where it has not run."""
    if found is None:
        return ''
    value, *ends = found.total
    low, high = (f'{end:.1f}'.replace('-0.0', '0.0') for end in ends)
    return f'{signed(value)} [{low}, {high}]'


def signed(value: float) -> str:
    """`+7.1`, `-0.4`, `0.0`."""
    return re.sub(r'^[+-]0\.0$', '0.0', f'{value:+.1f}')


def listed(items: Iterable[str]) -> str:
    """`a, b and c`, or `nothing`."""
    *most, last = [*items] or ['nothing']
    return f'{", ".join(most)} and {last}' if most else last


def wrap(block: str, width: int = 120) -> str:
    """A paragraph or a list in lines of at most `width` characters; other blocks stay as they are.

    No line begins with a minus sign, which would begin a list.
    """
    if block[0] in '|#<!':
        return block
    options: dict[str, Any] = {'break_long_words': False, 'break_on_hyphens': False}
    return '\n'.join(
        textwrap.fill(
            ' '.join(item.replace(' - ', '\0-\0').split()),
            width,
            subsequent_indent='  ' if item.startswith('- ') else '',
            **options,
        ).replace('\0', ' ')
        for item in re.split(r'\n(?=- )', block)
    )
