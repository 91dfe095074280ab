"""Image files: the one way to open them, and the order in which every command reads those of a folder.

Every command opens images by `open_image`, so that a network gets the same pixels wherever it meets a file.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}
"""Pillow's mode of an image by its number of channels."""

# Pillow opens these and cannot decode them, runs another program on them (EPS), or needs Windows (WMF).
_NOT_DECODED = frozenset({'BUFR', 'EPS', 'GRIB', 'HDF5', 'IPTC', 'MPEG', 'WMF'})
# Folders that operating systems and tools leave beside images. All names that begin with a dot are hidden too.
_HIDDEN = frozenset({'__MACOSX', '__pycache__', '@eaDir', '#recycle', '$RECYCLE.BIN', 'System Volume Information'})
_MODES_WITH_ALPHA = ('LA', 'La', 'PA', 'RGBA', 'RGBa')

_logger = logging.getLogger(__name__)


class _Plugin(NamedTuple):
    """A package that teaches Pillow a format."""

    format: str
    package: str
    module: str
    register: str | None  # function of the module; None: its import registers the format

    def __str__(self) -> str:
        return f'{self.format}, which Pillow reads after pip install {self.package}'


_HEIF = _Plugin('HEIC', 'pillow-heif', 'pillow_heif', 'register_heif_opener')
_JXL = _Plugin('JPEG XL', 'pillow-jxl-plugin', 'pillow_jxl', None)
_PLUGINS = {'.heic': _HEIF, '.heif': _HEIF, '.hif': _HEIF, '.jxl': _JXL}
_HEIF_BRANDS = (b'heic', b'heix', b'hevc', b'hevx', b'heim', b'heis', b'mif1', b'msf1')


class PluginNeededError(UnidentifiedImageError):
    """An image of a format that Pillow reads with a package which is not installed."""

    def __init__(self, message: str, plugin: _Plugin) -> None:
        super().__init__(f'{message}: it is {plugin}')
        self.plugin = plugin


def image_mode(channels: int) -> str:
    """Pillow's mode of the images that a network of so many input channels takes.

    Raises:
        ValueError: No image file of Pillow has so many channels.
    """
    if channels not in MODES:
        raise ValueError(
            f'The network takes images of {channels} channels, and image files are read with 1 to 4: give it tensors.'
        )
    return MODES[channels]


def open_image(source: str | os.PathLike | BinaryIO | Image.Image, mode: str | None = 'RGB') -> Image.Image:
    """An image as a network takes it.

    * It stands upright by its EXIF orientation. Of several frames or pages the first is read.
    * 16 bits a channel become 8: 65535 is 255, that is, values are divided by 257. Floating point numbers in [0, 1] are
      multiplied by 255, those in [0, 255] are kept. Other numbers, of 32 bits, have no fixed range and are scaled by the
      image's own.
    * Transparent pixels are laid over white, unless the mode has an alpha channel.

    Args:
        source: A path, an open file, or an image of Pillow's.
        mode: Pillow's mode of the result, see `image_mode`. None or '' leaves that of the file.

    Raises:
        OSError: The file is missing, damaged or no image; the message names the package that reads HEIC or JPEG XL.
    """
    if isinstance(source, Image.Image):
        return _converted(_upright(source), mode)
    if isinstance(source, (str, os.PathLike)):
        # Pillow 12.3 maps a grey TIFF that it is given by its path, and then turns pixels of the wrong rows.
        with open(source, 'rb') as file:
            return open_image(file, mode)
    try:
        with _opened(source) as image:
            image.load()  # decoding errors are raised here, outside of the guess about the EXIF data
            return _converted(_upright(image), mode)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # decoders raise about anything on a damaged file
        raise OSError(f'{type(error).__name__}: {error}') from error


def stored_orientation(source: Any) -> tuple[tuple[int, int], int, bool]:
    """How an image is stored, read from its header.

    Args:
        source: A path, an open file, or an image of Pillow's.

    Returns:
        Width and height as stored, the EXIF orientation from 1 to 8, and whether Pillow itself turns the image.
    """
    if isinstance(source, Image.Image):
        return source.size, _orientation(source), False
    if isinstance(source, (str, os.PathLike)):
        with open(source, 'rb') as file:
            return stored_orientation(file)
    with _opened(source) as image:
        orientation = _orientation(image)
        by_pillow = image.format == 'TIFF'  # its size is that of the upright image, and decoding turns the pixels
        width, height = reversed(image.size) if by_pillow and orientation > 4 else image.size
        return (width, height), orientation, by_pillow


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts names as timm does, by their numbers and without regard to case, and equal ones by their letters.

    timm's own key leaves names that differ in case or leading zeros alone in the order in which it met them.
    """
    parts = re.split(r'(\d+)', name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


class Skipped(NamedTuple):
    """Files of a folder that are not read as images.

    Attributes:
        kinds: How many there are of each ending, '' for names without one.
        hidden: Hidden files and folders, relative to the folder.
    """

    kinds: Counter[str]
    hidden: list[str]

    def __str__(self) -> str:
        words = []
        for ending, number in sorted(self.kinds.items(), key=lambda item: (-item[1], item[0])):
            plugin = _PLUGINS.get(ending)
            words.append(
                f'{number} {ending or "without an ending"}'
                + (f' (pip install {plugin.package} reads them)' if plugin else '')
            )
        return ', '.join(words)


def walk_images(folder: str | os.PathLike, endings: Collection[str] | None = None) -> tuple[list[str], Skipped]:
    """The image files below a folder in natural order, as paths relative to it with `/`, and what is no image.

    A file is an image by its ending. Hidden files and folders are left out: names that begin with a dot, and folders
    such as `__MACOSX`.

    Args:
        folder: Searched with all its folders; links to folders are followed.
        endings: Of images, in small letters. None: those that Pillow decodes, see `image_endings`.
    """
    files: list[str] = []
    skipped = Skipped(Counter(), [])
    for file in _walk(Path(folder), skipped):
        ending = os.path.splitext(file)[1].lower()
        if ending in (endings or image_endings()):
            files.append(file)
        else:
            skipped.kinds[ending] += 1
    # timm sorts whole paths, in which '/' is one letter among others.
    return sorted(files, key=natural_key), skipped


def holds_image(folder: str | os.PathLike) -> bool:
    """Whether there is an image file in a folder, at any depth."""
    endings = image_endings()
    return any(os.path.splitext(file)[1].lower() in endings for file in _walk(Path(folder), Skipped(Counter(), [])))


def _walk(root: Path, skipped: Skipped) -> Iterator[str]:
    """The files below a folder that are not hidden, relative to it."""
    for place, folders, names in os.walk(root, followlinks=True):
        below = Path(place).relative_to(root)
        hidden = [name for name in (*folders, *names) if is_hidden(name)]
        skipped.hidden.extend((below / name).as_posix() for name in hidden)
        folders[:] = [name for name in folders if name not in hidden and not _is_loop(Path(place, name))]
        yield from ((below / name).as_posix() for name in names if name not in hidden)


def find_images(folder: str | os.PathLike) -> list[Path]:
    """The image files below a folder in natural order. Files that are left out are counted in a warning.

    Raises:
        ValueError: If there is no such folder, or no such file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f'{str(folder)!r} is no folder.')
    files, skipped = walk_images(folder)
    warn_of_skipped(folder, skipped)
    if not files:
        raise ValueError(f'{str(folder)!r} has no images.')
    return [folder / file for file in files]


def warn_of_skipped(folder: str | os.PathLike, skipped: Skipped) -> None:
    """Counts the files that are no images by kind, and names hidden ones, in one line each."""
    if skipped.kinds:
        number = sum(skipped.kinds.values())
        _logger.warning(
            '%s: %d %s no image that is read and left out: %s.',
            folder,
            number,
            'file is' if number == 1 else 'files are',
            skipped,
        )
    if skipped.hidden:
        shown = ', '.join(skipped.hidden[:3]) + (', ...' if len(skipped.hidden) > 3 else '')
        _logger.warning('%s: hidden files and folders are left out: %s.', folder, shown)


@cache
def image_endings() -> frozenset[str]:
    """Endings of the files that are read as images, in small letters with their dot."""
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in _formats()}
    return frozenset(known | {ending for ending, plugin in _PLUGINS.items() if _is_installed(plugin.module)})


def is_hidden(name: str) -> bool:
    """Whether a file or a folder of this name is hidden."""
    return name.startswith('.') or name in _HIDDEN


def visible(names: Iterable[str]) -> Iterator[str]:
    """The names that are not hidden."""
    return (name for name in names if not is_hidden(name))


def _is_loop(path: Path) -> bool:
    """Whether a folder is a link to a folder that it lies in."""
    return path.is_symlink() and path.resolve() in path.absolute().parent.resolve().parents


@cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _formats() -> list[str]:
    Image.init()  # Pillow knows all its formats afterwards
    return [name for name in Image.ID if name not in _NOT_DECODED]


def _opened(source: BinaryIO) -> Image.Image:
    """An image that is opened and not decoded. The plugin of its format is registered where it is first needed."""
    try:
        return Image.open(source, formats=_formats())
    except UnidentifiedImageError as error:
        name = getattr(source, 'name', None)
        message = f'cannot identify image file {name!r}' if isinstance(name, str) else str(error)
        plugin = _plugin_for(source)
        if plugin is None:
            raise UnidentifiedImageError(message) from None
        try:
            module = importlib.import_module(plugin.module)
        except ImportError:
            raise PluginNeededError(message, plugin) from None
        if plugin.register:
            getattr(module, plugin.register)()
        return Image.open(source, formats=_formats())


def _plugin_for(source: BinaryIO) -> _Plugin | None:
    """The plugin that reads a file, by its first bytes."""
    source.seek(0)
    start = source.read(12)
    source.seek(0)
    if start[4:8] == b'ftyp' and start[8:12] in _HEIF_BRANDS:
        return _HEIF
    return _JXL if start.startswith((b'\xff\x0a', b'\x00\x00\x00\x0cJXL ')) else None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF data say nothing about the pixels
        return image


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # as in `_upright`
        value = image.getexif().get(0x0112, 1)
        return value if value in range(1, 9) else 1
    return 1


def _converted(image: Image.Image, mode: str | None) -> Image.Image:
    if not mode:
        return image
    if image.mode == 'LAB':
        image = ImageCms.profileToProfile(  # type: ignore[assignment]
            image, ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB'), outputMode='RGB'
        )
    elif image.mode[0] in 'IF':
        image = _eight_bits(image)
    if image.has_transparency_data and mode not in _MODES_WITH_ALPHA:
        image = image.convert('RGBA')
        white = Image.new('RGB', image.size, 'white')
        white.paste(image, mask=image.getchannel('A'))
        image = white
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits with 8, see `open_image`."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    transparent = image.info.get('transparency')
    alpha = None if not isinstance(transparent, int) else values != transparent
    low, high = values.min(), values.max()
    if image.mode[0] == 'F':
        values = values * 255 if low >= 0 and high <= 1 else values
        fits = low >= 0 and high <= 255
    else:
        values = values / 257 if low >= 0 and high <= 65535 else values
        fits = low >= 0 and high <= 65535
    if not fits:
        values = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    grey = Image.fromarray(np.floor(values + 0.5).astype(np.uint8))
    if alpha is not None:
        grey.putalpha(Image.fromarray(alpha.astype(np.uint8) * 255))
    return grey
