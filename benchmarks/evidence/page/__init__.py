"""Writes docs/evidence.md, its plots and the README's table from the committed results. No figure is typed in."""

from __future__ import annotations

import re
from pathlib import Path

from timm_castream._utils.files import write_whole

from ..results import Results
from .answer import advice, answer, augmentation_advice, question
from .cells import cells, section, table, wrap
from .main_table import baseline_section, main_rows, main_section, temperature_section
from .map_tables import localisation_section, unseen_section
from .plots import growth_points, plot_differences, plot_growth
from .record import choice_section, commands_section, limits_section, missing_section, strip_section
from .stream_tables import last_stage_section, product_section, size_section, start_section, variant_section

MARKS = ('<!-- evidence: written by make evidence -->', '<!-- end of evidence -->')


def write_page(results: Results, page: Path, readme: Path | None = None) -> None:
    """Writes the page with its plots beside it, and the README's table between its marks.

    Args:
        results: The results.
        page: The Markdown file.
        readme: A README with the two `MARKS`, or None.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    rows = main_rows(results)
    if rows:
        plot_differences(
            [(', '.join(filter(None, (method, metric))), difference) for method, metric, _, difference in rows],
            page.with_name(f'{page.stem}_differences.png'),
        )
    if growth_points(results, 'gap_start'):
        plot_growth(results, page.with_name(f'{page.stem}_growth.png'))
    with write_whole(page) as file:
        file.write(page_text(results, page.stem))
    if readme is not None and readme.is_file():
        text = readme.read_text(encoding='utf-8')
        if all(mark in text for mark in MARKS):
            pattern = re.escape(MARKS[0]) + '.*' + re.escape(MARKS[1])
            written = f'{MARKS[0]}\n{readme_text(results)}\n{MARKS[1]}'
            with write_whole(readme) as file:
                file.write(re.sub(pattern, lambda match: written, text, flags=re.DOTALL))


def page_text(results: Results, stem: str = 'evidence') -> str:
    """The page.

    Args:
        results: The results.
        stem: The page's name, with which the pictures' names begin.
    """
    plot = f'![CA - GAP of every main figure, with the interval of every seed]({stem}_differences.png)'
    opening = f"""# Does it work?

<!-- Written by `python -m benchmarks.evidence --steps page` from benchmarks/evidence_results. Do not edit. -->

{question(results.settings)}
"""
    first = section(
        'The answer',
        answer(results),
        '**Better** and **worse** need the 95 % interval of the paired difference on one side of 0 in every seed.\n'
        'Everything else is "no difference seen".',
        advice(results),
        plot if main_rows(results) else '',
    )
    sections = [
        opening,
        first,
        missing_section(results),
        main_section(results),
        temperature_section(results),
        baseline_section(results),
        localisation_section(results),
        strip_section(results, stem),
        unseen_section(results, results.strip(), stem),
        start_section(results, stem),
        variant_section(results),
        last_stage_section(results),
        size_section(results),
        product_section(results),
        choice_section(results),
        limits_section(),
        commands_section(results),
    ]
    return '\n'.join(filter(None, sections))


def readme_text(results: Results) -> str:
    """The README's part: the answer, the main figures, and what augmentation did."""
    rows = [
        [
            ', '.join(filter(None, (method, metric))),
            *cells(difference),
            str(len(difference.values)),
            str(source.num_images),
        ]
        for method, metric, source, difference in main_rows(results)
    ]
    blocks = [
        answer(results),
        table(['', 'GAP', 'CA', 'CA - GAP', '', 'seeds', 'images'], rows),
        wrap(augmentation_advice(results)),
    ]
    return '\n\n'.join(filter(None, blocks))
