"""Messages of the package in the words of a command: where Python has a keyword, a user has typed an option."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping

# Arguments of `attach` that a message advises. A command takes them by --model-kwargs.
_MODEL_KWARGS = ('backbone_checkpoint', 'backbone_pretrained')
_QUOTED = r"""'[^']*'|"[^"]*\""""
_VALUE = rf"""=(?:{_QUOTED}|\[(?:[^]'"]|{_QUOTED})*\]|[\w.+-]*\w|(?=[\s.,;:)]|$))"""
_NOT_A_WORD_BEFORE = r"""(?<![\w./'"=-])"""


class Wording:
    """Says a message with the options of a command. Call it with the message.

    `num_samples` becomes `--num-samples`, `target='predicted'` becomes `--target predicted`. A word that is ordinary
    English, such as `seed`, is taken for the keyword where a value or `must` follows.

    Args:
        parser: The parser of the command.
        phrases: From a phrase of the messages to what a user of the command does instead.
    """

    def __init__(self, parser: argparse.ArgumentParser, phrases: Mapping[str, str] | None = None) -> None:
        self._phrases = dict(phrases or {})
        self._options = {a.dest: max(a.option_strings, key=len) for a in parser._actions if a.option_strings}
        # num_classes in a message is that of the model, and not always what was typed.
        names = [name for name in self._options if name not in ('help', 'debug', 'num_classes')]
        if 'model_kwargs' in names:
            names += [name for name in _MODEL_KWARGS if name not in names]
        alternatives = '|'.join(sorted(names, key=len, reverse=True))
        self._pattern = re.compile(rf'{_NOT_A_WORD_BEFORE}(?P<name>{alternatives})(?!\w)(?P<value>{_VALUE})?')

    def __call__(self, message: str) -> str:
        for phrase, words in self._phrases.items():
            message = message.replace(phrase, words)
        return self._pattern.sub(self._option, message)

    def _option(self, match: re.Match[str]) -> str:
        name, value = match['name'], match['value']
        whole, after = match[0], match.string[match.end() :]
        if name not in self._options:  # of _MODEL_KWARGS
            advised = value is not None or re.search(r'\b(as|pass|use|with) $', match.string[: match.start()])
            return f'--model-kwargs {name}{value or "=FILE"}' if advised else whole
        option = self._options[name]
        if value is None:
            is_keyword = '_' in name or (match.start() == 0 and re.match(r' (must|needs|takes|and \w+_)', after))
            return option if is_keyword else whole
        if value in ('=', '=True'):
            return option
        if value in ('=False', '=None'):
            return f'no {option}'
        return f'{option} {value[2:-1].replace(",", "") if value[1] == "[" else value[1:]}'.replace("'", '')


class Formatter(logging.Formatter):
    """Formats what is logged during a command by its `wording`."""

    def __init__(self, text: str, wording: Wording) -> None:
        super().__init__(text)
        self._wording = wording

    def format(self, record: logging.LogRecord) -> str:
        return self._wording(super().format(record))


def sentence(error: BaseException) -> str:
    """The message of an error in one line; that of the operating system without its number and with the file."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f'{error.filename}: {error.strerror}.'
    return ' '.join(text.split()) or type(error).__name__
