#!/usr/bin/env bash
# grad-cam 1.5.7: on a network with negative activations the maps of AblationCAM depend on batch_size.
#
# Where the smallest activation is not 0, an ablated channel is set to the minimum of the whole batch minus 1e7. The
# batch holds the same image for several channels, and the minimum is taken again after each of them: the first channel
# gets about -1e7, the second -2e7, and so on. How far a channel is moved depends on its place in the batch.
# Networks with GELU or SiLU (ConvNeXt, EfficientNet, Swin) are of this kind.
# Seen with Python 3.11, torch 2.14.1. torch and the other requirements come from the environment.
# Ends with 0 while the behaviour is as described, and with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install --quiet --no-deps --target "$folder" grad-cam==1.5.7 ttach==0.0.3
PYTHONPATH=$folder python - 2>/dev/null <<'PY'
import numpy as np
import torch
from pytorch_grad_cam import AblationCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn


def maps(activation, batch_size):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2), nn.GELU(), nn.Conv2d(16, 16, 3, 2), activation, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    return AblationCAM(model, [model[3]], batch_size=batch_size)(x, [ClassifierOutputTarget(3)])


print(f'torch {torch.__version__}, grad-cam 1.5.7')
found = {}
for activation in (nn.ReLU(), nn.GELU()):
    name = type(activation).__name__
    found[name] = np.abs(maps(activation, 1) - maps(activation, 16)).max()
    print(f'{name}: largest difference between batch_size=1 and batch_size=16 of a map in [0, 1]: {found[name]:.3f}')
if found['ReLU'] > 1e-3 or found['GELU'] < 0.05:
    raise SystemExit('The behaviour has changed.')
PY
