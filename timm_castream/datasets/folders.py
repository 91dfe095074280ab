"""A folder of images as a data set: which files are images, which folders are classes, and in which order.

    root/[split/]class/.../image

The class of an image is the first folder below the split's folder. Classes have the natural order of their names, or
the order of the training split beside them, or that of names that the caller gives, such as those of a network.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from timm.data import ImageDataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader

from .._utils.files import counted
from .classes import match_classes
from .image_files import holds_image, natural_key, open_image, visible, walk_images, warn_of_skipped

NO_TARGET = -1
"""Target of an image without a class, as timm's."""

TRAINING_WORDS = ('train', 'training')
EVALUATION_WORDS = ('val', 'valid', 'validation', 'eval', 'evaluation')
_SPLITS = (*TRAINING_WORDS, *EVALUATION_WORDS, 'test')

_logger = logging.getLogger(__name__)


def read_item(dataset: ImageDataset, index: int) -> tuple[Any, ...]:
    """Image, target and further features of a data set of timm's, whose image is opened by `open_image`.

    `ImageDataset` itself gives another image in place of one that cannot be read.

    Raises:
        OSError: The image cannot be read.
    """
    return _finished(dataset, *_opened(dataset, index))


class ImageFiles(ImageDataset):
    """timm's data set of image files, whose images are opened by `open_image`.

    As there, an image that cannot be read is replaced by the next one, with a warning: see `without_substitutes`.
    """

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        for _ in range(self._max_retries):
            try:
                opened = _opened(self, index)
                break
            except OSError as error:
                _logger.warning('%s is skipped: %s', self.filename(index), error)
                index = (index + 1) % len(self)
        else:
            raise RuntimeError(
                f'{self._max_retries} images in a row cannot be read, the last is {self.filename(index)}'
            )
        return _finished(self, *opened)


def _opened(dataset: Any, index: int) -> tuple[Any, ...]:
    file, target, *features = dataset.reader[index]
    with file:
        image = file.read() if dataset.load_bytes else open_image(file, dataset.input_img_mode)
    return image, target, *features


def _finished(dataset: Any, image: Any, target: Any, *features: Any) -> tuple[Any, ...]:
    image = image if dataset.transform is None else dataset.transform(image)
    if target is None:
        target = NO_TARGET
    elif dataset.target_transform is not None:
        target = dataset.target_transform(target)
    return (image, target) if dataset.additional_features is None else (image, target, *features)


class FolderReader(Reader):
    """Reads the images of a folder for timm's `ImageDataset`.

    Images that lie beside class folders, files that are no images and hidden ones are left out, and named or counted in
    a warning. A folder without class folders has images without a class: their target is `NO_TARGET`.

    Args:
        root: The folder of the split.
        class_map: From the name of a folder to an index, or a file that timm's `load_class_map` reads. An image belongs
            to the first of its folders that is in it. Images of other folders are left out and named.
        label_names: Names of the classes in the order of their indices. None: those of the training split beside the
            folder, or the folder's own.
        endings: Of image files. None: those that Pillow decodes.

    Attributes:
        samples: Path and target of every image.
        class_to_idx: From the name of a class to its index. Empty where no image has a class.
        present: The folders of classes that have images, in natural order. Empty with a class map.

    Raises:
        RuntimeError: There are no images.
        ValueError: A folder is no class of `label_names`, or it cannot be told which folders are classes.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        class_map: str | Mapping[str, int] | None = None,
        label_names: Sequence[str] | None = None,
        endings: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        self.root = str(root)
        self.present: list[str] = []
        files, skipped = walk_images(root, endings)
        warn_of_skipped(root, skipped)
        if not files:
            raise RuntimeError(f'{root} has no images' + (f', its files are {skipped}' if skipped.kinds else '') + '.')
        if class_map:
            self.class_to_idx = dict(load_class_map(class_map, self.root))
            targets = self._mapped(files)
        else:
            targets = self._first_folders(files, label_names)
        self.samples = [(os.path.join(self.root, file), target) for file, target in targets.items()]
        if not self.samples:
            raise RuntimeError(
                f'{root} has no images of the classes of the class map, such as {next(iter(self.class_to_idx), "none")!r}: '
                'its text file has the name of one folder a line, in the order of their indices.'
            )

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, target = self.samples[index]
        return open(path, 'rb'), target

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path if absolute else os.path.relpath(path, self.root)

    def _mapped(self, files: Sequence[str]) -> dict[str, int]:
        """The targets of the files with a folder in the class map."""
        targets: dict[str, int] = {}
        lost: Counter[str] = Counter()
        for file in files:
            folders = file.split('/')[:-1]
            name = next((folder for folder in folders if folder in self.class_to_idx), None)
            if name is None:
                lost[folders[0] if folders else ''] += 1
            else:
                targets[file] = self.class_to_idx[name]
        for name, number in sorted(lost.items()):
            _logger.warning(
                '%s: %s %s left out, the class map lacks it.',
                self.root,
                counted(number, 'image'),
                f'{f"of folder {name!r}" if name else "outside of class folders"} {"is" if number == 1 else "are"}',
            )
        return targets

    def _first_folders(self, files: Sequence[str], label_names: Sequence[str] | None) -> dict[str, int]:
        """The targets of the files by their first folders."""
        beside = [file for file in files if '/' not in file]
        inside = [file for file in files if '/' in file]
        if not inside:
            self.class_to_idx = {}
            return dict.fromkeys(beside, NO_TARGET)
        if len(beside) > len(inside):
            raise ValueError(
                f'{self.root} has {len(beside)} images beside its folders and {len(inside)} in them, so the folders are no '
                f'classes: move the images into folders of their classes, or the folders away.'
            )
        if beside:
            _logger.warning(
                '%s: %s beside the class folders without a class, such as %s: left out.',
                self.root,
                counted(len(beside), 'image'),
                beside[0],
            )
        _check_nested(self.root, inside)
        self.present = sorted({file.partition('/')[0] for file in inside}, key=natural_key)
        if label_names is None:
            label_names = _training_classes(self.root) or self.present
            if list(label_names) == self.present:
                _tell_order(self.root, self.present)
        indices = self._match(label_names)
        return {file: indices[file.partition('/')[0]] for file in inside}

    def set_label_names(self, label_names: Sequence[str], texts: Mapping[str, str] | None = None) -> None:
        """Gives the images the indices that their folders have in a list of names.

        Args, Raises: as of the constructor; texts as of `align_classes`.
        """
        before = {index: name for name, index in self.class_to_idx.items()}
        indices = self._match(label_names, texts)
        self.samples = [(path, indices[before[index]]) for path, index in self.samples]

    def _match(self, label_names: Sequence[str], texts: Mapping[str, str] | None = None) -> dict[str, int]:
        """The index of each folder, which becomes that of the class of its name."""
        indices = match_classes(self.present, label_names, f'The folder {self.root}', texts)
        spelt = {index: name for name, index in indices.items()}  # Unicode may write it in another way
        self.class_to_idx = {spelt.get(index, name): index for index, name in enumerate(label_names)}
        return indices


def class_folders(folder: str | os.PathLike) -> list[str]:
    """The folders in a folder that hold an image at any depth, in natural order."""
    return sorted((name for name in visible(os.listdir(folder)) if holds_image(Path(folder, name))), key=natural_key)


def split_folder(root: str | os.PathLike, split: str) -> Path:
    """The subfolder of a split, or the root itself where there is none.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The folder has other splits.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f'There is no folder {root}.')
    word = split.partition('[')[0]  # as timm reads it
    if not word:
        return root
    words = next((known for known in (TRAINING_WORDS, EVALUATION_WORDS) if word in known), ())
    for name in (word, *words):
        if name and (root / name).is_dir():
            return root / name
    # A split has a subfolder a class. A class may have the name of a split, and holds images alone.
    folders = [folder for folder in map(root.joinpath, _SPLITS) if folder.is_dir()]
    splits = [folder.name for folder in folders if any(entry.is_dir() for entry in folder.iterdir())]
    if splits:
        raise ValueError(f'{root} has no split {split!r}, it has {", ".join(splits)}')
    if word not in _SPLITS:
        raise ValueError(
            f'{root} has no split {split!r}; with train or validation it is read whole, since it has no splits'
        )
    return root


def _training_classes(root: str) -> list[str] | None:
    """The classes of the training split beside a split's folder, or None.

    A split that lacks a class then gives the others the indices that they have in training.
    """
    folder = Path(root)
    if folder.name not in (*EVALUATION_WORDS, 'test'):
        return None
    training = next((path for path in map(folder.parent.joinpath, TRAINING_WORDS) if path.is_dir()), None)
    names = class_folders(training) if training else []
    return names or None


def _check_nested(root: str, files: Sequence[str]) -> None:
    """Refuses folders of splits or folds, and says which class nested images belong to."""
    nested = [file for file in files if file.count('/') > 1]
    if not nested:
        return
    below: dict[str, set[str]] = defaultdict(set)
    for file in files:
        first, second, *rest = file.split('/')
        below[first].add(second if rest else '')
    shared = set.intersection(*below.values())
    if len(below) > 1 and len(shared) > 1 and '' not in set.union(*below.values()):
        names, common = sorted(below, key=natural_key), sorted(shared, key=natural_key)
        raise ValueError(
            f'{root} has the folders {_some(names)}, and each of them has the folders {_some(common)}: it cannot be told '
            'which of them are classes. Name the folder of one split, or pass a class map.'
        )
    _logger.warning(
        '%s: %s in folders inside of class folders, such as %s, which belongs to class %r.',
        root,
        '1 image lies' if len(nested) == 1 else f'{len(nested)} images lie',
        nested[0],
        nested[0].partition('/')[0],
    )


def _tell_order(root: str, names: Sequence[str]) -> None:
    """Says where the natural order of classes is not the plain one, which torchvision has."""
    plain = sorted(names)
    if plain == list(names):
        return
    place = next(i for i, (ours, theirs) in enumerate(zip(names, plain, strict=True)) if ours != theirs)
    _logger.warning(
        '%s: classes have the natural order of their names, in which class %d is %r; in the plain order of other '
        'software it is %r. A network trained in that order needs a class map.',
        root,
        place,
        names[place],
        plain[place],
    )


def _some(names: Sequence[str]) -> str:
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')
