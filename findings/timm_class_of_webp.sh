#!/usr/bin/env bash
# timm 1.0.31: a class folder whose images are all WebP is no class, and the classes after it get other labels.
#
# create_dataset reads .png, .jpg and .jpeg. A validation split in which one class has WebP files alone has a class
# less than the training split, so each later class is scored as the one before it. Nothing is printed.
# torchvision's ImageFolder reads WebP and gives all three classes.
# Seen with Python 3.11, torch 2.14.1. torch comes from the environment, timm from a temporary folder.
# Ends with 0 while the behaviour is as described, and with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install --quiet --no-deps --target "$folder/packages" timm==1.0.31
PYTHONPATH=$folder/packages IMAGES=$folder/images python - <<'PY'
import os
from pathlib import Path

import timm
import torchvision
from PIL import Image
from timm.data import create_dataset

root = Path(os.environ['IMAGES'])
for split, endings in (('train', 'png png png'), ('val', 'png webp png')):
    for name, ending in zip('abc', endings.split(), strict=True):
        (root / split / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(root / split / name / f'0.{ending}')
found = {split: create_dataset('', str(root / split)).reader.class_to_idx for split in ('train', 'val')}
others = torchvision.datasets.ImageFolder(root / 'val').class_to_idx
print(f'timm {timm.__version__}: train {found["train"]}, val {found["val"]}')
print(f'torchvision {torchvision.__version__}: val {others}')
if found != {'train': {'a': 0, 'b': 1, 'c': 2}, 'val': {'a': 0, 'c': 1}} or others != {'a': 0, 'b': 1, 'c': 2}:
    raise SystemExit('The behaviour has changed.')
PY
