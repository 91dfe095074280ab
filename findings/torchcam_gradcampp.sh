#!/usr/bin/env bash
# torch-cam 0.5.0: GradCAMpp does not divide by the denominator of Grad-CAM++ (arXiv 1710.11063, eq. 19).
#
# The weights of the channels should be sum alpha relu(g), alpha = g^2 / (2 g^2 + g^3 sum(A)). The division is made in
# place on a copy that a mask has selected, so alpha stays g^2, and the map is that of sum g^2 relu(g).
# Seen with Python 3.11, torch 2.14.1. torch comes from the environment, torch-cam from a temporary folder.
# Ends with 0 while the behaviour is as described, and with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install --quiet --no-deps --target "$folder" torchcam==0.5.0
PYTHONPATH=$folder python - <<'PY'
import torch
from torch import nn
from torchcam.methods import GradCAMpp

torch.manual_seed(0)
# The gradient at layer 4 differs between its locations, and its activations are positive.
model = nn.Sequential(
    nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(4), nn.Conv2d(8, 8, 3), nn.Softplus(), nn.Flatten(), nn.Linear(200, 5)
).eval()
x = torch.randn(1, 3, 30, 30)
with GradCAMpp(model, '4') as extractor:
    cam = extractor(1, model(x))[0][0]

a = model[:5](x).detach().requires_grad_()
(g,) = torch.autograd.grad(model[5:](a)[0, 1], a)
with torch.no_grad():
    alpha = g**2 / (2 * g**2 + g**3 * a.sum((2, 3), keepdim=True))

    def scaled(weights):
        map_ = (weights.sum((2, 3), keepdim=True) * a).sum(1)[0].relu()
        return (map_ - map_.min()) / (map_.max() - map_.min())

    to_paper = (cam - scaled(alpha * g.relu())).abs().max().item()
    to_undivided = (cam - scaled(g**2 * g.relu())).abs().max().item()
print(f'torch {torch.__version__}, torchcam 0.5.0')
print(f'largest difference of a map in [0, 1] to the formula of the paper:   {to_paper:.3f}')  # 0.142
print(f'largest difference to sum g^2 relu(g), alpha without its denominator: {to_undivided:.5f}')  # 0.00003
if to_undivided > 1e-3 or to_paper < 0.05:
    raise SystemExit('The behaviour has changed.')
PY
