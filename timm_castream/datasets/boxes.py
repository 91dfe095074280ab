"""Boxes of a data set's objects: read them from files, and carry them to the pixels of the network's input.

A box is x0, y0, x1, y1 in pixels; x1 and y1 lie just outside. Boxes belong to the stored image: where `open_image`
turns it upright, they turn with it. J boxes an image, R pairs of an image and a class.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset
from timm.data import transforms as timm_transforms
from torch import Tensor
from torchvision import transforms

from .image_files import open_image, stored_orientation
from .index_files import number, read_rows, read_xml_boxes
from .unreadable import image_name, innermost

_UNMOVED = (
    transforms.ToTensor,
    transforms.PILToTensor,
    transforms.ConvertImageDtype,
    transforms.Normalize,
    transforms.Grayscale,
    timm_transforms.ToTensor,
    timm_transforms.ToNumpy,
    timm_transforms.MaybeToTensor,
    timm_transforms.MaybePILToTensor,
)
"""Transforms that leave every pixel where it is."""

_LAST_PIXEL = np.array((0, 0, 1, 1))  # from corners inside to corners just outside


def has_boxes(dataset: Any) -> bool:
    """Whether `boxes_for` finds boxes in a data set."""
    dataset, _ = innermost(dataset, 0)
    return getattr(dataset, 'boxes', None) is not None or hasattr(dataset, 'boxes_of')


def boxes_for(dataset: Any, indices: Sequence[int], labels: Sequence[int]) -> Tensor:
    """The boxes of classes in images, in pixels of the network's input, as `localization` takes them.

    Row r belongs to the image `indices[r]` and the class `labels[r]`: an image of several classes has several rows.
    Boxes are turned upright and go through the resize and crop of `dataset.transform`, as the pixels do.

    A data set has boxes by one of two attributes. `boxes` is a sequence of N arrays (J, 4) or (4,), in pixels of the
    stored images, used for every class: `CUB200`, `TinyImageNet` and `DigitScenes` have it, and any other data set gets
    it by `dataset.boxes = read_boxes(path, dataset)`. `boxes_of(index, label)` gives the array of one class: `VOC2012`
    has it.

    Args:
        dataset: A data set of images with boxes and, if the pixels are moved, a `transform`; or a `Subset` of one.
        indices: Of the R images.
        labels: Indices of the R classes.

    Returns:
        (R, J, 4) float32. A box is clipped to the input. Rows of NaN stand for boxes that lie outside and fill up to J,
        the largest number of boxes in the R rows, at least 1.

    Raises:
        FileNotFoundError: A file with the boxes of an image is missing.
        OSError: The size of an image cannot be read.
        ValueError: The data set has no boxes, or a transform moves pixels in an unknown way.
    """
    rows = [
        input_boxes(*_upright_boxes(dataset, int(index), int(label)))
        for index, label in zip(indices, labels, strict=True)
    ]
    padded = torch.full((len(rows), max(map(len, rows), default=1) or 1, 4), torch.nan)
    for row, boxes in zip(padded, rows, strict=True):
        row[: len(boxes)] = torch.from_numpy(boxes)
    return padded


def input_boxes(boxes: np.ndarray, image_size: tuple[int, int], transform: Any) -> np.ndarray:
    """Boxes after an image's transform.

    Args:
        boxes: (J, 4) in pixels of the upright image.
        image_size: Width and height of the upright image, as `PIL.Image.Image.size`.
        transform: From a PIL image to the network's input: a resize, crop or trim of timm's or torchvision's, a
            transform that moves no pixels, a `Compose` of these, or None.

    Returns:
        (J, 4) in pixels of the input, clipped to it. A box of which nothing is left is a row of NaN.

    Raises:
        ValueError: A transform is random or unknown, so that it may move pixels anywhere.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    size = np.array(image_size)
    for step in _steps(transform):
        boxes, size = _through(step, boxes, size)
    corners = boxes.reshape(-1, 2, 2).clip(0, size)
    corners[~(corners[:, 1] > corners[:, 0]).all(1)] = np.nan
    return corners.reshape(-1, 4)


def read_boxes(path: str | os.PathLike, dataset: Any) -> list[np.ndarray]:
    """The boxes of a data set's images from a file or a folder, for `dataset.boxes`.

    Args:
        path: Either a text file with a line `path,x0,y0,x1,y1` a box, as the `localization.txt` of the WSOL benchmark;
            its paths and the images' belong together where one ends in the other. Or a folder of XML files, such as
            ImageNet's `Annotations/CLS-LOC/val`, with or without subfolders; `NAME.xml` belongs to `NAME.JPEG`, and the
            boxes of all its objects are taken, whatever their class. In both, pixels count from 0, and x1 and y1 are
            the last ones inside, as in these files: 1 is added to them.
        dataset: N images with file names: timm's `filename(index, absolute=True)`, or torchvision's `samples`.

    Returns:
        N arrays (J, 4); J is 0 for an image that is not listed.

    Raises:
        FileNotFoundError: There is nothing at the path.
        ValueError: A line or a file is damaged, a name is ambiguous, or no image of the data set is listed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f'{path} is missing')
    read = _xml_folder(path) if path.is_dir() else _text_file(path)
    found = [read(PurePath(image_name(dataset, index, absolute=True))) for index in range(len(dataset))]
    if not any(map(len, found)):
        raise ValueError(f'{path} lists none of the {len(found)} images, such as {image_name(dataset, 0)}')
    return [boxes + _LAST_PIXEL for boxes in found]


def _upright_boxes(dataset: Any, index: int, label: int) -> tuple[np.ndarray, tuple[int, int], Any]:
    """Boxes of a class in an upright image, its width and height, and the transform on its way to the network."""
    dataset, index = innermost(dataset, index)
    if getattr(dataset, 'boxes', None) is not None:
        boxes = dataset.boxes[index]
    elif hasattr(dataset, 'boxes_of'):
        boxes = dataset.boxes_of(index, label)
    else:
        raise ValueError(f'{type(dataset).__name__} has no boxes: name a file or a folder with them')
    size, orientation = _stored_size(dataset, index)
    boxes, size = _turned(np.asarray(boxes, dtype=np.float64).reshape(-1, 4), size, orientation)
    return boxes, size, getattr(dataset, 'transform', None)


def _stored_size(dataset: Any, index: int) -> tuple[tuple[int, int], int]:
    """Width and height of a stored image, and the EXIF orientation by which the data set turns it, 1 for none."""
    if hasattr(dataset, 'image_size'):
        return dataset.image_size(index), 1
    image = dataset.reader[index][0] if hasattr(dataset, 'reader') else dataset.samples[index][0]
    size, orientation, by_pillow = stored_orientation(image)
    is_turned = by_pillow or isinstance(dataset, ImageDataset) or getattr(dataset, 'loader', None) is open_image
    return size, orientation if is_turned else 1


def _turned(boxes: np.ndarray, size: tuple[int, int], orientation: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Boxes, and the image's width and height, after the image is turned upright from an EXIF orientation, 1 to 8."""
    width, height = size
    x0, y0, x1, y1 = boxes.T
    if orientation in (2, 3, 7, 8):  # mirrored from left to right
        x0, x1 = width - x1, width - x0
    if orientation in (3, 4, 6, 7):  # from top to bottom
        y0, y1 = height - y1, height - y0
    if orientation > 4:
        x0, y0, x1, y1, width, height = y0, x0, y1, x1, height, width
    return np.stack([x0, y0, x1, y1], 1), (width, height)


def _steps(transform: Any) -> list[Any]:
    if transform is None:
        return []
    if isinstance(transform, transforms.Compose):
        return [step for part in transform.transforms for step in _steps(part)]
    return [transform]


def _through(step: Any, boxes: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and the image's (width, height) after one transform."""
    if isinstance(step, _UNMOVED):
        return boxes, size
    if isinstance(step, (transforms.Resize, timm_transforms.ResizeKeepRatio)):
        if getattr(step, 'random_scale_prob', 0) or getattr(step, 'random_aspect_prob', 0):
            raise ValueError(f'boxes cannot follow the random resize {step}')
        # The transform itself rounds the size, as its version does it.
        resized = np.array(step(Image.new('L', (int(size[0]), int(size[1])))).size)
        return boxes * np.tile(resized / size, 2), resized
    if isinstance(step, (transforms.CenterCrop, timm_transforms.CenterCropOrPad)):
        height, width = step.size if isinstance(step.size, Sequence) else (step.size, step.size)
        wanted = np.array((width, height))
        # Both pad first, where the image is smaller, and round the extra pixel to the right and the bottom.
        padding = np.maximum(wanted - size, 0) // 2
        offset = np.array([round(extra / 2) for extra in np.maximum(size - wanted, 0).tolist()])
        return boxes + np.tile(padding - offset, 2), wanted
    if isinstance(step, timm_transforms.TrimBorder):
        return boxes - np.minimum(step.border_size, np.tile(size, 2)), np.maximum(size - 2 * step.border_size, 0)
    raise ValueError(f'boxes cannot follow the transform {type(step).__name__}, which may move pixels')


def _xml_folder(path: Path) -> Callable[[PurePath], np.ndarray]:
    """From an image's path to its boxes in a folder of XML files."""
    files: dict[str, Path] = {}
    for file in sorted(path.rglob('*.xml')):
        if file.stem in files:
            raise ValueError(f'{path} has two files {file.name}: {files[file.stem]} and {file}')
        files[file.stem] = file
    if not files:
        raise ValueError(f'{path} holds no XML files')

    def read(image: PurePath) -> np.ndarray:
        objects = read_xml_boxes(files[image.stem]) if image.stem in files else []
        return np.array([box for _, box in objects], dtype=np.float64).reshape(-1, 4)

    return read


def _text_file(path: Path) -> Callable[[PurePath], np.ndarray]:
    """From an image's path to its boxes in a text file."""
    boxes: dict[tuple[str, ...], list[tuple[float, ...]]] = {}
    for file, *box in read_rows(path, str, number, number, number, number, separator=','):
        if box[2] < box[0] or box[3] < box[1]:
            raise ValueError(f'{path}: the box {box} of {file} ends before it begins')
        boxes.setdefault(PurePath(file).parts, []).append(tuple(box))
    by_name: dict[str, list[tuple[str, ...]]] = {}
    for parts in boxes:
        by_name.setdefault(parts[-1], []).append(parts)

    owners: dict[tuple[str, ...], PurePath] = {}

    def read(image: PurePath) -> np.ndarray:
        fitting = [parts for parts in by_name.get(image.name, ()) if _ends_alike(parts, image.parts)]
        if len(fitting) > 1:
            names = ' and '.join('/'.join(parts) for parts in fitting[:2])
            raise ValueError(f'{path} lists {names}, either of which may be {image}')
        for parts in fitting:
            if owners.setdefault(parts, image) != image:
                raise ValueError(f'{path} lists {"/".join(parts)}, which may be {owners[parts]} or {image}')
        return np.array(boxes[fitting[0]] if fitting else [], dtype=np.float64).reshape(-1, 4)

    return read


def _ends_alike(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    shared = min(len(one), len(other))
    return one[-shared:] == other[-shared:]
