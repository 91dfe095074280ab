"""Read the text files and XML files that list images, labels and boxes, and find the split that a word means."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

_Key = TypeVar('_Key')


def read_rows(path: Path, *types: Callable[[str], Any], separator: str | None = None) -> Iterator[tuple]:
    """The rows of a text file, converted column by column. Empty lines are left out.

    Args:
        path: A file in UTF-8, with a byte-order mark or without.
        *types: From the text of each column to its value; a ValueError refuses the row. Without a separator the last
            column may hold spaces.
        separator: What divides the columns; by default spaces and tabs. The first column may hold it.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: A row is not of this form. The message names the file and the line.
    """
    return (row for _, row in _numbered_rows(path, types, separator))


def read_table(path: Path, key: Callable[[str], _Key], *types: Callable[[str], Any]) -> dict[_Key, Any]:
    """The rows of a text file as a mapping from the first column to the second one, or to a tuple of the others.

    Args, Raises: as `read_rows`. A key that occurs twice is a ValueError too.
    """
    table: dict[_Key, Any] = {}
    for line, (first, *others) in _numbered_rows(path, (key, *types)):
        if first in table:
            raise ValueError(f'{path}, line {line}: {first} is listed a second time')
        table[first] = others[0] if len(others) == 1 else tuple(others)
    return table


def read_xml_boxes(path: Path) -> list[tuple[str, tuple[float, float, float, float]]]:
    """The objects of an XML file of Pascal VOC or ImageNet: name, and xmin, ymin, xmax and ymax as they stand there.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is damaged. The message names it.
    """
    try:
        annotation = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise FileNotFoundError(f'{path} is missing') from None
    except ElementTree.ParseError as error:
        raise ValueError(f'{path} is no XML: {error}') from None
    objects = []
    for element in annotation.iter('object'):
        name = element.findtext('name', '').strip()
        texts = [element.findtext(f'bndbox/{corner}', '') for corner in ('xmin', 'ymin', 'xmax', 'ymax')]
        try:
            x0, y0, x1, y1 = map(number, texts)
        except ValueError:
            raise ValueError(f'{path}: the box of object {name!r} is {", ".join(texts)}, not four numbers') from None
        if x1 < x0 or y1 < y0:
            raise ValueError(f'{path}: the box of object {name!r} ends before it begins: {", ".join(texts)}')
        objects.append((name, (x0, y0, x1, y1)))
    return objects


def number(text: str) -> float:
    """A finite number of a text file, or a ValueError."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f'{text!r} is not finite')
    return value


def positive(text: str) -> float:
    """A finite number above 0, or a ValueError."""
    value = number(text)
    if value <= 0:
        raise ValueError(f'{text!r} is not positive')
    return value


def official_split(name: str, splits: Sequence[str], split: str) -> str:
    """The split that is meant: one of the data set's own, or another word of timm's for the first two.

    Raises:
        ValueError: There is no such split of the data set of that name.
    """
    training, evaluation = splits[:2]
    words = dict.fromkeys(('val', 'valid', 'validation', 'eval', 'evaluation'), evaluation) | {'training': training}
    words |= {own: own for own in splits}
    if split not in words:
        raise ValueError(f'{split!r} is no split of {name}, which has {", ".join(splits)}')
    return words[split]


def _numbered_rows(
    path: Path, types: Sequence[Callable[[str], Any]], separator: str | None = None
) -> Iterator[tuple[int, tuple]]:
    try:
        lines = path.read_text(encoding='utf-8-sig', errors='surrogateescape').splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f'{path} is missing') from None
    for line_number, line in enumerate(map(str.strip, lines), start=1):
        if not line:
            continue
        split = line.split if separator is None else line.rsplit
        values = split(separator, len(types) - 1)
        try:
            yield line_number, tuple(convert(value) for convert, value in zip(types, values, strict=True))
        except ValueError:
            expected = ', '.join(convert.__name__ for convert in types)
            raise ValueError(f'{path}, line {line_number}: {line!r} is not of the form {expected}') from None
