"""The data sets of the paper and Tiny ImageNet, in the layouts that their official archives unpack to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from timm.data.readers.reader import Reader

from .folders import ImageFiles
from .index_files import number, official_split, positive, read_rows, read_table, read_xml_boxes

VOC_IGNORE = -1.0
"""Target of a class of which an image shows difficult objects only; torchmetrics takes it as `ignore_index=-1`."""

_VOC_TARGETS = {1: 1.0, -1: 0.0, 0: VOC_IGNORE}
_VOC_CLASSES = (
    'aeroplane',
    'bicycle',
    'bird',
    'boat',
    'bottle',
    'bus',
    'car',
    'cat',
    'chair',
    'cow',
    'diningtable',
    'dog',
    'horse',
    'motorbike',
    'person',
    'pottedplant',
    'sheep',
    'sofa',
    'train',
    'tvmonitor',
)


class _Index(NamedTuple):
    """One split of an archive: N files, relative to its folder, and their N targets."""

    files: list[str]
    targets: list[int] | np.ndarray
    classes: list[str]
    boxes: np.ndarray | None = None


class _IndexReader(Reader):
    """Hands the images of an index to timm's ImageDataset."""

    def __init__(self, folder: Path, index: _Index) -> None:
        super().__init__()
        self.folder = folder
        self.files = index.files
        self.targets = index.targets
        self.class_to_idx = {name: i for i, name in enumerate(index.classes)}

    def __getitem__(self, index: int) -> tuple[BinaryIO, Any]:
        return open(self.folder / self.files[index], 'rb'), self.targets[index]

    def __len__(self) -> int:
        return len(self.files)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        file = self.files[index]
        return os.path.basename(file) if basename else str(self.folder / file) if absolute else file


class IndexedImages(ImageFiles):
    """N images with the targets that an official index gives them.

    Args:
        root: The folder that the archive unpacks to, or its parent.
        split: One of `splits`. timm's other words are understood: training for the first of them; val, valid,
            validation, eval and evaluation for the second.
        transform: From a PIL image to what the data set gives.
        target_transform: The same for the target.
        input_img_mode: PIL mode of the images given, as in `timm.data.ImageDataset`.

    Attributes:
        classes: Names of the classes in the order of their indices.
        boxes: (N, 4) corners x0, y0, x1, y1 in pixels of the stored images, where the archive has one box an image,
            else None. x1 and y1 lie just outside.

    Raises:
        FileNotFoundError: A file of the index, or an image that it lists, is missing.
        ValueError: The split is unknown, or a file of the index is damaged.
    """

    splits: tuple[str, ...]
    _archive: str
    _folders: tuple[str, ...]  # where the index may be, seen from root
    _marker: str  # what the folder of the index must hold

    def __init__(
        self,
        root: str | os.PathLike,
        split: str = 'train',
        transform: Callable | None = None,
        target_transform: Callable | None = None,
        input_img_mode: str = 'RGB',
    ) -> None:
        folder = next((f for f in (Path(root, name) for name in self._folders) if (f / self._marker).exists()), None)
        if folder is None:
            raise FileNotFoundError(
                f'no {self._marker}: {root} is neither the folder that {self._archive} unpacks to nor its parent'
            )
        index = self._read_index(folder, official_split(type(self).__name__, self.splits, split))
        if not index.files:
            raise ValueError(f'the index in {folder} lists no images for split {split!r}')
        missing = [file for file in index.files if not (folder / file).is_file()]
        if missing:
            raise FileNotFoundError(
                f'{folder / missing[0]} is missing, one of {len(missing)} of the {len(index.files)} images listed'
            )
        if index.boxes is not None and (empty := ~(index.boxes[:, 2:] > index.boxes[:, :2]).all(1)).any():
            raise ValueError(f'the box of {index.files[empty.argmax()]} in the index in {folder} has no area')
        super().__init__(
            root,
            reader=_IndexReader(folder, index),
            input_img_mode=input_img_mode,
            transform=transform,
            target_transform=target_transform,
        )
        self.classes = index.classes
        self.boxes = index.boxes

    @staticmethod
    def _read_index(folder: Path, split: str) -> _Index:
        raise NotImplementedError


class CUB200(IndexedImages):
    """CUB-200-2011: 200 species of birds, official split, a box around each bird. Arguments: see `IndexedImages`."""

    splits = ('train', 'test')
    _archive = 'CUB_200_2011.tgz'
    _folders = ('.', 'CUB_200_2011')
    _marker = 'images.txt'

    @staticmethod
    def _read_index(folder: Path, split: str) -> _Index:
        names = read_table(folder / 'classes.txt', int, str)
        files = read_table(folder / 'images.txt', int, str)
        labels = read_table(folder / 'image_class_labels.txt', int, int)
        in_train = read_table(folder / 'train_test_split.txt', int, int)
        sizes = read_table(folder / 'bounding_boxes.txt', int, number, number, positive, positive)
        corners = {i: (x, y, x + w, y + h) for i, (x, y, w, h) in sizes.items()}
        if not files.keys() == labels.keys() == in_train.keys() == corners.keys():
            raise ValueError(f'the index files in {folder} do not list the same images')
        if unknown := set(labels.values()) - names.keys():
            raise ValueError(f'class {min(unknown)} of image_class_labels.txt is not in {folder / "classes.txt"}')
        target = {label: i for i, label in enumerate(sorted(names))}
        chosen = [i for i in sorted(files) if bool(in_train[i]) == (split == 'train')]
        return _Index(
            files=[f'images/{files[i]}' for i in chosen],
            targets=[target[labels[i]] for i in chosen],
            classes=[names[label] for label in target],
            boxes=np.array([corners[i] for i in chosen], dtype=np.float64).reshape(-1, 4),
        )


class VOC2012(IndexedImages):
    """Pascal VOC 2012 classification: 20 classes, several of them in an image. Arguments: see `IndexedImages`.

    A target is a float32 array (20,): 1 where the class is present, 0 where it is absent, and `VOC_IGNORE` where
    all its objects are difficult. The devkit counts an image as neither right nor wrong for such a class: leave
    these entries out of the loss and of the average precision.
    The labels of the test split have never been published.

    The boxes are those of the archive's `Annotations`: `boxes_of` gives the objects of one class, difficult ones too.
    """

    splits = ('train', 'val', 'trainval')
    _archive = 'VOCtrainval_11-May-2012.tar'
    _folders = ('.', 'VOC2012', 'VOCdevkit/VOC2012')
    _marker = 'ImageSets/Main'

    @staticmethod
    def _read_index(folder: Path, split: str) -> _Index:
        lists = folder / 'ImageSets' / 'Main'
        ids = [image for (image,) in read_rows(lists / f'{split}.txt', str)]
        targets = np.empty((len(ids), len(_VOC_CLASSES)), dtype=np.float32)
        for column, name in enumerate(_VOC_CLASSES):
            path = lists / f'{name}_{split}.txt'
            labels = read_table(path, str, int)
            for row, image in enumerate(ids):
                if labels.get(image) not in _VOC_TARGETS:
                    raise ValueError(f'{path} gives {image} the label {labels.get(image)}, which is none of 1, -1, 0')
                targets[row, column] = _VOC_TARGETS[labels[image]]
        return _Index([f'JPEGImages/{image}.jpg' for image in ids], targets, list(_VOC_CLASSES))

    def boxes_of(self, index: int, label: int) -> np.ndarray:
        """The boxes of the objects of a class in an image.

        Args:
            index: Of the image.
            label: Index of the class.

        Returns:
            (J, 4) corners x0, y0, x1, y1 in pixels of the stored image; x1 and y1 lie just outside.

        Raises:
            FileNotFoundError: The image's file in `Annotations` is missing.
            ValueError: The file is damaged.
        """
        file = Path(self.filename(index, absolute=True))
        objects = read_xml_boxes(file.parent.parent / 'Annotations' / f'{file.stem}.xml')
        corners = [box for name, box in objects if name == self.classes[label]]
        # The devkit counts pixels from 1, and its xmax and ymax are the last ones inside.
        return np.array(corners, dtype=np.float64).reshape(-1, 4) - np.array((1, 1, 0, 0))


class MIT67(IndexedImages):
    """MIT Indoor Scenes: 67 kinds of rooms, classes in alphabetical order. Arguments: see `IndexedImages`.

    `TrainImages.txt` and `TestImages.txt`, which are downloads of their own, lie beside the archive's `Images`.
    """

    splits = ('train', 'test')
    _archive = 'indoorCVPR_09.tar (with the two lists put beside Images)'
    _folders = ('.', 'indoorCVPR_09', '..')  # '..' for a root that is Images itself
    _marker = 'TrainImages.txt'

    @staticmethod
    def _read_index(folder: Path, split: str) -> _Index:
        lists = {'train': 'TrainImages.txt', 'test': 'TestImages.txt'}
        files = {name: [file for (file,) in read_rows(folder / lists[name], str)] for name in lists}
        classes = sorted({file.partition('/')[0] for listed in files.values() for file in listed})
        target = {name: i for i, name in enumerate(classes)}
        targets = [target[file.partition('/')[0]] for file in files[split]]
        return _Index([f'Images/{file}' for file in files[split]], targets, classes)


class TinyImageNet(IndexedImages):
    """Tiny ImageNet: 200 classes of ImageNet, 64 x 64 pixels, a box an image. Arguments: see `IndexedImages`.

    Classes are the WordNet ids of `wnids.txt`, sorted; `timm.data.ImageNetInfo` has their names. The labels of the
    test split have never been published.
    """

    splits = ('train', 'val')
    _archive = 'tiny-imagenet-200.zip'
    _folders = ('.', 'tiny-imagenet-200')
    _marker = 'wnids.txt'

    @staticmethod
    def _read_index(folder: Path, split: str) -> _Index:
        classes = sorted(read_table(folder / 'wnids.txt', str))
        files: list[str] = []
        targets: list[int] = []
        boxes: list[Any] = []
        if split == 'train':
            for target, name in enumerate(classes):
                rows = read_table(folder / 'train' / name / f'{name}_boxes.txt', str, number, number, number, number)
                files += [f'train/{name}/images/{file}' for file in rows]
                targets += [target] * len(rows)
                boxes += rows.values()
        else:
            path = folder / 'val' / 'val_annotations.txt'
            target_of = {name: target for target, name in enumerate(classes)}
            for file, (name, *box) in read_table(path, str, str, number, number, number, number).items():
                if name not in target_of:
                    raise ValueError(f'{path} gives {file} the class {name}, which is not in {folder / "wnids.txt"}')
                files.append(f'val/images/{file}')
                targets.append(target_of[name])
                boxes.append(box)
        # The archive's last column and row are the last ones inside, from 0 to 63.
        corners = np.array(boxes, dtype=np.float64).reshape(-1, 4) + np.array((0, 0, 1, 1))
        return _Index(files, targets, classes, corners)
