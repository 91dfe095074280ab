"""The images of the experiments: Tiny ImageNet in its official layout, or any folder `train/CLASS` and `val/CLASS`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_castream.datasets import TinyImageNet
from timm_castream.datasets.image_files import find_images, open_image


class Sample(NamedTuple):
    """One image on disk.

    Attributes:
        path: The file.
        label: Index of its class among the sorted class names.
        box: (x0, y0, x1, y1) in pixels of the file, the ends excluded, or None.
    """

    path: Path
    label: int
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class ImageSet:
    """The classes and images of a data folder.

    Attributes:
        classes: Class names, sorted; folder names, which are WordNet ids in Tiny ImageNet.
        train: Training images of each class, in the order of the box file or of the file names.
        val: Validation images, in the order of the annotation file or of the file names.
    """

    classes: tuple[str, ...]
    train: tuple[tuple[Sample, ...], ...]
    val: tuple[Sample, ...]

    def training(self, start: int, count: int) -> list[Sample]:
        """`count` training images of each class after the first `start`, class by class."""
        return [sample for images in self.train for sample in images[start : start + count]]


def read_images(data_dir: str | Path) -> ImageSet:
    """Reads the file names, labels and boxes of a data folder.

    Args:
        data_dir: Tiny ImageNet's folder (`train/CLASS/images`, `val/images`, `val/val_annotations.txt`), or a folder
            with `train/CLASS` and `val/CLASS`.

    Raises:
        ValueError: If the folder has neither layout.
    """
    folder = Path(data_dir)
    if not (folder / 'train').is_dir() or not (folder / 'val').is_dir():
        raise ValueError(f'{folder} has no folders train and val; unpack tiny-imagenet-200.zip and name that folder.')
    if (folder / 'wnids.txt').is_file():
        datasets = [TinyImageNet(folder, split) for split in TinyImageNet.splits]
        classes = tuple(datasets[0].reader.class_to_idx)
        train, val = (
            [
                Sample(Path(dataset.filename(i, absolute=True)), target, tuple(box))
                for i, (target, box) in enumerate(zip(dataset.reader.targets, dataset.boxes, strict=True))
            ]
            for dataset in datasets
        )
    else:
        classes = tuple(sorted(path.name for path in (folder / 'train').iterdir() if path.is_dir()))
        train, val = (
            [Sample(path, label) for label, name in enumerate(classes) for path in find_images(folder / split / name)]
            for split in ('train', 'val')
        )
    by_class: list[list[Sample]] = [[] for _ in classes]
    for sample in train:
        by_class[sample.label].append(sample)
    return ImageSet(classes, tuple(map(tuple, by_class)), tuple(val))


class Images(Dataset):
    """Normalised images at one size, resized without a crop.

    Args:
        samples: The images.
        model: A timm model; its `pretrained_cfg` gives mean, standard deviation and interpolation.
        size: Height and width in pixels.

    Attributes:
        boxes: (J, 4) boxes of each image in pixels of its file, or None where the first image has none;
            `timm_castream.datasets.boxes_for` carries them through `transform`.
    """

    def __init__(self, samples: list[Sample] | tuple[Sample, ...], model: nn.Module, size: int) -> None:
        cfg: Any = model.pretrained_cfg
        self.samples = samples
        self.transform = create_transform(
            (3, size, size),
            mean=cfg['mean'],
            std=cfg['std'],
            interpolation=cfg['interpolation'],
            crop_pct=1.0,
            crop_mode='squash',
        )
        self.boxes = None
        if samples and samples[0].box is not None:
            self.boxes = [np.array(sample.box, dtype=np.float64).reshape(-1, 4) for sample in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sample = self.samples[index]
        return self.transform(open_image(sample.path)), sample.label
