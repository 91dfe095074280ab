#!/usr/bin/env bash
# pytorch-grad-cam 1.5.7: FinerCAM with targets, as every other method of the library is called, is Grad-CAM.
#
# FinerCAM compares a class with the classes whose scores are nearest to it. It builds that comparison only where targets
# is None, and then takes one target_idx for the whole batch. With targets=[ClassifierOutputTarget(c)] no class is compared,
# and alpha and comparison_categories are read by nothing: the map is that of the base method, digit by digit. No warning
# names it. A benchmark that loops over the classes of the library measures Grad-CAM under two names.
# Seen with Python 3.11, torch 2.14.1, numpy 2.4.6. These, and what grad-cam imports, come from the environment.
# Ends with 0 while the behaviour is as described, and with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install --quiet --no-deps --target "$folder" grad-cam==1.5.7 ttach==0.0.3
PYTHONPATH=$folder python -W ignore - <<'PY'
import numpy as np
import torch
from pytorch_grad_cam import FinerCAM, GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    nn.Linear(16, 10),
).eval()
x = torch.randn(1, 3, 64, 64)
targets = [ClassifierOutputTarget(3)]
plain = GradCAM(model, [model[3]])(x, targets)
given = FinerCAM(model, [model[3]])(x, targets)
scaled = FinerCAM(model, [model[3]])(x, targets, alpha=0.1, comparison_categories=[5])
compared = FinerCAM(model, [model[3]])(x, target_idx=3)
print(f'torch {torch.__version__}, grad-cam 1.5.7; largest differences of maps in [0, 1]')
print(f'FinerCAM with targets and Grad-CAM: {np.abs(given - plain).max():.1e}')
print(f'the same with alpha=0.1 and another comparison: {np.abs(scaled - plain).max():.1e}')
print(f'FinerCAM with target_idx and Grad-CAM: {np.abs(compared - plain).max():.3f}')
if np.abs(given - plain).max() > 1e-6 or np.abs(scaled - plain).max() > 1e-6:
    raise SystemExit('Targets are compared now.')
if np.abs(compared - plain).max() < 0.05:
    raise SystemExit('The behaviour has changed.')
PY
