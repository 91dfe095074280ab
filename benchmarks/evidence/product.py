"""The main row through the product's own commands: `castream train` with the recipe for one's own data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from timm_castream.datasets import image_name
from timm_castream.hub.load import open_model
from timm_castream.timm_scripts.arguments import find_recipe, read_recipe

from .setup import Setup

RECIPE = 'own_data.yaml'


def product_model(setup: Setup, seed: int, changes: Mapping[str, Any]) -> Any:
    """The network with a stream that `castream train` has trained, at the first call.

    It has the images of the cached maps and the fitted classifier.

    Args:
        setup: The run.
        seed: Of the training.
        changes: Options of the recipe that are changed.
    """
    folder = setup.work_dir / '-'.join(['product', *(f'{k}_{v}' for k, v in changes.items())])
    checkpoint = folder / f'seed{seed}' / 'last.pth.tar'
    network, classes = f'{setup.settings["network"]}_castream', len(setup.classes)
    if not (checkpoint.parent / 'finished').is_file():
        for part, split in (('train', 'train'), ('selection', 'val')):
            link_images(setup, part, folder / 'images' / split)
        recipe = folder / RECIPE
        recipe.write_text(yaml.safe_dump(read_recipe(find_recipe(RECIPE)) | dict(changes)), encoding='utf-8')
        options = {
            '-c': recipe,
            '--data-dir': folder / 'images',
            '--val-split': 'val',
            '--model': network,
            '--num-classes': classes,
            '--img-size': setup.settings['image_size'],
            '--model-kwargs': f'backbone_checkpoint={(setup.work_dir / "gap.safetensors").resolve()}',
            '--batch-size': setup.settings['batch_size'],
            '--seed': seed,
            '--workers': 1,
            '--device': 'cuda' if torch.cuda.is_available() else 'cpu',
            '--output': folder,
            '--experiment': f'seed{seed}',
        }
        words = [str(word) for option in options.items() for word in option]
        subprocess.run([sys.executable, '-m', 'timm_castream.cli', 'train', *words], check=True)
        (checkpoint.parent / 'finished').touch()
    return open_model(network, checkpoint=checkpoint, num_classes=classes).eval()


def link_images(setup: Setup, part: str, folder: Path) -> None:
    """A folder with a folder of each class, of links to the images of a part."""
    images = setup.images(part)
    for i, label in enumerate(setup.labels(part).tolist()):
        source = Path(image_name(images, i, absolute=True)).resolve()
        link = folder / setup.classes[label] / source.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(source)
