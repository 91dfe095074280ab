#!/usr/bin/env bash
# Quantus 0.6.0: Monotonicity is True for every map.
#
# The metric (arXiv 1909.03012) starts with an empty image, brings the features of the photograph back in the order of the
# map, and asks whether the probability never falls. Quantus fills the image with the baseline value, and then replaces the
# features in the order of the map by the same baseline value. The photograph never comes back: all probabilities are
# equal, and their differences are 0. A model whose probability falls with every feature gives True too, and so does the
# map with the opposite order, whatever the step.
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
import torch
from torch import nn


class Falling(nn.Module):
    """Two logits: 0, and minus the sum of the image. The probability of the second falls with every pixel that is added."""

    def forward(self, x):
        total = x.sum((1, 2, 3))
        return torch.stack([torch.zeros_like(total), -0.1 * total], 1)


def monotonic(model, image, cam, target, step):
    """The definition: the features come back in ascending order of the map. "Black" is the image's least value there."""
    order = np.argsort(cam.ravel())
    now, inputs = np.full(image.size, image.min(), np.float32), []
    for start in range(0, len(order), step):
        now[order[start : start + step]] = image.ravel()[order[start : start + step]]
        inputs.append(torch.from_numpy(now.reshape(1, *image.shape).copy()))
    with torch.no_grad():
        values = [model(x).softmax(1)[0, target].item() for x in inputs]
    return all(b >= a for a, b in zip(values, values[1:]))


random = np.random.default_rng(0)
x = random.random((4, 1, 8, 8), dtype=np.float32) + 0.5
maps = random.random((4, 1, 8, 8), dtype=np.float32)
model, target = Falling().eval(), np.ones(4, int)
theirs, ours = [], []
for step in (1, 8):
    for cam in (maps, 1 - maps):
        metric = quantus.Monotonicity(features_in_step=step, perturb_baseline='black', normalise=False, disable_warnings=True)
        theirs += metric(model=model, x_batch=x, y_batch=target, a_batch=cam, device='cpu', softmax=True)
        ours += [monotonic(model, image, one, 1, step) for image, one in zip(x, cam)]
print(f'Quantus 0.6.0: {sum(map(bool, theirs))} of {len(theirs)} are True; by the definition {sum(ours)} of {len(ours)}')
if not all(theirs) or any(ours):
    raise SystemExit('The behaviour has changed.')
PY
