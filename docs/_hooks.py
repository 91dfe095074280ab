"""MkDocs hook: writes formulas as MathML, which browsers draw without a script. GitHub draws the same source."""
from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

BLOCK = re.compile(r'^```math\n(.*?)^```$', re.MULTILINE | re.DOTALL)
INLINE = re.compile(r'\$`(.+?)`\$')


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replaces ```` ```math ```` blocks and ``$`...`$``."""
    markdown = BLOCK.sub(lambda match: f'<div class="formula">{convert(match[1].strip(), display="block")}</div>',
                         markdown)
    return INLINE.sub(lambda match: convert(match[1]), markdown)
