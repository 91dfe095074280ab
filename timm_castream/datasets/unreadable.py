"""Data sets whose unreadable images are named, where timm's data sets put another image in their place."""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from timm.data import ImageDataset
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from .folders import NO_TARGET, ImageFiles, read_item

# Keys of items that are mappings, the first that is there.
_IMAGE_KEYS = ('pixel_values', 'image', 'img')
_LABEL_KEYS = ('labels', 'label', 'target')


@dataclass(frozen=True)
class Unreadable:
    """An item that could not be read, in place of its image and target.

    Attributes:
        index: Of the item in the data set.
        name: Of its file, as `image_name` gives it.
        reason: The error, one sentence.
    """

    index: int
    name: str
    reason: str


def image_and_label(item: Any) -> tuple[Any, Any]:
    """The image and the label, or None for no label, of an item of a data set or of a batch.

    Args:
        item: (image, label, ...), (image,), an image alone, or a mapping: `pixel_values`, `image` or `img`, and
            `labels`, `label` or `target`.

    Raises:
        ValueError: A mapping without an image.
    """
    if isinstance(item, Mapping):
        keys = [key for key in _IMAGE_KEYS if key in item]
        if not keys:
            raise ValueError(
                f'The data set gives a {type(item).__name__} of {", ".join(map(str, item))} for an image, and the key '
                f'of an image is one of {", ".join(_IMAGE_KEYS)}.'
            )
        return item[keys[0]], next((item[key] for key in _LABEL_KEYS if key in item), None)
    if isinstance(item, (tuple, list)):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def without_substitutes(dataset: Dataset) -> Dataset:
    """A data set of the same items in which one that cannot be read is an `Unreadable`, never another item.

    timm's `ImageDataset` gives the next image with its label in place of an image that cannot be read, and fails where
    many in a row cannot be read. Other data sets raise. The result gives an `Unreadable` for each such image. It opens
    the images of timm's data sets by `open_image`.

    The result has the attributes of the data set, such as `classes` and `boxes`. An attribute that is set, such as the
    `transform` by timm's `create_loader`, changes the result alone. It can be pickled if the data set can.

    Args:
        dataset: A data set with indices, timm's, torchvision's or another one, or a `Subset` of it. An iterable data
            set comes back as it is, since its items have no indices.
    """
    if isinstance(dataset, (IterableDataset, WithoutSubstitutes)):
        return dataset
    return WithoutSubstitutes(copy.copy(dataset))


class SeparatingCollate:
    """Collates the readable items of a batch and hands on the others.

    Args:
        collate_fn: Makes a batch of items: timm's `fast_collate`, torch's `default_collate` or the like.
        ignores_labels: Whether every item gets the label `folders.NO_TARGET`. One whose label is None gets it in any
            case.

    Returns:
        When called with a list of items: what `collate_fn` makes of the readable ones, or None if there are none, and
        the list of the `Unreadable` ones. For images of different sizes the batch is a ValueError, which the reader raises:
        an exception that a worker raises has a traceback for its message.
    """

    def __init__(self, collate_fn: Callable[[list], Any], ignores_labels: bool = False) -> None:
        self.collate_fn = collate_fn
        self.ignores_labels = ignores_labels

    def __call__(self, items: list) -> tuple[Any, list[Unreadable]]:
        readable = [self._labelled(item) for item in items if not isinstance(item, Unreadable)]
        unreadable = [item for item in items if isinstance(item, Unreadable)]
        try:
            return self.collate_fn(readable) if readable else None, unreadable
        except (RuntimeError, ValueError):
            sizes = dict.fromkeys(tuple(np.shape(image_and_label(item)[0])) for item in readable)
            if len(sizes) == 1:
                raise
            return _sizes_differ(list(sizes)), unreadable

    def _labelled(self, item: Any) -> Any:
        """The item, with a label that can be collated where it has none or none that counts."""
        if isinstance(item, Mapping):
            labels = {
                key: NO_TARGET for key in _LABEL_KEYS if key in item and (self.ignores_labels or item[key] is None)
            }
            return {**item, **labels} if labels else item
        if isinstance(item, (tuple, list)) and len(item) > 1 and (self.ignores_labels or item[1] is None):
            return item[0], NO_TARGET
        return item


def _sizes_differ(sizes: Sequence[tuple[int, ...]]) -> ValueError:
    shown = ' and '.join(' x '.join(map(str, size)) for size in sizes[:2])
    return ValueError(
        f'The data set gives images of different sizes, such as {shown}, and those of a batch need one size: '
        'resize or crop them in its transform, as timm.data.create_transform does, or make the loader with batch_size=1.'
    )


def read_batches(
    loader: Any, batches: Sequence[Sequence[int]], ignores_labels: bool = False
) -> Iterator[tuple[list[int], Any, Any, list[Unreadable]]]:
    """Reads chosen items of a loader's data set as the loader reads its own, without substitutes.

    Args:
        loader: A `DataLoader`, or timm's `PrefetchLoader` around one. It is left as it is.
        batches: The indices of the items of each batch.
        ignores_labels: Whether all targets are `folders.NO_TARGET`, whatever the items have.

    Returns:
        An iterator with an element a batch: the indices of its readable items, their inputs, their targets (both None
        if no item is readable), and the unreadable items. Items without a label, see `image_and_label`, have the target
        `folders.NO_TARGET`.
    """
    inner = getattr(loader, 'loader', loader)  # timm's PrefetchLoader is around a DataLoader
    reader = DataLoader(
        without_substitutes(inner.dataset),
        batch_sampler=[list(indices) for indices in batches],
        num_workers=inner.num_workers,
        collate_fn=SeparatingCollate(inner.collate_fn, ignores_labels),
        pin_memory=inner.pin_memory,
        timeout=inner.timeout,
        worker_init_fn=inner.worker_init_fn,
        multiprocessing_context=inner.multiprocessing_context,
    )
    done: deque[tuple[bool, list[Unreadable]]] = deque()  # batches that are read and not yet given on

    def readable() -> Iterator[Any]:
        for batch, unreadable in reader:
            if isinstance(batch, ValueError):
                raise batch
            done.append((batch is not None, unreadable))
            if batch is not None:
                inputs, targets = image_and_label(batch)
                yield inputs, torch.full((len(inputs),), NO_TARGET) if targets is None else targets

    source = readable()
    # timm's PrefetchLoader before 1.0.29 fails without a batch.
    first = next(source, None)
    prefetched: Any = () if first is None else chain((first,), source)
    if inner is not loader and first is not None:
        around = copy.copy(loader)
        around.loader, prefetched = prefetched, around
    remaining = iter(batches)
    for inputs, targets in prefetched:
        while True:
            has_batch, unreadable = done.popleft()
            lost = {item.index for item in unreadable}
            indices = [index for index in next(remaining) if index not in lost]
            if has_batch:
                yield indices, inputs, targets, unreadable
                break
            yield indices, None, None, unreadable
    for _, unreadable in done:
        yield [], None, None, unreadable


def image_name(dataset: Any, index: int, absolute: bool = False) -> str:
    """The name of an image: its file, as the data set gives it, or `image INDEX`.

    Args:
        dataset: A data set of timm's or torchvision's, or another one.
        index: Of the image.
        absolute: With all folders, rather than relative to the data set's root.
    """
    dataset, index = innermost(dataset, index)
    try:
        return str(dataset.filename(index, absolute=absolute))
    except (AttributeError, NotImplementedError, TypeError):
        pass
    try:
        file = dataset.samples[index][0]
    except (AttributeError, IndexError, KeyError, TypeError):
        return f'image {index}'
    return str(file if absolute or not hasattr(dataset, 'root') else os.path.relpath(file, dataset.root))


def innermost(dataset: Any, index: int) -> tuple[Any, int]:
    """The data set that reads an item of a `Subset` or of `without_substitutes`, and the item's index there."""
    while isinstance(dataset, (Subset, WithoutSubstitutes)):
        if isinstance(dataset, Subset):
            index = dataset.indices[index]
        dataset = dataset.dataset
    return dataset, index


class WithoutSubstitutes(Dataset):
    """See `without_substitutes`."""

    def __init__(self, dataset: Any) -> None:
        object.__setattr__(self, 'dataset', dataset)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f'index {index} is out of range for {len(self)} items')
        dataset, place = innermost(self, index)
        try:
            item = read_item(dataset, place) if _is_plain(dataset) else dataset[place]
            if item is None:  # how a data set says that it has lost an image
                raise ValueError('the data set gives None')
            return item
        except MemoryError:
            raise
        except Exception as error:
            reason = ' '.join(f'{type(error).__name__}: {error}'.split())
            return Unreadable(index, image_name(dataset, place), reason)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # `dataset` is missing while a copy is made. Special methods, such as the __getitems__ of a Subset, are not its.
        if name == 'dataset' or name.startswith('__'):
            raise AttributeError(f'{type(self).__name__!r} object has no attribute {name!r}')
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)

    def __getstate__(self) -> Any:
        return self.dataset

    def __setstate__(self, dataset: Any) -> None:
        object.__setattr__(self, 'dataset', dataset)


def _is_plain(dataset: Any) -> bool:
    """Whether a data set reads its items as timm's `ImageDataset` does, so that `read_item` reads them."""
    return type(dataset).__getitem__ in (ImageDataset.__getitem__, ImageFiles.__getitem__)
