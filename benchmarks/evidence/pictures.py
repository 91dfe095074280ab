"""A strip of photographs that may be published, with attention and Grad-CAM of both poolings."""
from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform

from timm_castream.attribution import attribute_all
from timm_castream.visualize import Panel, denormalised, draw_grid, overlay

from .choice import recipe_of
from .setup import Setup

PHOTOGRAPHS = ('china.jpg', 'flower.jpg')
STREAM, SEED = 'gap_start', 0
SCALE = 2  # times the image size of the experiments: finer maps


def draw_strip(setup: Setup, page: Path) -> None:
    """Draws scikit-learn's photographs beside the page, and writes `strip.json`.

    Args:
        setup: The run.
        page: The page that shows the strip.
    """
    from sklearn.datasets import load_sample_image  # in the extra demo

    model, _ = setup.stream(STREAM, SEED, recipe_of(setup, STREAM), f'{STREAM}-{SEED}')
    size = SCALE * setup.settings['image_size']
    cfg = model.pretrained_cfg
    transform = create_transform(
        (3, size, size), mean=cfg['mean'], std=cfg['std'], interpolation=cfg['interpolation'], crop_pct=1.)
    x = torch.stack([transform(Image.fromarray(load_sample_image(name))) for name in PHOTOGRAPHS])
    with torch.no_grad():
        target = setup.gap_model()(x).argmax(1)
    info = ImageNetInfo()
    known = info.label_names()
    names = [setup.image_set.classes[i] for i in target.tolist()]
    classes = [info.label_name_to_description(name, detailed=False) if name in known else name for name in names]
    maps = attribute_all(model, x, ('attention', 'grad_cam'), target, ('gap', 'ca'))
    columns = {
        'attention of the last stage': ('ca', 'attention'), 'Grad-CAM, GAP': ('gap', 'grad_cam'),
        'Grad-CAM, CA': ('ca', 'grad_cam')}
    rows = []
    for i, pixels in enumerate(denormalised(model, x)):
        rows.append([Panel('photograph', pixels), *(
            Panel(title, overlay(pixels, maps[key][i])) for title, key in columns.items())])
    page.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(rows).savefig(page.with_name(f'{page.stem}_strip.jpg'), pil_kwargs={'quality': 88})
    setup.write(setup.results_dir / 'strip.json', {
        'stream': STREAM, 'seed': SEED, 'pixels': size, 'columns': '; '.join(['photograph', *columns]),
        'classes': classes})
