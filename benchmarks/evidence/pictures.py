"""Photographs that may be published, with attention and Grad-CAM of both poolings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor

from timm_castream.attribution import attribute_all
from timm_castream.datasets import open_image
from timm_castream.datasets.photographs import photographs
from timm_castream.hub.label_names import class_name
from timm_castream.visualize import Panel, denormalised, draw_grid, overlay

from .choice import recipe_of
from .setup import Setup

STREAM, SEED = 'gap_start', 0
PHOTOGRAPHS = ('chelsea', 'coffee', 'flower', 'china')
SCALE = 2  # times the image size of the experiments: finer maps
COLUMNS = {
    'attention of the last stage': ('ca', 'attention'),
    'Grad-CAM, GAP': ('gap', 'grad_cam'),
    'Grad-CAM, CA': ('ca', 'grad_cam'),
}


def draw_strip(setup: Setup, page: Path) -> None:
    """Draws the photographs beside the page, and writes `strip.json`.

    Two pictures: attention and Grad-CAM under a stream trained on all classes; and, for the photographs of a class that
    a stream trained on half of the classes never saw, the attention of both streams.

    Args:
        setup: The run.
        page: The page that shows them.
    """
    recipe, name = recipe_of(setup, STREAM), f'{STREAM}-{SEED}'
    model, _ = setup.stream(STREAM, SEED, recipe, name)
    cfg = {name: model.pretrained_cfg[name] for name in ('mean', 'std', 'interpolation')}
    transform = create_transform((3, *2 * [SCALE * setup.settings['image_size']]), crop_pct=1.0, **cfg)
    files = {path.stem: path for path in photographs()}
    x = torch.stack([transform(open_image(files[name])) for name in PHOTOGRAPHS])
    with torch.no_grad():
        target = setup.gap_model()(x).argmax(1)
    maps = attribute_all(model, x, ('attention', 'grad_cam'), target, ('gap', 'ca'))
    pixels = denormalised(model, x)
    page.parent.mkdir(parents=True, exist_ok=True)
    draw({title: maps[key] for title, key in COLUMNS.items()}, pixels, page.with_name(f'{page.stem}_strip.jpg'))
    facts = {
        'stream': STREAM,
        'seed': SEED,
        'pixels': x.shape[-1],
        'columns': '; '.join(['photograph', *COLUMNS]),
        'classes': [class_name(model, i) for i in target.tolist()],
    }
    unseen = (~torch.isin(target, torch.tensor(setup.half_of_classes))).nonzero()[:, 0]
    if len(unseen):
        half, _ = setup.stream(STREAM, SEED, recipe, f'{name}-half', classes=setup.half_of_classes)
        new = attribute_all(half, x[unseen], ('attention',), target[unseen], ('ca',))['ca', 'attention']
        columns = {
            'attention, trained on all classes': maps['ca', 'attention'][unseen],
            'attention, class never seen': new,
        }
        draw(columns, [pixels[i] for i in unseen.tolist()], page.with_name(f'{page.stem}_unseen.jpg'))
        facts |= {
            'unseen_columns': '; '.join(['photograph', *columns]),
            'unseen_classes': [facts['classes'][i] for i in unseen.tolist()],
        }
    setup.write(setup.results_dir / 'strip.json', facts)


def draw(columns: dict[str, Tensor], pixels: Sequence[np.ndarray], path: Path) -> None:
    """One row a photograph: the photograph, then each column's map over it."""
    rows = [
        [Panel('photograph', image), *(Panel(title, overlay(image, m)) for title, m in zip(columns, maps, strict=True))]
        for image, *maps in zip(pixels, *columns.values(), strict=True)
    ]
    draw_grid(rows).save(path, quality=88)
