"""Names of a model's classes.

They lie where timm keeps them, in `pretrained_cfg['label_names']` with texts in `['label_descriptions']`, and travel in
checkpoints (`args.label_names`) and in config.json. An empty list stands for weights whose classes have no known names.
ImageNet's names are given to ImageNet's weights alone, whatever the number of classes.
"""

from __future__ import annotations

import difflib
import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from .._utils.files import counted

_IMAGENET_TAG = re.compile(r'(^|_)in(1k|12k|21k|22k)($|_)')
_WORDNET_ID = re.compile(r'n\d{8}')
_MAX_SHOWN = 5

_logger = logging.getLogger(__name__)


def label_names(model: Any) -> list[str] | None:
    """Names of the classes in the order of their indices, or None where they are not known.

    A model that `timm.create_model` made without naming a number of classes is taken to have the weights of its tag.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    num_classes = getattr(model, 'num_classes', None)
    names = cfg.get('label_names')
    if names is None:
        asked = (getattr(model, '_model_args', None) or {}).get('num_classes')
        known = asked is None and _is_imagenet({**cfg, 'tag': _tag(model)}, num_classes)
        return imagenet_names(model) if known else None
    if isinstance(names, Mapping):  # keys of a mapping that went through JSON are strings
        by_index = {int(index): str(name) for index, name in names.items()}
        names = [by_index.get(index, f'class {index}') for index in range(max(num_classes or 0, *by_index, 0))]
    return [str(name) for name in names] if names and len(names) in _numbers_of_names(num_classes) else None


def _numbers_of_names(num_classes: int | None) -> tuple[int | None, ...]:
    """How many names the classes may have: one logit is one label, or the two classes 0 (no) and 1 (yes)."""
    return (1, 2) if num_classes == 1 else (num_classes,)


def set_label_names(model: Any, names: Sequence[str], descriptions: Mapping[str, str] | None = None) -> None:
    """Gives a model the names of its classes.

    Args:
        model: A timm model.
        names: In the order of their indices. Fewer than the model has classes are filled up; none says that the names
            are not known.
        descriptions: From a name to a text for people. None: WordNet's for its ids.
    """
    filled = [*names, *(f'class {index}' for index in range(len(names), model.num_classes or 0))] if names else []
    if descriptions is None:
        descriptions = _wordnet_texts(names)
    cfg = dict(model.pretrained_cfg)
    cfg['label_names'] = filled
    cfg.pop('label_descriptions', None)
    if descriptions:
        cfg['label_descriptions'] = dict(descriptions)
    model.pretrained_cfg = model.default_cfg = cfg


def give_names(model: Any, source: str | Path) -> None:
    """Gives a model the names in a file, one class a line in the order of the indices, or those of ImageNet.

    Args:
        model: A timm model.
        source: A file in UTF-8, or `'imagenet'` for the ImageNet with as many classes as the model has.

    Raises:
        ValueError: There are other numbers of names and classes, or a name is repeated.
        FileNotFoundError: There is no such file.
    """
    if str(source).casefold() == 'imagenet' and not Path(source).is_file():
        names = imagenet_names(model)
        if names is None:
            raise ValueError(f'There is no ImageNet of {model.num_classes} classes: name a file with the names.')
    elif not Path(source).is_file():
        raise FileNotFoundError(f"There is no file {source} with names of classes; 'imagenet' gives those of ImageNet.")
    else:
        names = [line.strip() for line in Path(source).read_text(encoding='utf-8').splitlines() if line.strip()]
    if len(names) not in _numbers_of_names(model.num_classes):
        classes = (
            'one logit: two classes, 0 (no) and 1 (yes)' if model.num_classes == 1 else f'{model.num_classes} classes'
        )
        raise ValueError(f'{source} has {counted(len(names), "name")}, the model has {classes}.')
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f'{source} has the name {repeated!r} twice.')
    set_label_names(model, names)


def name_imagenet_classes(model: Any) -> None:
    """Gives a model with published weights the names of ImageNet's classes, where its tag says that they are those."""
    if model.pretrained_cfg.get('label_names') is not None:
        return
    cfg = {**model.pretrained_cfg, 'tag': _tag(model)}
    names = imagenet_names(model) if _is_imagenet(cfg, model.num_classes) else None
    if names:
        set_label_names(model, names)
    else:
        forget_classes(model)


def forget_classes(model: Any) -> None:
    """Weights without names of classes: those that the model's cfg suggests belong to other weights."""
    if label_names(model) is not None:
        set_label_names(model, ())


def imagenet_names(model: Any) -> list[str] | None:
    """WordNet ids of the ImageNet with as many classes as the model has, or None where there is none."""
    subset = infer_imagenet_subset(model)
    return list(_imagenet(subset).label_names()) if subset else None


def known_names(model: Any, classes: Sequence[str]) -> list[str] | None:
    """The names of a model's classes, spelt as a data set spells them.

    A data set may name a class by its description, or by a part of it between commas: `goldfish` is n01443537. The
    classes of a model without names are compared with ImageNet's, if it has as many and all classes of the data set are
    WordNet ids of it.

    Args:
        model: The model.
        classes: Names of the data set's classes.

    Returns:
        The names in the order of their indices, or None where they cannot be compared.
    """
    names = label_names(model)
    if names is None:
        ids = imagenet_names(model)
        if not ids or not set(classes) <= set(ids):
            return None
        if list(classes) != ids:
            _logger.warning('The classes are WordNet ids: they have the indices of ImageNet, as the model has them.')
        return ids
    known = {unicodedata.normalize('NFC', name) for name in names}
    strange = [name for name in classes if unicodedata.normalize('NFC', name) not in known]
    if strange:
        indices = _by_text([class_name(model, index) for index in range(len(names))])
        found = {name: indices[key] for name in strange if (key := _folded(name)) in indices}
        if len(strange) == len(classes) == len(names) and not found and names == imagenet_names(model):
            _logger.warning(
                'The classes, such as %r, are not named as ImageNet names them; as many as they are, they are taken in '
                'their order.',
                strange[0],
            )
            return None
        for name, index in found.items():
            names[index] = name
    return names


def class_name(model: nn.Module, index: int) -> str:
    """A class by its name, or `class INDEX` where the model does not know it."""
    names = label_names(model)
    if not names or not 0 <= index < len(names):
        return f'class {index}'
    name = names[index]
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    return (cfg.get('label_descriptions') or {}).get(name) or _wordnet_texts([name]).get(name) or name


def label_texts(model: nn.Module) -> dict[str, str]:
    """{name of a class: its text for people}, of the classes that have one."""
    names = label_names(model) or []
    texts = {name: class_name(model, index) for index, name in enumerate(names)}
    return {name: text for name, text in texts.items() if text != name}


def class_index(model: nn.Module, word: str | int, num_classes: int | None = None) -> int:
    """The index of a class from its name, a word of its description, or the number itself.

    A name precedes a number of the same letters.

    Args:
        model: The model.
        word: A name or a number.
        num_classes: Where the model has other classes than outputs: two for one logit.

    Raises:
        ValueError: There is no such class, or there are several.
    """
    num_classes = num_classes or getattr(model, 'num_classes', None) or 0
    names = label_names(model) or []
    word = unicodedata.normalize('NFC', str(word))
    found = [index for index, name in enumerate(names) if unicodedata.normalize('NFC', name) == word]
    if not found and re.fullmatch(r'\d+', word):
        if int(word) >= num_classes:
            raise ValueError(f'Class {word} is out of range: the model has the classes 0 to {num_classes - 1}.')
        return int(word)
    texts = [class_name(model, index) for index in range(len(names))]
    if not found:
        folded = _folded(word)
        found = [index for index, text in enumerate(texts) if _folded(text) == folded]
        found = found or [
            index
            for index, (name, text) in enumerate(zip(names, texts, strict=True))
            if folded in map(_folded, (name, *text.split(',')))
        ]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f'{word!r} are several classes: {_shown([f"{index} ({texts[index]})" for index in found])}.')
    if not names:
        raise ValueError(
            f'There is no class {word!r}: the classes of this model have no names, valid ones are 0 to {num_classes - 1}.'
        )
    parts = [part.strip() for text in texts for part in text.split(',')]
    near = difflib.get_close_matches(word, list(dict.fromkeys([*names, *parts])), _MAX_SHOWN) or texts
    raise ValueError(f'There is no class {word!r}; there are {_shown(near)}.')


def _by_text(texts: Sequence[str]) -> dict[str, int]:
    """From a description, or a part of it between commas, to its index, where it stands for one class alone."""
    indices: dict[str, set[int]] = defaultdict(set)
    for index, text in enumerate(texts):
        for part in {text, *text.split(',')}:
            indices[_folded(part)].add(index)
    return {part: min(found) for part, found in indices.items() if len(found) == 1}


def _folded(text: str) -> str:
    return unicodedata.normalize('NFC', text).strip().casefold().replace('_', ' ')


def _tag(model: Any) -> str:
    """The tag of the weights of the classifier: a model with a stream keeps that of its backbone."""
    cfgs = (getattr(model, 'pretrained_cfg', None) or {}, getattr(model, 'backbone_cfg', None) or {})
    return next((cfg['tag'] for cfg in cfgs if cfg.get('tag')), '')


def _is_imagenet(cfg: Mapping[str, Any], num_classes: int | None) -> bool:
    return bool(_IMAGENET_TAG.search(cfg.get('tag') or '')) and cfg.get('num_classes') == num_classes


def _wordnet_texts(names: Sequence[str]) -> dict[str, str]:
    """Texts of the names that are WordNet ids of the largest ImageNet."""
    missing = {name for name in names if _WORDNET_ID.fullmatch(name)}
    texts: dict[str, str] = {}
    for subset in (
        'imagenet-1k',
        'imagenet-22k',
    ):  # one class of the smaller is not in the larger, which is slow to read
        if missing:
            info = _imagenet(subset)
            texts |= {name: info.label_name_to_description(name) for name in missing.intersection(info.label_names())}
            missing -= texts.keys()
    return texts


@cache
def _imagenet(subset: str) -> ImageNetInfo:
    return ImageNetInfo(subset)  # reads files


def _shown(texts: Sequence[str]) -> str:
    return ', '.join(texts[:_MAX_SHOWN]) + (', ...' if len(texts) > _MAX_SHOWN else '')
