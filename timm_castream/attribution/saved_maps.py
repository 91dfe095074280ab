"""Saved maps with the names of their images: a `.npz` file, or a folder of `.npy` files."""

from __future__ import annotations

import os
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

_NUM_SHOWN = 3


def read_maps(path: str | os.PathLike, names: Sequence[str]) -> np.ndarray:
    """Maps in the order of the images.

    A map belongs to the image of its name: the path below the folder of the split, `cat/9.png`, with or without the
    ending. In a folder `cat/9.png.npy` and `cat/9.npy` are its files.

    Args:
        path: A `.npy` file with an array (N, h, w), whose maps have the order of the images already; a `.npz` file with
            an array (h, w) an image, or the one array of a `.npy`; or a folder of `.npy` files.
        names: Names of the N images.

    Returns:
        (N, h, w).

    Raises:
        ValueError: If there is no such file, it is damaged, or an image has no map of its name, or several.
    """
    path = Path(path)
    if path.is_dir():
        files = {file.relative_to(path).as_posix().removesuffix('.npy'): file for file in path.rglob('*.npy')}
        if not files:
            raise ValueError(f'The folder {path} holds no .npy files, one map an image.')
        owners = _owners(path, files, names)
        return _stacked(path, names, (np.asarray(_load(files[key])) for key in owners))
    loaded = _load(path)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        keys = {key.removesuffix('.npy'): key for key in loaded.files}
        if len(keys) == 1 and len(names) != 1:
            only = _read(path, partial(loaded.__getitem__, loaded.files[0]))
            if only.ndim == 3:
                return only
        owners = _owners(path, keys, names)
        return _stacked(path, names, (_read(path, partial(loaded.__getitem__, keys[key])) for key in owners))


def _load(path: Path) -> Any:
    return _read(path, partial(np.load, path, allow_pickle=False))


def _read(path: Path, read: Callable[[], Any]) -> Any:
    """What a function reads of a file; the arrays of a `.npz` are decoded where they are taken."""
    try:
        return read()
    except FileNotFoundError:
        raise ValueError(f'There is no file {path}, which --maps names.') from None
    except (EOFError, ValueError, OSError, zipfile.BadZipFile, zlib.error):
        raise ValueError(f'{path} is no array saved by numpy.save or numpy.savez, which --maps takes.') from None


def _owners(path: Path, keys: Iterable[str], names: Sequence[str]) -> list[str]:
    """The key of the map of each image."""
    by_name = {_plain(key): key for key in keys}
    stems = [_plain(_stem(name)) for name in names]
    owners: list[str] = []
    missing: list[str] = []
    for name, stem in zip(names, stems, strict=True):
        key = by_name.get(_plain(name))
        if key is None and stems.count(stem) == 1:
            key = by_name.get(stem)
        if key is None:
            missing.append(name)
        else:
            owners.append(key)
    if missing:
        more = ', ...' if len(missing) > _NUM_SHOWN else ''
        raise ValueError(
            f'{path} has no map for {len(missing)} of the {len(names)} images: {", ".join(missing[:_NUM_SHOWN])}{more}; '
            f'its names are {", ".join(list(by_name)[:_NUM_SHOWN])}{", ..." if len(by_name) > _NUM_SHOWN else ""}. '
            'castream list-images writes the names of the images.'
        )
    return owners


def _stacked(path: Path, names: Sequence[str], maps: Iterable[np.ndarray]) -> np.ndarray:
    found: list[np.ndarray] = []
    for name, values in zip(names, maps, strict=True):
        if values.ndim == 3 and values.shape[0] == 1:
            values = values[0]
        if values.ndim != 2 or (found and values.shape != found[0].shape):
            size = f' as the first, {found[0].shape}' if found else ''
            raise ValueError(f'The map of {name} in {path} has shape {values.shape}; each must be (h, w){size}.')
        found.append(values)
    return np.stack(found)


def _plain(name: str) -> str:
    return unicodedata.normalize('NFC', name.replace('\\', '/').removeprefix('./'))


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(''))
