#!/usr/bin/env bash
# Quantus 0.6.0: ROAD raises IndexError on colour images; 0.5.3 measured them.
#
# 0.6.0 measures a batch at once, and repeats the map for every channel of the image before it sorts. The places then count
# through all channels, while the imputation counts through the pixels of one. A map of one channel and a map of three fail
# alike. Images of one channel, as in the digits of the tutorials, work as before. 0.5.3 takes colour images with maps of one
# channel, and fails with maps of three.
# Seen with Python 3.11, torch 2.14.1, numpy 2.4.6, pandas 3.1.1, scikit-image 0.26.0. These, scipy, scikit-learn and OpenCV
# come from the environment.
# Ends with 0 while the behaviour is as described, and with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 0.5.3 0.6.0; do
  python -m pip install --quiet --no-deps --target "$folder/$version" "quantus==$version" cachetools==6.2.0
  PYTHONPATH=$folder/$version python -W ignore - "$version" <<'PY'
import sys

import numpy as np
import quantus
import torch
from torch import nn

version = sys.argv[1]
random = np.random.default_rng(0)
found = {}
for channels in (1, 3):
    for of_map in sorted({1, channels}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(channels * 16 * 16, 5)).eval()
        x = random.random((4, channels, 16, 16), dtype=np.float32)
        target = model(torch.from_numpy(x)).argmax(1).numpy()
        maps = np.repeat(random.random((4, 1, 16, 16), dtype=np.float32), of_map, 1)
        road = quantus.ROAD(percentages=[10, 50, 90], disable_warnings=True)
        try:
            scores = road(model=model, x_batch=x, y_batch=target, a_batch=maps, device='cpu')
            found[channels, of_map] = f'scores at {list(scores)} %'
        except IndexError as error:
            found[channels, of_map] = f'IndexError: {error}'
        print(f'Quantus {version}, images of {channels} channel(s), maps of {of_map}: {found[channels, of_map]}')
fails = [shape for shape, outcome in found.items() if outcome.startswith('IndexError')]
if fails != {'0.5.3': [(3, 3)], '0.6.0': [(3, 1), (3, 3)]}[version]:
    raise SystemExit(f'The behaviour of {version} has changed.')
PY
done
