"""The demo's data set: handwritten digits on photographs, both from scikit-learn."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .index_files import official_split

_IMAGE_SIZE = 64
_NUM_VALIDATION_SCANS = 360


class DigitScenes(Dataset):
    """Handwritten digits on photographs, 64 x 64 pixels, one digit an image: real data without a download.

    One of scikit-learn's 1,797 scans lies at a random spot, 20 to 40 pixels high, on a random crop of one of its
    two sample photographs: a light digit on the darkened crop, or a dark one on the lightened crop. The 360
    scans of the validation split are in no image of the training split, whatever the seeds; both share the photographs.

    Args:
        split: 'train' or 'validation'.
        num_images: N, by default 8,000 for training and 2,000 for validation.
        seed: Image i depends on the split, the seed and i alone.
        transform: From a PIL image to what the data set gives.
        input_img_mode: PIL mode of the images given, as in `timm.data.ImageDataset`.

    Attributes:
        images: (N, 64, 64, 3) uint8 array, RGB.
        labels: (N,) array of the digits, 0 to 9.
        boxes: (N, 4) array of the digits' corners x0, y0, x1, y1 in pixels; x1 and y1 lie just outside.
        scans: (N,) array, which row of `sklearn.datasets.load_digits()` each image shows.
        classes: Names of the classes in the order of their indices.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: The split is unknown, or a number is out of range.
    """

    splits = ('train', 'validation')
    classes = [str(digit) for digit in range(10)]

    def __init__(
        self,
        split: str = 'train',
        num_images: int | None = None,
        seed: int = 0,
        transform: Callable | None = None,
        input_img_mode: str = 'RGB',
    ) -> None:
        training = official_split(type(self).__name__, self.splits, split) == 'train'
        num_images = (8000 if training else 2000) if num_images is None else num_images
        if num_images < 1 or seed < 0:
            raise ValueError(f'num_images={num_images} must be at least 1 and seed={seed} at least 0')
        digits, photographs = _sklearn_samples()
        order = np.random.default_rng(0).permutation(len(digits.images))
        candidates = order[_NUM_VALIDATION_SCANS:] if training else order[:_NUM_VALIDATION_SCANS]

        self.transform = transform
        self.input_img_mode = input_img_mode
        self.images = np.empty((num_images, _IMAGE_SIZE, _IMAGE_SIZE, 3), dtype=np.uint8)
        self.boxes = np.empty((num_images, 4), dtype=np.int64)
        self.scans = np.empty(num_images, dtype=np.int64)
        for i in range(num_images):
            rng = np.random.default_rng((seed, int(training), i))
            self.scans[i] = rng.choice(candidates)
            photograph = photographs[rng.integers(len(photographs))]
            self.images[i], self.boxes[i] = _draw_scene(digits.images[self.scans[i]], photograph, rng)
        self.labels = digits.target[self.scans]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert(self.input_img_mode)
        return image if self.transform is None else self.transform(image), int(self.labels[index])

    def __len__(self) -> int:
        return len(self.images)

    def image_size(self, index: int) -> tuple[int, int]:
        """Width and height of an image."""
        return _IMAGE_SIZE, _IMAGE_SIZE


def write_image_folder(splits: Mapping[str, DigitScenes], path: str | os.PathLike) -> None:
    """Writes scenes as the image folder that timm's scripts read: path/split/class/number.png.

    The folder appears in one step when it is complete; whatever stops the writing leaves nothing behind.

    Args:
        splits: From the name of each subfolder, such as train and validation, to its scenes.
        path: The folder to make.

    Raises:
        FileExistsError: There is something at `path` already.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f'{path} exists already: remove it or name another folder')
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'.{path.name}-') as scratch:
        unfinished = Path(scratch, path.name)
        for split, scenes in splits.items():
            folders = [unfinished / split / name for name in scenes.classes]
            for folder in folders:
                folder.mkdir(parents=True)
            for i, (image, label) in enumerate(zip(scenes.images, scenes.labels, strict=True)):
                Image.fromarray(image).save(folders[label] / f'{i:05d}.png')
        unfinished.rename(path)


def _sklearn_samples() -> tuple[Any, list[Image.Image]]:
    """scikit-learn's digits and its two photographs."""
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise ImportError("the digits come from scikit-learn: pip install 'timm_castream[demo]'") from error
    return load_digits(), [Image.fromarray(photograph) for photograph in load_sample_images().images]


def _draw_scene(scan: np.ndarray, photograph: Image.Image, rng: np.random.Generator) -> tuple[np.ndarray, tuple]:
    """Places a scan, (8, 8) from 0 to 16, on a crop: the image as (64, 64, 3) uint8, and the digit's box."""
    side = int(rng.integers(_IMAGE_SIZE, 257))
    x, y = int(rng.integers(photograph.width - side + 1)), int(rng.integers(photograph.height - side + 1))
    crop = photograph.resize((_IMAGE_SIZE, _IMAGE_SIZE), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    light = rng.random() < 0.5
    ink_value = 255.0 if light else 0.0
    scene = (np.asarray(crop, dtype=np.float32) + 255.0 - ink_value) / 2  # half the contrast, far from the ink

    ink = Image.fromarray((scan * (255 / 16)).astype(np.uint8))
    ink = ink.crop(ink.getbbox())
    height = int(rng.integers(20, 41))
    width = round(height * ink.width / ink.height)
    left, top = int(rng.integers(_IMAGE_SIZE - width + 1)), int(rng.integers(_IMAGE_SIZE - height + 1))
    ink = ink.resize((width, height), Image.Resampling.BICUBIC)
    opacity = rng.uniform(0.4, 1.0) * np.asarray(ink, dtype=np.float32)[..., None] / 255
    box = scene[top : top + height, left : left + width]
    box += opacity * (ink_value - box)
    return scene.round().astype(np.uint8), (left, top, left + width, top + height)
