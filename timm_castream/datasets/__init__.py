"""The data sets of the paper, Tiny ImageNet and the demo's, for timm and torch, with the boxes of their objects.

`CUB200`, `VOC2012`, `MIT67` and `TinyImageNet` read the layout that each official archive unpacks to; `DigitScenes`
makes its images from what scikit-learn ships. `create_dataset` is timm's function of that name with these five added,
and with folders of images that are read by the rules of `folders`.
"""

from __future__ import annotations

import inspect
import os
import tarfile
from collections.abc import Sequence
from typing import Any

from timm.data import ImageDataset
from timm.data.dataset_factory import create_dataset as timm_create_dataset
from torch.utils.data import Dataset

from .archives import CUB200, MIT67, VOC2012, VOC_IGNORE, IndexedImages, TinyImageNet
from .boxes import boxes_for, has_boxes, input_boxes, read_boxes
from .classes import align_classes, label_names_of, present_classes
from .folders import FolderReader, ImageFiles, split_folder
from .image_files import find_images, image_mode, open_image
from .scenes import DigitScenes, write_image_folder
from .unreadable import SeparatingCollate, Unreadable, image_name, read_batches, without_substitutes

__all__ = [
    'CUB200',
    'MIT67',
    'VOC2012',
    'VOC_IGNORE',
    'DigitScenes',
    'ImageFiles',
    'IndexedImages',
    'SeparatingCollate',
    'TinyImageNet',
    'Unreadable',
    'align_classes',
    'boxes_for',
    'create_dataset',
    'find_images',
    'has_boxes',
    'image_mode',
    'image_name',
    'input_boxes',
    'label_names_of',
    'open_image',
    'present_classes',
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


def create_dataset(
    name: str,
    root: str | os.PathLike | None = None,
    split: str = 'validation',
    *args: Any,
    label_names: Sequence[str] | None = None,
    **kwargs: Any,
) -> Dataset:
    """Makes a data set by name: `timm.data.create_dataset`, which also knows the data sets of this module.

    Image files are opened by `open_image`. A folder of images is read by the rules of `folders`: its classes are the
    first folders below that of the split, and a split that lacks a class of the training split keeps the indices of the
    others.

    Args:
        name: cub200, voc2012, mit67, tiny_imagenet or digits; a name of timm's, torch/NAME, hfds/NAME, hfids/NAME,
            tfds/NAME or wds/NAME; or an empty name for a folder of images, a subfolder a class.
        root: Where the official archive was unpacked, or the folder of images; digits has none.
        split: See `splits` of the classes; timm's words train and validation fit all. A folder of images is read in
            its subfolder of that name, where it has such subfolders.
        *args: As timm's.
        label_names: Names of a network's classes in the order of its indices. Targets become these indices, by name.
        **kwargs: As timm's. Of these the data sets of this module take `input_img_mode`, and the data set's own
            arguments; digits also takes `num_samples` and `seed`. Hints for iterable data sets change nothing.

    Raises:
        FileNotFoundError: The folder of images is missing.
        ValueError: The name or the split is unknown, a root is missing or in excess, a class is not in `label_names` or
            in the training split, or a data set of this module is asked for `class_map`, `load_bytes` or `download`.
    """
    call = inspect.signature(timm_create_dataset).bind(name, root, split, *args, **kwargs)
    call.apply_defaults()
    options = call.arguments
    if not name:
        return _image_folder(options, label_names)
    dataset: Any
    if name in _ARCHIVES or name == 'digits':
        dataset = _own_dataset(options)
    else:
        prefix, slash, _ = name.partition('/')
        if not slash or prefix.lower() not in _TIMM_PREFIXES:
            raise ValueError(
                f'there is no data set {name!r}; known are {", ".join((*_ARCHIVES, "digits"))}, the names of timm that '
                f'begin with {", ".join(f"{known}/" for known in _TIMM_PREFIXES)}, and no name for a folder of images'
            )
        dataset = _opened_by_us(timm_create_dataset(name, root, split, *args, **kwargs))  # type: ignore[arg-type]
    if label_names is not None:
        align_classes(dataset, label_names, f'The data set {name}')
    return dataset


def count_classes(dataset: Any) -> int | None:
    """Number of classes of a data set, or None where it has no list of them."""
    names = getattr(dataset, 'classes', None) or getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
    return len(names) if names else None


def _own_dataset(options: dict[str, Any]) -> Dataset:
    """A data set of this module."""
    name, root, split = options['name'], options['root'], options['split']
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


def _image_folder(options: dict[str, Any], label_names: Sequence[str] | None) -> Dataset:
    root = options['root']
    if not root:
        raise ValueError('a folder of images needs its path (--data-dir); name a data set to read another kind')
    kwargs = {key: value for key, value in options['kwargs'].items() if value is not None}
    kwargs |= {key: options[key] for key in ('load_bytes', 'input_img_mode')}
    if os.path.isfile(root):  # an archive of images, which timm reads
        if not tarfile.is_tarfile(root):
            raise ValueError(f'{root} is no folder and no tar archive of images: unpack it, or name a folder.')
        try:
            dataset = _opened_by_us(timm_create_dataset('', root, class_map=options['class_map'], **kwargs))
        except (RuntimeError, ValueError):  # of timm, for an archive without images
            raise ValueError(
                f'The archive {root} has no images of the kinds .png, .jpg and .jpeg: unpack it, and name the folder.'
            ) from None
        if label_names is not None:
            align_classes(dataset, label_names, f'The file {root}')
        return dataset
    folder = split_folder(root, options['split'] if options['search_split'] else '')
    endings = kwargs.pop('input_key', None)
    kwargs.pop('target_key', None)
    reader = FolderReader(folder, options['class_map'], label_names, endings.split(';') if endings else None)
    return ImageFiles(str(folder), reader=reader, **kwargs)


def _opened_by_us(dataset: Any) -> Any:
    """A data set of timm's or torchvision's whose image files are opened by `open_image`."""
    if type(dataset) is ImageDataset:
        dataset.__class__ = ImageFiles  # it adds no state
    elif hasattr(dataset, 'loader') and hasattr(dataset, 'samples'):  # torchvision's folders
        dataset.loader = open_image
    return dataset
