"""The main row through the product's own commands: `castream train` with the recipe for one's own data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from timm_castream.hub.load import open_model
from timm_castream.timm_scripts.arguments import find_recipe, read_recipe

from .images import Sample
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
    recipe = RECIPE
    if changes:
        folder.mkdir(parents=True, exist_ok=True)
        recipe = str(folder / RECIPE)
        Path(recipe).write_text(yaml.safe_dump(read_recipe(find_recipe(RECIPE)) | dict(changes)), encoding='utf-8')
    checkpoint = folder / f'seed{seed}' / 'last.pth.tar'
    network, classes = f'{setup.settings["network"]}_castream', setup.num_classes
    if not (checkpoint.parent / 'finished').is_file():
        link_images(setup.samples('train'), setup.image_set.classes, folder / 'images' / 'train')
        link_images(setup.samples('selection'), setup.image_set.classes, folder / 'images' / 'val')
        options = {
            '--data-dir': folder / 'images',
            '--val-split': 'val',
            '--model': network,
            '--num-classes': classes,
            '--img-size': setup.settings['image_size'],
            '--model-kwargs': f'backbone_checkpoint={setup.gap_weights.resolve()}',
            '--batch-size': setup.settings['batch_size'],
            '--seed': seed,
            '--workers': 1,
            '--device': 'cuda' if torch.cuda.is_available() else 'cpu',
            '--output': folder,
            '--experiment': f'seed{seed}',
        }
        words = [str(word) for option in options.items() for word in option]
        subprocess.run([sys.executable, '-m', 'timm_castream.cli', 'train', '-c', recipe, *words], check=True)
        (checkpoint.parent / 'finished').touch()
    return open_model(network, checkpoint=checkpoint, num_classes=classes).eval()


def link_images(samples: list[Sample], classes: tuple[str, ...], folder: Path) -> None:
    """A folder with a folder of each class, of links to the images."""
    for sample in samples:
        path = folder / classes[sample.label] / sample.path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_symlink():
            path.symlink_to(sample.path.resolve())
