"""Settings and made data of `--quick`: the whole program on squares, circles and crosses, in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

QUICK_SETTINGS = Path(__file__).with_name('quick.yaml')
SHAPES = ('circle', 'cross', 'diamond', 'square')


def make_data(folder: Path, train: int = 12, val: int = 16, seed: int = 0) -> Path:
    """Writes a folder in Tiny ImageNet's layout: one shape an image, with its box.

    Args:
        folder: The folder.
        train: Training images of each class.
        val: Validation images.
        seed: Of places, sizes and colours.

    Returns:
        The folder.
    """
    rng = np.random.default_rng(seed)
    for shape in SHAPES:
        images = folder / 'train' / shape / 'images'
        images.mkdir(parents=True, exist_ok=True)
        rows = []
        for i in range(train):
            image, box = draw(shape, rng)
            image.save(images / f'{shape}_{i}.JPEG')
            rows.append('\t'.join([f'{shape}_{i}.JPEG', *map(str, box)]))
        (images.parent / f'{shape}_boxes.txt').write_text('\n'.join(rows) + '\n', encoding='utf-8')
    (folder / 'wnids.txt').write_text('\n'.join(SHAPES) + '\n', encoding='utf-8')
    (folder / 'val' / 'images').mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(val):
        shape = SHAPES[i % len(SHAPES)]
        image, box = draw(shape, rng)
        image.save(folder / 'val' / 'images' / f'val_{i}.JPEG')
        lines.append('\t'.join([f'val_{i}.JPEG', shape, *map(str, box)]))
    (folder / 'val' / 'val_annotations.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return folder


def draw(shape: str, rng: np.random.Generator) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """One 64 x 64 image of a shape on noise, and its box; the ends are pixels inside."""
    image = Image.fromarray(rng.integers(0, 60, (64, 64, 3), dtype=np.uint8))
    side = int(rng.integers(16, 32))
    x, y = (int(v) for v in rng.integers(0, 64 - side, 2))
    end_x, end_y, half = x + side - 1, y + side - 1, side // 2
    colour = tuple(int(v) for v in rng.integers(150, 256, 3))
    pen = ImageDraw.Draw(image)
    if shape == 'circle':
        pen.ellipse((x, y, end_x, end_y), fill=colour)
    elif shape == 'square':
        pen.rectangle((x, y, end_x, end_y), fill=colour)
    elif shape == 'diamond':
        pen.polygon([(x + half, y), (end_x, y + half), (x + half, end_y), (x, y + half)], fill=colour)
    else:
        pen.line((x, y, end_x, end_y), fill=colour, width=4)
        pen.line((x, end_y, end_x, y), fill=colour, width=4)
    return image, (x, y, end_x, end_y)
