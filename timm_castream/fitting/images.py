"""The images of a fit: files below folders, their class folders, and the split into parts."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .._utils.files import printable
from ..datasets.image_files import find_images, natural_key, open_image
from .training import seeded

LEAST_IMAGES, FEW_IMAGES = 30, 200
MAX_SELECTION, MAX_TEST = 1000, 500

_logger = logging.getLogger(__name__)


class ImageFile(NamedTuple):
    """An image on disk.

    Attributes:
        path: The file.
        folder: The subfolder of the named folder that it lies in, its class where there are class folders; '' for none.
    """

    path: Path
    folder: str


def find_files(images: str | Path | Sequence[str | Path], num_images: int | None, seed: int) -> list[ImageFile]:
    """All images below one or more folders, or some of them drawn by a seed, in the order of their paths.

    Raises:
        ValueError: If there are no such folders, or no or too few images.
    """
    roots = [images] if isinstance(images, (str, Path)) else list(images)
    if not roots:
        raise ValueError('images is empty: name a folder of images.')
    files = {}
    for root in map(Path, roots):
        for path in find_images(root):
            below = path.relative_to(root)
            files[path.resolve()] = ImageFile(path, below.parts[0] if len(below.parts) > 1 else '')
    found = list(files.values())
    if num_images is not None:
        if num_images > len(found):
            raise ValueError(f'num_images {num_images} is out of range, the folders have {len(found)} images.')
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
        found = [found[i] for i in order[:num_images].sort().values.tolist()]
    names = ', '.join(map(printable, roots))
    if len(found) < LEAST_IMAGES:
        raise ValueError(f'{names}: {len(found)} images are too few, a fit needs at least {LEAST_IMAGES}.')
    if len(found) < FEW_IMAGES:
        _logger.warning(
            '%s: %d images are few: a stream learns little from fewer than %d, and the intervals of the '
            'answer will be wide.',
            names,
            len(found),
            FEW_IMAGES,
        )
    return found


def check_folders(images: str | Path | Sequence[str | Path], output: Path) -> None:
    """Raises ValueError where the images lie in the output folder, or the output among the images."""
    for root in [images] if isinstance(images, (str, Path)) else images:
        inside, outside = Path(root).resolve(), output.resolve()
        if inside.is_relative_to(outside):
            raise ValueError(f'The images in {root} lie inside the output {output}: name another output folder.')
        if outside.is_relative_to(inside):
            raise ValueError(
                f'The output {output} lies inside the folder of images {root}, where its pictures would '
                'count as images: name another output folder.'
            )


def files_hash(files: Sequence[ImageFile]) -> str:
    """SHA-256 of the names, sizes and times of the files."""
    digest = hashlib.sha256()
    for path, folder in files:
        status = os.stat(path)
        line = f'{folder}/{path.name} {status.st_size} {status.st_mtime_ns}\n'
        digest.update(line.encode('utf-8', 'surrogateescape'))
    return digest.hexdigest()


@dataclass(frozen=True)
class Split:
    """Indices of the images of each part, drawn by a seed.

    Attributes:
        train: The streams are trained on them.
        selection: The settings are chosen on them.
        test: The answer is measured on them.
    """

    train: Tensor
    selection: Tensor
    test: Tensor


def split_images(readable: Tensor, seed: int) -> Split:
    """Draws a tenth of the images for the choice of settings (at most 1,000) and a tenth for the answer (at most 500).

    Args:
        readable: (N,) bool, the images that can be read.
        seed: Seed of the draw.
    """
    order = torch.randperm(len(readable), generator=torch.Generator().manual_seed(seed))
    order = order[readable[order]]
    selection, test = (min(len(order) // 10, most) for most in (MAX_SELECTION, MAX_TEST))
    parts = order.split([test, selection, len(order) - test - selection])
    return Split(*(part.sort().values for part in reversed(parts)))


class ListedImages(Dataset):
    """Images of files, each item a normalised image and a label.

    Args:
        files: The files.
        labels: (N,) class indices.
        transform: Of a PIL image.
        mode: Pillow's mode of the images, see `image_mode`.
    """

    def __init__(
        self, files: Sequence[ImageFile], labels: Tensor, transform: Callable[[Image.Image], Tensor], mode: str
    ) -> None:
        self.files = files
        self.labels = labels.tolist()
        self.transform = transform
        self.mode = mode

    def __len__(self) -> int:
        return len(self.files)

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Name of an image's file, as timm's data sets give it."""
        path, folder = self.files[index]
        if absolute:
            return str(path)
        return path.name if basename or not folder else f'{folder}/{path.name}'

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(open_image(self.files[index].path, self.mode)), self.labels[index]


class AugmentedImages(ListedImages):
    """Images whose random transform depends on the seed, the epoch and the image alone.

    Args:
        seed: Seed of the fit.
        epoch: The epoch.

    The other arguments are those of `ListedImages`.
    """

    def __init__(self, *args: Any, seed: int, epoch: int) -> None:
        super().__init__(*args)
        self.first_seed = (seed * 1000 + epoch) * 1_000_000_007

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        state = random.getstate()
        random.seed(self.first_seed + index)
        try:
            with seeded((self.first_seed + index) % 2**63, torch.device('cpu')):
                return super().__getitem__(index)
        finally:
            random.setstate(state)


def folder_classes(files: Sequence[ImageFile]) -> list[str]:
    """The names of the class folders in natural order, as `datasets.create_dataset` has them.

    Raises:
        ValueError: If an image lies in none, or all lie in the same.
    """
    alone = next((path for path, folder in files if not folder), None)
    if alone is not None:
        raise ValueError(
            f"labels='folders' takes the class of an image from its folder, and {alone} lies in none: put each class "
            'into a subfolder.'
        )
    classes = sorted({folder for _, folder in files}, key=natural_key)
    if len(classes) < 2:
        raise ValueError(f"labels='folders' needs two classes or more, the images have {classes[0]!r} alone.")
    return classes
