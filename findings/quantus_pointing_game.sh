#!/usr/bin/env bash
# Quantus 0.6.0: the Pointing Game counts an image with an empty segmentation as a hit.
#
# The hits of a batch are a boolean array. For an empty segmentation Quantus writes NaN into it, as the comment beside it
# says, and NaN becomes True. So a data set in which some images lack the object looks better. The neighbours of the metric
# with the same comment, Relevance Rank Accuracy for one, do give NaN. `weighted=True` raises TypeError.
# Seen with Python 3.11, torch 2.14.1, numpy 2.4.6, pandas 3.1.1, scikit-image 0.26.0. These, scipy, scikit-learn and OpenCV
# come from the environment.
# Ends with 0 while the behaviour is as described, and with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install --quiet --no-deps --target "$folder" quantus==0.6.0 cachetools==6.2.0
PYTHONPATH=$folder python -W ignore - <<'PY'
import numpy as np
import quantus
from torch import nn

x = np.zeros((4, 1, 8, 8), np.float32)
maps = np.zeros((4, 1, 8, 8), np.float32)
maps[:, 0, 2, 2] = 1  # every map points at (2, 2)
objects = np.zeros((4, 1, 8, 8), int)
objects[0, 0, 2, 2] = 1  # one pixel: hit
objects[1, 0, 0:7, 0:8] = 1  # 56 of 64 pixels: hit
objects[2, 0, 7, 7] = 1  # missed
# objects[3] is empty
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
data = {'model': model, 'x_batch': x, 'y_batch': np.zeros(4, int), 'a_batch': maps, 's_batch': objects, 'device': 'cpu'}
hits = [float(value) for value in quantus.PointingGame(disable_warnings=True)(**data)]
ranks = [float(value) for value in quantus.RelevanceRankAccuracy(disable_warnings=True)(**data)]
try:
    weighted = quantus.PointingGame(weighted=True, disable_warnings=True)(**data)
except TypeError as error:
    weighted = f'TypeError: {error}'
print(f'Quantus 0.6.0, Pointing Game: {hits}; the text says NaN for the last, which has no object')
print(f'Relevance Rank Accuracy: {[round(value, 3) for value in ranks]}')
print(f'Pointing Game, weighted: {weighted}')
if hits != [1, 1, 0, 1] or not np.isnan(ranks[3]) or not str(weighted).startswith('TypeError'):
    raise SystemExit('The behaviour has changed.')
PY
