"""The data sets of the paper, Tiny ImageNet and the demo's, for timm and torch, with the boxes of their objects.

`CUB200`, `VOC2012`, `MIT67` and `TinyImageNet` read the layout that each official archive unpacks to; `DigitScenes`
makes its images from what scikit-learn ships. `create_dataset` is timm's function of that name with these five added.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from timm.data.dataset_factory import create_dataset as timm_create_dataset
from torch.utils.data import Dataset

from .archives import CUB200, MIT67, VOC2012, VOC_IGNORE, IndexedImages, TinyImageNet
from .boxes import boxes_for, has_boxes, input_boxes, read_boxes
from .scenes import DigitScenes, write_image_folder
from .unreadable import SeparatingCollate, Unreadable, image_name, read_batches, without_substitutes

__all__ = [
    'CUB200',
    'MIT67',
    'VOC2012',
    'VOC_IGNORE',
    'DigitScenes',
    'IndexedImages',
    'SeparatingCollate',
    'TinyImageNet',
    'Unreadable',
    'boxes_for',
    'create_dataset',
    'has_boxes',
    'image_name',
    'input_boxes',
    'read_batches',
    'read_boxes',
    'without_substitutes',
    'write_image_folder',
]

_ARCHIVES: dict[str, type[IndexedImages]] = {
    'cub200': CUB200,
    'voc2012': VOC2012,
    'mit67': MIT67,
    'tiny_imagenet': TinyImageNet,
}
_TIMM_PREFIXES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
_TRAINING_WORDS = ('train', 'training')
_EVALUATION_WORDS = ('val', 'valid', 'validation', 'eval', 'evaluation')


def create_dataset(name: str, root: str | None = None, split: str = 'validation', *args: Any, **kwargs: Any) -> Dataset:
    """Makes a data set by name: `timm.data.create_dataset`, which also knows the data sets of this module.

    Args:
        name: cub200, voc2012, mit67, tiny_imagenet or digits; a name of timm's, torch/NAME, hfds/NAME, hfids/NAME,
            tfds/NAME or wds/NAME; or an empty name for a folder of images, a subfolder a class.
        root: Where the official archive was unpacked, or the folder of images; digits has none.
        split: See `splits` of the classes; timm's words train and validation fit all. A folder of images is read in
            its subfolder of that name, where it has such subfolders.
        *args: As timm's.
        **kwargs: As timm's. Of these the data sets of this module take `input_img_mode`, and the data set's own
            arguments; digits also takes `num_samples` and `seed`. Hints for iterable data sets change nothing.

    Raises:
        FileNotFoundError: The folder of images is missing.
        ValueError: The name or the split is unknown, a root is missing or in excess, or a data set of this module is
            asked for `class_map`, `load_bytes` or `download`.
    """
    call = inspect.signature(timm_create_dataset).bind(name, root, split, *args, **kwargs)
    call.apply_defaults()
    options = call.arguments
    if name not in _ARCHIVES and name != 'digits':
        prefix, slash, _ = name.partition('/')
        if name and not (slash and prefix.lower() in _TIMM_PREFIXES):
            raise ValueError(
                f'there is no data set {name!r}; known are {", ".join((*_ARCHIVES, "digits"))}, the names of timm that '
                f'begin with {", ".join(f"{known}/" for known in _TIMM_PREFIXES)}, and no name for a folder of images'
            )
        if not name:
            _check_folder(root, split, options['search_split'])
        return timm_create_dataset(name, root, split, *args, **kwargs)
    for option in ('class_map', 'load_bytes', 'download'):
        if options[option]:
            raise ValueError(f'data set {name} does not support {option}={options[option]!r}')
    own = {key: value for key, value in options['kwargs'].items() if value is not None}  # as timm: unset options
    own['input_img_mode'] = options['input_img_mode']
    if name == 'digits':
        if root:
            raise ValueError(f'data set digits is made, not read: leave out {root}, or the name for an image folder')
        return DigitScenes(split, num_images=options['num_samples'], seed=options['seed'], **own)
    if not root:
        raise ValueError(f'data set {name} needs the folder that its archive was unpacked to')
    return _ARCHIVES[name](root, split, **own)


def count_classes(dataset: Any) -> int | None:
    """Number of classes of a data set, or None where it has no list of them."""
    names = getattr(dataset, 'classes', None) or getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
    return len(names) if names else None


def _check_folder(root: str | os.PathLike | None, split: str, search_split: bool) -> None:
    """Refuses a folder of images that timm would read whole for want of the split's subfolder."""
    if not root:
        raise ValueError('a folder of images needs its path; name a data set to read another kind')
    if not os.path.exists(root):
        raise FileNotFoundError(f'there is no folder {root}')
    if not search_split or not os.path.isdir(root):
        return
    word = split.partition('[')[0]  # as timm reads it
    words = next((known for known in (_TRAINING_WORDS, _EVALUATION_WORDS) if word in known), (word,))
    if any(os.path.exists(os.path.join(root, known)) for known in words):
        return
    # A split has a subfolder a class. A class may have the name of a split, and holds images alone.
    all_words = (*_TRAINING_WORDS, *_EVALUATION_WORDS, 'test')
    folders = [folder for folder in map(Path(root).joinpath, all_words) if folder.is_dir()]
    splits = [folder.name for folder in folders if any(entry.is_dir() for entry in folder.iterdir())]
    if splits:
        raise ValueError(f'{root} has no split {split!r}, it has {", ".join(splits)}')
    if word not in all_words:
        raise ValueError(
            f'{root} has no split {split!r}; with train or validation it is read whole, since it has no splits'
        )
