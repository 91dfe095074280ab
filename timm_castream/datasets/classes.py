"""Classes by name: those of a data set against those of a network, or of another split."""

from __future__ import annotations

import difflib
import logging
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_NUM_SHOWN = 5
_NUM_NEAR = 3

_logger = logging.getLogger(__name__)


def label_names_of(dataset: Any) -> list[str] | None:
    """Names of the classes of a data set in the order of their indices, or None where it has no list of them."""
    names = getattr(dataset, 'classes', None)
    if names and all(isinstance(name, str) for name in names):
        return list(names)
    indices = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) or getattr(dataset, 'class_to_idx', None)
    if not indices or not all(isinstance(name, str) for name in indices):
        return None
    named = {index: name for name, index in reversed(list(indices.items()))}
    return [named.get(index, f'class {index}') for index in range(max(named) + 1)]


def present_classes(dataset: Any) -> list[str] | None:
    """Names of the classes that a data set has images of, as far as that is known, or None where it has no names."""
    return getattr(getattr(dataset, 'reader', None), 'present', None) or label_names_of(dataset)


def same_name(one: str, other: str) -> bool:
    """Whether two names have the same letters, however Unicode writes their accents."""
    return unicodedata.normalize('NFC', one) == unicodedata.normalize('NFC', other)


def match_classes(
    names: Sequence[str], label_names: Sequence[str], owner: str, texts: Mapping[str, str] | None = None
) -> dict[str, int]:
    """The index of each class in a list of names.

    Names are compared letter by letter; a letter with an accent is the same however Unicode writes it.

    Args:
        names: Classes of a data set.
        label_names: All classes that are known, in the order of their indices.
        owner: The data set, for messages.
        texts: From a known class to a text for people, for messages.

    Raises:
        ValueError: A class is not among the known ones.
    """
    texts = texts or {}
    known: dict[str, int] = {}
    for index, name in enumerate(label_names):
        known.setdefault(unicodedata.normalize('NFC', name), index)
    indices = {name: known.get(unicodedata.normalize('NFC', name), -1) for name in names}
    new = [name for name, index in indices.items() if index < 0]
    missing = [name for index, name in enumerate(label_names) if index not in indices.values()]
    if new:
        near = near_classes(new[0], missing, texts)
        many = len(label_names) > _NUM_SHOWN
        shown = f'{len(label_names)}' if near and many else _shown([texts.get(name, name) for name in label_names])
        if len(near) > 1:
            hint = f' Near {new[0]} are {", ".join(map(repr, near))}.'
        else:
            hint = f' Is {new[0]} meant to be {near[0]}?' if near else ''
        raise ValueError(
            f'{owner} has {_counted(new)} that {"is" if len(new) == 1 else "are"} not known: the known classes are '
            f'{shown}.{hint} A class map gives folders their indices.'
        )
    if missing:
        _logger.warning('%s lacks %s; the other classes keep their indices.', owner, _counted(missing))
    order = list(indices.values())
    if not missing and order != sorted(order):  # as many classes: their positions would look right
        _logger.info('%s has its classes in another order; they are matched by name.', owner)
    return indices


def near_classes(name: str, known: Sequence[str], texts: Mapping[str, str]) -> list[str]:
    """Up to three known classes that a name may be meant for: by the words of their texts, then by their letters.

    Args:
        name: An unknown class.
        known: The classes.
        texts: From a class to a text for people, parted by commas.
    """
    spelt: dict[str, str] = {}
    for text in known:
        for part in (text, *texts.get(text, '').split(',')):
            spelt.setdefault(_folded(part), part.strip())
    folded = _folded(name)
    by_word = [part for key, part in spelt.items() if f' {folded} ' in f' {key} ']
    by_letters = [spelt[key] for key in difflib.get_close_matches(folded, spelt, _NUM_NEAR, cutoff=0.7)]
    return list(dict.fromkeys([*by_word, *by_letters]))[:_NUM_NEAR]


def _folded(text: str) -> str:
    return unicodedata.normalize('NFC', text).strip().casefold().replace('_', ' ')


def align_classes(
    dataset: Any, label_names: Sequence[str], owner: str = 'The data set', texts: Mapping[str, str] | None = None
) -> None:
    """Gives the targets of a data set the indices that their classes have in a list of names, in place.

    Args:
        dataset: A data set of timm's, torchvision's or this package. One without a list of classes is left as it is.
        label_names: Names of all classes in the order of their indices, such as those of a network.
        owner: The data set, for messages.
        texts: From a name to a text for people, for messages.

    Raises:
        ValueError: A class is not among the names, or the targets cannot be changed.
    """
    own = label_names_of(dataset)
    if own is None or own == list(label_names):
        return
    reader: Any = getattr(dataset, 'reader', None)
    if getattr(reader, 'present', None):  # of a folder of images
        reader.set_label_names(label_names, texts)
        return
    indices = match_classes(own, label_names, owner, texts)
    table = np.array([indices[name] for name in own])
    if reader is not None and isinstance(getattr(reader, 'targets', None), np.ndarray):  # (N, C), several labels
        targets = np.full((len(reader.targets), len(label_names)), -1, dtype=reader.targets.dtype)
        targets[:, table] = reader.targets
        reader.targets = targets
    elif hasattr(dataset, 'target_transform'):
        dataset.target_transform = _Reindexed(table, dataset.target_transform)
    elif hasattr(dataset, 'labels'):  # of scenes
        dataset.labels = table[dataset.labels]
    else:
        raise ValueError(f'{owner} has its classes in another order than the known ones, and no target_transform.')
    if reader is not None and hasattr(reader, 'class_to_idx'):
        reader.class_to_idx = {name: index for index, name in enumerate(label_names)}
    dataset.classes = list(label_names)


class _Reindexed:
    """A target transform that gives classes other indices."""

    def __init__(self, table: np.ndarray, before: Callable[[Any], Any] | None) -> None:
        self.table = table
        self.before = before

    def __call__(self, target: Any) -> int:
        return int(self.table[int(target if self.before is None else self.before(target))])


def _counted(names: Sequence[str]) -> str:
    return f'the class {names[0]!r}' if len(names) == 1 else f'{len(names)} classes ({_shown(names)})'


def _shown(names: Sequence[str]) -> str:
    return ', '.join(map(repr, names[:_NUM_SHOWN])) + (', ...' if len(names) > _NUM_SHOWN else '')
