"""The photographs that the streams of the package are fitted to, and those that are kept back."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from timm_castream.datasets.image_files import find_images

THUMBNAIL = 16
LIKENESS = 0.93
"""Correlation of two thumbnails from which on one photograph counts as a copy of the other. Pairs of one class had 0.95 or more, or at most 0.927."""


def draw_images(settings: dict[str, Any], sources: Path, output: Path) -> list[Path]:
    """Hard links to some of the images of every set. Copies of images that are kept back are left out.

    Args:
        settings: `fit.yaml`.
        sources: The folder of the image sets.
        output: Gets `images/<set>/`.

    Returns:
        The folder of each set.
    """
    kept_back = [file for source in settings['kept_back'] for file in find_images(sources / source['folder'])]
    others = np.concatenate([thumbnails(kept_back, whole) for whole in (False, True)])
    folders = []
    for source in settings['images']:
        root, folder = sources / source['folder'], output / 'images' / source['name']
        files = sorted(find_images(root), key=str)
        random.Random(settings['seed']).shuffle(files)
        files = files[: source['count']]
        copies = (thumbnails(files) @ others.T).max(1) >= LIKENESS
        for file, is_copy in zip(files, copies, strict=True):
            link = folder / file.relative_to(root)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not (is_copy or link.exists()):
                link.hardlink_to(file)
        print(
            f'{source["name"]}: {int((~copies).sum())} images, {int(copies.sum())} copies of images kept back left out'
        )
        folders.append(folder)
    return folders


def thumbnails(files: Sequence[Path], whole: bool = True) -> np.ndarray:
    """(N, 256) grey thumbnails whose products are correlations: of the whole image, or of the square at its centre."""
    rows = np.zeros((len(files), THUMBNAIL * THUMBNAIL), np.float32)
    for row, file in zip(rows, files, strict=True):
        image = Image.open(file)
        image.draft('L', (4 * THUMBNAIL, 4 * THUMBNAIL))
        image = image.convert('L')
        if not whole:
            (width, height), side = image.size, min(image.size)
            left, top = (width - side) // 2, (height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        row[:] = np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)).ravel()
        row -= row.mean()
        row /= max(float(np.linalg.norm(row)), 1e-6)
    return rows


def halves(settings: dict[str, Any], sources: Path) -> tuple[list[Path], list[Path]]:
    """The photographs of *samples*, one of each class: those that settings are chosen on, and those that are kept back.

    Args:
        settings: `fit.yaml`.
        sources: The folder of the image sets.

    Returns:
        The files of the classes with an even index among ImageNet's, and those with an odd one.
    """
    folder = next(source['folder'] for source in settings['kept_back'] if source['name'] == 'samples')
    files = sorted(find_images(sources / folder), key=lambda file: file.name)
    return files[::2], files[1::2]


def link_kept_back(settings: dict[str, Any], sources: Path, output: Path) -> dict[str, Path]:
    """Hard links to the photographs of the final measurement, in folders of their classes.

    Args:
        settings: `fit.yaml`.
        sources: The folder of the image sets.
        output: Gets `kept_back/<set>/<WordNet id>/`.

    Returns:
        The folder of each set: *samples*, the half that no setting was chosen on, and *val*.
    """
    files = {'samples': halves(settings, sources)[1], 'val': []}
    for source in settings['kept_back']:
        if source['name'] != 'samples':
            found = sorted(find_images(sources / source['folder']), key=str)
            files['val'] += random.Random(settings['seed']).sample(found, source['count'])
    folders = {name: output / 'kept_back' / name for name in files}
    for name, folder in folders.items():
        for file in files[name]:
            link = folder / wordnet_id(file) / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.hardlink_to(file)
    return folders


def wordnet_id(file: Path) -> str:
    """The class of a photograph: its folder, or what stands before its name in a flat folder."""
    return file.parent.name if file.parent.name[1:].isdigit() else file.name.partition('_')[0]
