#!/usr/bin/env bash
# grad-cam 1.5.7: FullGrad gives another map for a network whose outputs are equal.
#
# FullGrad sums the contributions of all biases. It looks for them in modules whose type is exactly nn.Conv2d or
# nn.BatchNorm2d. Biases of every other type are left out without a word: SyncBatchNorm, LayerNorm, Linear, and
# subclasses such as timm's BatchNormAct2d, in which timm's EfficientNets have all their biases.
# Here a ResNet is converted by torch's own convert_sync_batchnorm: same outputs to the last bit, another map.
# Seen with Python 3.11, torch 2.14.1, torchvision 0.29.1. These and the other requirements come from the environment.
# Ends with 0 while the behaviour is as described, and with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install --quiet --no-deps --target "$folder" grad-cam==1.5.7 ttach==0.0.3
PYTHONPATH=$folder python - <<'PY'
import copy

import numpy as np
import torch
from pytorch_grad_cam import FullGrad
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torchvision.models import resnet18

torch.manual_seed(0)
model = resnet18(weights=None).eval()
with torch.no_grad():
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: a bias that is not 0
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.3, 0.3)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()
x = torch.randn(1, 3, 64, 64)
outputs = (model(x) - converted(x)).abs().max().item()
first, second = (FullGrad(network, [])(x, [ClassifierOutputTarget(3)])[0] for network in (model, converted))
difference = np.abs(first - second).max()
correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
print(f'torch {torch.__version__}, grad-cam 1.5.7')
print(f'largest difference of the outputs: {outputs}')  # 0.0
print(f'largest difference of the maps in [0, 1]: {difference:.2f}, correlation {correlation:.2f}')  # 0.97, 0.39
if outputs > 1e-5 or difference < 0.2:
    raise SystemExit('The behaviour has changed.')
PY
