"""MkDocs hooks: formulas become MathML, which browsers draw without a script, and CSV files become tables with a filter.

GitHub draws both sources by itself.
"""

from __future__ import annotations

import csv
import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

BLOCK = re.compile(r'^( *)```math\n(.*?)^ *```$', re.MULTILINE | re.DOTALL)
INLINE = re.compile(r'\$`(.+?)`\$')
TABLE = re.compile(r'^<!-- table: ([\w.]+) -->$', re.MULTILINE)
FILTER = (
    "for (const row of document.querySelectorAll('#filtered tbody tr'))"
    ' row.hidden = !row.textContent.includes(this.value.trim().toLowerCase())'
)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replaces ```` ```math ```` blocks, ``$`...`$`` and `<!-- table: FILE.csv -->`."""

    def block(match: re.Match[str]) -> str:
        return f'{match[1]}<div class="formula">{convert(match[2].strip(), display="block")}</div>'

    markdown = TABLE.sub(lambda match: filtered_table(Path(__file__).with_name(match[1])), markdown)
    # A line that begins with <math> would be a block of its own in Markdown.
    return INLINE.sub(lambda match: f'<span>{convert(match[1])}</span>', BLOCK.sub(block, markdown))


def filtered_table(path: Path) -> str:
    """A CSV file as an HTML table, under a field that hides the rows without its text."""
    with path.open(encoding='utf-8', newline='') as file:
        head, *rows = csv.reader(file)
    cells = [''.join(f'<td>{html.escape(cell)}</td>' for cell in row) for row in rows]
    body = ''.join(f'<tr>{row}</tr>' for row in cells)
    head = ''.join(f'<th>{html.escape(name)}</th>' for name in head)
    return (
        f'<input type="search" placeholder="a part of a name" aria-label="Filter" oninput="{FILTER}">\n'
        f'<table id="filtered"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    )
