"""MkDocs hook: writes formulas as MathML, which browsers draw without a script. GitHub draws the same source."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

BLOCK = re.compile(r'^( *)```math\n(.*?)^ *```$', re.MULTILINE | re.DOTALL)
INLINE = re.compile(r'\$`(.+?)`\$')


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replaces ```` ```math ```` blocks and ``$`...`$``."""

    def block(match: re.Match[str]) -> str:
        return f'{match[1]}<div class="formula">{convert(match[2].strip(), display="block")}</div>'

    # A line that begins with <math> would be a block of its own in Markdown.
    return INLINE.sub(lambda match: f'<span>{convert(match[1])}</span>', BLOCK.sub(block, markdown))
