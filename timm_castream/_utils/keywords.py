"""`KEY=VALUE` words as keyword arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any


def read_keywords(words: Iterable[str]) -> dict[str, Any]:
    """Reads `key=value` words: Python literals, or else strings.

    Raises:
        ValueError: If a word has no `=`.
    """
    kwargs = {}
    for word in filter(None, words):
        key, equals, value = word.partition('=')
        if not equals:
            raise ValueError(f'takes KEY=VALUE, not {word}')
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[key] = value
    return kwargs
