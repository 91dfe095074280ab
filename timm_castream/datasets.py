"""The data sets of the paper, and the demo's, as timm and torch data sets.

`CUB200`, `VOC2012` and `MIT67` read the layout that each official archive unpacks to; `DigitScenes` makes
its images from what scikit-learn ships. `create_dataset` is timm's function of that name with these four added.
"""
from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from timm.data import ImageDataset
from timm.data.dataset_factory import create_dataset as timm_create_dataset
from timm.data.readers.reader import Reader
from torch.utils.data import Dataset

__all__ = [
    'CUB200', 'MIT67', 'VOC2012', 'VOC_IGNORE', 'DigitScenes', 'IndexedImages', 'create_dataset', 'write_image_folder',
]

VOC_IGNORE = -1.
"""Target of a class of which an image shows difficult objects only; torchmetrics takes it as `ignore_index=-1`."""

_VOC_TARGETS = {1: 1., -1: 0., 0: VOC_IGNORE}
_VOC_CLASSES = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
    'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor',
)
_IMAGE_SIZE = 64
_NUM_VALIDATION_SCANS = 360


class _Index(NamedTuple):
    """What an archive says of one split: N files, relative to its folder, and their N targets."""
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


class IndexedImages(ImageDataset):
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
        boxes: (N, 4) corners x0, y0, x1, y1 in pixels of the stored images, where the archive has them, else None.

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
                f'no {self._marker}: {root} is neither the folder that {self._archive} unpacks to nor its parent')
        index = self._read_index(folder, _official_split(type(self), split))
        if not index.files:
            raise ValueError(f'the index in {folder} lists no images for split {split!r}')
        missing = [file for file in index.files if not (folder / file).is_file()]
        if missing:
            raise FileNotFoundError(
                f'{folder / missing[0]} is missing, one of {len(missing)} of the {len(index.files)} images listed')
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
        names = dict(_rows(folder / 'classes.txt', int, str))
        files = dict(_rows(folder / 'images.txt', int, str))
        labels = dict(_rows(folder / 'image_class_labels.txt', int, int))
        in_train = dict(_rows(folder / 'train_test_split.txt', int, int))
        corners = {i: (x, y, x + w, y + h) for i, x, y, w, h in
                   _rows(folder / 'bounding_boxes.txt', int, float, float, float, float)}
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
    The prefetching loader of timm before 1.0.31 takes these targets with `collate_fn=default_collate` alone.
    The labels of the test split have never been published.
    """

    splits = ('train', 'val', 'trainval')
    _archive = 'VOCtrainval_11-May-2012.tar'
    _folders = ('.', 'VOC2012', 'VOCdevkit/VOC2012')
    _marker = 'ImageSets/Main'

    @staticmethod
    def _read_index(folder: Path, split: str) -> _Index:
        lists = folder / 'ImageSets' / 'Main'
        ids = [image for image, in _rows(lists / f'{split}.txt', str)]
        targets = np.empty((len(ids), len(_VOC_CLASSES)), dtype=np.float32)
        for column, name in enumerate(_VOC_CLASSES):
            path = lists / f'{name}_{split}.txt'
            labels = dict(_rows(path, str, int))
            for row, image in enumerate(ids):
                if labels.get(image) not in _VOC_TARGETS:
                    raise ValueError(f'{path} gives {image} the label {labels.get(image)}, which is none of 1, -1, 0')
                targets[row, column] = _VOC_TARGETS[labels[image]]
        return _Index([f'JPEGImages/{image}.jpg' for image in ids], targets, list(_VOC_CLASSES))


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
        files = {name: [file for file, in _rows(folder / lists[name], str)] for name in lists}
        classes = sorted({file.partition('/')[0] for listed in files.values() for file in listed})
        target = {name: i for i, name in enumerate(classes)}
        targets = [target[file.partition('/')[0]] for file in files[split]]
        return _Index([f'Images/{file}' for file in files[split]], targets, classes)


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
        training = _official_split(type(self), split) == 'train'
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


def create_dataset(name: str, root: str | None = None, split: str = 'validation', *args: Any, **kwargs: Any) -> Dataset:
    """Makes a data set by name: `timm.data.create_dataset`, which also knows cub200, voc2012, mit67 and digits.

    Args:
        name: One of the four, or any name that timm knows.
        root: Where the official archive of cub200, voc2012 or mit67 was unpacked; digits has none.
        split: See `splits` of the classes; timm's words train and validation fit all.
        *args: As timm's.
        **kwargs: As timm's. Of these the four take `input_img_mode`, and the data set's own arguments;
            digits also takes `num_samples` and `seed`. Hints for iterable data sets change nothing.

    Raises:
        ValueError: One of the four is asked for `class_map`, `load_bytes` or `download`, or a root is missing or
            in excess.
    """
    if name not in _FOLDER_DATASETS and name != 'digits':
        return timm_create_dataset(name, root, split, *args, **kwargs)
    call = inspect.signature(timm_create_dataset).bind(name, root, split, *args, **kwargs)
    call.apply_defaults()
    options = call.arguments
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
    return _FOLDER_DATASETS[name](root, split, **own)


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


_FOLDER_DATASETS: dict[str, type[IndexedImages]] = {'cub200': CUB200, 'voc2012': VOC2012, 'mit67': MIT67}


def _official_split(data_set: type[IndexedImages] | type[DigitScenes], split: str) -> str:
    """The split that is meant: one of the data set's own, or another word of timm's for the first two."""
    training, evaluation = data_set.splits[:2]
    words = dict.fromkeys(('val', 'valid', 'validation', 'eval', 'evaluation'), evaluation) | {'training': training}
    words |= {name: name for name in data_set.splits}
    if split not in words:
        raise ValueError(f'{split!r} is no split of {data_set.__name__}, which has {", ".join(data_set.splits)}')
    return words[split]


def _rows(path: Path, *types: Callable[[str], Any]) -> Iterator[tuple]:
    """The rows of an index file, converted column by column; the last column may hold spaces."""
    try:
        lines = path.read_text(encoding='utf-8', errors='surrogateescape').splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f'{path} is missing') from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        values = line.strip().split(maxsplit=len(types) - 1)
        try:
            yield tuple(convert(value) for convert, value in zip(types, values, strict=True))
        except ValueError:
            expected = ', '.join(convert.__name__ for convert in types)
            raise ValueError(f'{path}, line {number}: {line!r} is not of the form {expected}') from None


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
    ink_value = 255. if light else 0.
    scene = (np.asarray(crop, dtype=np.float32) + 255. - ink_value) / 2  # half the contrast, far from the ink

    ink = Image.fromarray((scan * (255 / 16)).astype(np.uint8))
    ink = ink.crop(ink.getbbox())
    height = int(rng.integers(20, 41))
    width = round(height * ink.width / ink.height)
    left, top = int(rng.integers(_IMAGE_SIZE - width + 1)), int(rng.integers(_IMAGE_SIZE - height + 1))
    ink = ink.resize((width, height), Image.Resampling.BICUBIC)
    opacity = rng.uniform(0.4, 1.) * np.asarray(ink, dtype=np.float32)[..., None] / 255
    box = scene[top:top + height, left:left + width]
    box += opacity * (ink_value - box)
    return scene.round().astype(np.uint8), (left, top, left + width, top + height)
