"""`KEY=VALUE` words as keyword arguments."""

from __future__ import annotations

import ast
from argparse import Action, ArgumentError, ArgumentParser, Namespace
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


class ParseKwargs(Action):
    """Reads `key=value` words of an option: Python literals, or else strings.

    timm's own ParseKwargs ends in a traceback where `=` is missing.
    """

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        try:
            kwargs = read_keywords(values)
        except ValueError as error:
            raise ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, kwargs)
