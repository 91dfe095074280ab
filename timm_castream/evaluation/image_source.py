"""The images of an evaluation: which ones, in which batches, with their labels, boxes and names."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from ..datasets import (
    Unreadable,
    boxes_for,
    count_classes,
    has_boxes,
    image_name,
    label_names_of,
    present_classes,
    read_batches,
    without_substitutes,
)
from ..datasets.classes import same_name
from ..datasets.folders import NO_TARGET, FolderReader
from ..datasets.read_ahead import read_ahead
from ..datasets.unreadable import image_and_label, innermost
from ..hub.label_names import known_names
from .loaders import normalisation_of, transform_text

_logger = logging.getLogger(__name__)


class ImageBatch(NamedTuple):
    """A batch as it was read. B of its images could be read.

    Attributes:
        indices: B positions in the data set.
        images: (B, C, H, W), or None if B is 0.
        labels: (B,) or (B, classes), or None if B is 0.
        unreadable: The others.
    """

    indices: list[int]
    images: Any
    labels: Any
    unreadable: list[Unreadable]


class ImageSource:
    """The images of a loader's data set, or a random sample of them, in fixed batches.

    Args:
        loader: A `DataLoader` or one of timm's `create_loader`. Images are read in order; its sampler is ignored.
        num_samples: Size of the sample, or None for all images.
        seed: Seed of the sample.
        needs_labels: Whether each image needs a label.

    Attributes:
        dataset: The data set.
        batches: The indices of the images of every batch.
        outside: The indices of the images outside the sample.

    Raises:
        ValueError: If the loader has no batches that can be read by index, or `num_samples` is out of range.
    """

    def __init__(self, loader: Any, num_samples: int | None = None, seed: int = 0, needs_labels: bool = False) -> None:
        try:
            # timm's PrefetchLoader wraps a DataLoader.
            num_images, size = len(loader.dataset), getattr(loader, 'loader', loader).batch_size
        except (AttributeError, TypeError):
            raise ValueError(f'{type(loader).__name__} is no DataLoader over a data set with a length.') from None
        if isinstance(loader.dataset, IterableDataset):
            raise ValueError(f'{type(loader.dataset).__name__} is iterable: an evaluation reads images by their index.')
        if not num_images:
            raise ValueError('The data set has no images.')
        if not size:
            raise ValueError('The loader has no batch_size: make it with one, not with a batch sampler.')
        chosen, outside = torch.arange(num_images), torch.arange(0)
        if num_samples is not None:
            if num_samples > num_images:
                raise ValueError(f'num_samples {num_samples} is out of range, the data set has {num_images} images.')
            order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
            chosen, outside = order[:num_samples].sort().values, order[num_samples:].sort().values
        self.loader = loader
        self.dataset = loader.dataset
        self.batches: list[list[int]] = [batch.tolist() for batch in chosen.split(size)]
        self.outside: list[int] = outside.tolist()
        self._needs_labels = needs_labels
        self._ignores_labels = False

    @property
    def indices(self) -> list[int]:
        """The indices of all images, in order."""
        return [index for batch in self.batches for index in batch]

    @cached_property
    def first_item(self) -> tuple[Any, Any]:
        """The first image that can be read, and its label.

        Raises:
            ValueError: If none can be read, or a label is needed and missing.
        """
        items = without_substitutes(self.dataset)
        first = None
        for index in self.indices:
            item = items[index]
            if not isinstance(item, Unreadable):
                image, label = image_and_label(item)
                if label is None and self._needs_labels:
                    raise ValueError(
                        f'The data set gives a {type(item).__name__} without a label for an image: give pairs (image, '
                        "label), or explain the predicted classes with target='predicted'."
                    )
                if isinstance(image, Image.Image):
                    raise ValueError(
                        'The data set gives images of Pillow, and an evaluation takes normalised tensors (C, H, W): give '
                        'it the transform of timm.data.create_transform.'
                    )
                return image, self._usable(label)
            first = first or item
        assert first is not None
        raise ValueError(f'None of the images can be read. The first is {first.name}: {first.reason}')

    def _usable(self, label: Any) -> Any:
        """The label, or `NO_TARGET` where the labels are none that an evaluation reads and none is needed.

        Raises:
            ValueError: If a label is needed.
        """
        if label is None:
            return NO_TARGET
        is_number = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
        if is_number or isinstance(label, (np.ndarray, Tensor)):
            return label
        given = f'The label of an image is {label!r}' if isinstance(label, (str, float)) else ''
        given = given or f'The label of an image is a {type(label).__name__}'
        if self._needs_labels:
            raise ValueError(
                f'{given}: give the index of its class or a vector of all classes, or explain the predicted classes with '
                "target='predicted'."
            )
        _logger.warning('%s, no index of a class, so no accuracy is measured.', given)
        self._ignores_labels = True
        return NO_TARGET

    @property
    def input_size(self) -> tuple[int, ...]:
        """(C, H, W) of an image."""
        return tuple(np.shape(self.first_item[0])[-3:])

    @property
    def is_multilabel(self) -> bool:
        """Whether an image may have several labels: a vector with a number a class."""
        return np.ndim(self.first_item[1]) > 0

    @property
    def has_boxes(self) -> bool:
        """Whether the data set has boxes."""
        return has_boxes(self.dataset)

    def read(self, batches: Sequence[Sequence[int]]) -> Iterator[ImageBatch]:
        """Reads batches of indices as the loader reads its own, the next ones while the network works on this one."""
        _ = self.first_item  # it tells whether the labels count
        items = read_batches(self.loader, batches, self._ignores_labels)
        if not getattr(self.loader, 'loader', self.loader).num_workers:  # workers read ahead in any case
            items = read_ahead(items)
        for indices, images, labels, unreadable in items:
            if images is not None and not (isinstance(images, Tensor) and images.is_floating_point()):
                kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
                raise ValueError(
                    f'The loader gives images of {kind}, and an evaluation takes normalised ones in floats.'
                )
            yield ImageBatch(indices, images, labels, unreadable)

    def some_images(self, count: int) -> Tensor:
        """(N, C, H, W): up to `count` of the images that can be read, the first ones."""
        groups = [self.indices[i : i + count] for i in range(0, len(self.indices), count)]
        return next(batch.images for batch in self.read(groups) if batch.indices)

    def name(self, index: int) -> str:
        """The name of an image: its file, as the data set gives it, or `image INDEX`."""
        return image_name(self.dataset, index)

    def boxes(self, indices: Sequence[int], classes: Tensor) -> Tensor:
        """(P, J, 4) boxes of P classes in P images, in pixels of the input, on the device of the (P,) classes."""
        return boxes_for(self.dataset, list(indices), classes.tolist()).to(classes.device)

    def check_classes(self, model: Any, num_classes: int, target: str) -> None:
        """Compares the classes of the data set, by name where both are known, with those of the model.

        Where the predicted class is explained, labels that are not the model's are ignored: no accuracy is measured.

        Args:
            model: The network.
            num_classes: Its number of classes.
            target: `'truth'` or `'predicted'`.

        Raises:
            ValueError: If the labels that are to be explained are not those of the model.
        """
        reason = self._misfit(model, num_classes, target)
        if reason is None:
            return
        if target == 'truth' or self.is_multilabel:
            raise ValueError(reason)
        _logger.warning('%s The predicted classes are explained, and no accuracy is measured.', reason)
        self._ignores_labels = True

    def _misfit(self, model: Any, num_classes: int, target: str) -> str | None:
        """Why the labels are not those of the model, or None."""
        dataset, _ = innermost(self.dataset, 0)
        reader: Any = getattr(dataset, 'reader', None)
        is_folder = isinstance(reader, FolderReader)
        if is_folder and not reader.class_to_idx:
            way_out = '' if target == 'predicted' else ': explain the predicted classes (--target predicted)'
            return f'The images of {reader.root} lie in no folders of classes{way_out}.'
        own, count = label_names_of(dataset), count_classes(dataset)
        if not count:
            return None
        numbers = f'The data set has {count} classes, the model has {num_classes}'
        if count > num_classes:
            return f'{numbers}: name the model of this data set, or its --num-classes.'
        has_map = is_folder and not reader.present
        present = present_classes(dataset) or []
        names = known_names(model, present) if own and not has_map else None
        if own and names and len(names) < num_classes:
            return (
                f'The model names {names[0]!r} alone, and its one logit has two classes: name both, 0 (no) and 1 (yes), '
                'with --class-names.'
            )
        if own and names:
            wrong = [i for i, name in enumerate(own) if name in present and not same_name(name, names[i])]
            if wrong:
                differ = f'Class {wrong[0]} is {own[wrong[0]]!r} in the data set and {names[wrong[0]]!r} in the model'
                if target == 'predicted':
                    return f'{differ}.'
                return f'{differ}: give the targets its indices by timm_castream.datasets.align_classes.'
        elif count < num_classes and not has_map:
            if target == 'predicted':
                return f'{numbers}, and they cannot be compared by name.'
            _logger.warning('%s. The labels 0 to %d are explained.', numbers, count - 1)
        return None

    def settings(self) -> dict[str, Any]:
        """What a folder of an unfinished evaluation must agree on, plain data."""
        return {
            'images_in_data_set': len(self.dataset),
            'images': self._hash(),
            'input_size': list(self.input_size),
            'transform': transform_text(self.loader),
            'loader_normalisation': normalisation_of(self.loader),
        }

    def _hash(self) -> str:
        """SHA-256 of the names, sizes and times of the image files, of the classes and of the boxes."""
        digest = hashlib.sha256()
        source, _ = innermost(self.dataset, 0)
        digest.update(repr(getattr(getattr(source, 'reader', None), 'class_to_idx', None)).encode('utf-8', 'replace'))
        boxes = getattr(source, 'boxes', None)
        for index in self.indices:
            try:
                status: Any = os.stat(image_name(self.dataset, index, absolute=True))
            except OSError:  # an image that is no file
                status = os.stat_result((0,) * 10)
            line = f'{self.name(index)} {status.st_size} {status.st_mtime_ns}\n'
            digest.update(line.encode('utf-8', 'surrogateescape'))
            if boxes is not None:
                digest.update(
                    np.ascontiguousarray(boxes[innermost(self.dataset, index)[1]], dtype=np.float64).tobytes()
                )
        return digest.hexdigest()
