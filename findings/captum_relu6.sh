#!/usr/bin/env bash
# captum 0.9.0: DeepLift, GuidedBackprop and Deconvolution do nothing of their own on ReLU6, GELU or SiLU.
#
# Their rules are tied to module types: exactly nn.ReLU and a few others for DeepLift, nn.ReLU for the other two. nn.ReLU6
# is no subclass of nn.ReLU. On a network with another activation, such as torchvision's MobileNetV2, the maps are to the
# last digit those of InputXGradient and Saliency, under the name of the method. The warnings are the same as ever, and
# the convergence delta, which DeepLift's rules make 0, is asked for by hand only.
# Seen with Python 3.11, torch 2.14.1, torchvision 0.29.1. These come from the environment.
# Ends with 0 while the behaviour is as described, and with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install --quiet --no-deps --target "$folder" captum==0.9.0
PYTHONPATH=$folder python -W ignore - <<'PY'
import torch
from captum.attr import Deconvolution, DeepLift, GuidedBackprop, InputXGradient, Saliency
from torch import nn
from torchvision.models import mobilenet_v2

torch.manual_seed(0)
model = mobilenet_v2(weights=None).eval()
with torch.no_grad():
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: maps that are not all alike
            module.bias.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.1, 0.3)
x = torch.randn(1, 3, 64, 64)
plain = {'saliency': Saliency(model).attribute(x, target=3, abs=False), 'input': InputXGradient(model).attribute(x, target=3)}
deep, delta = DeepLift(model).attribute(x, target=3, return_convergence_delta=True)
found = {
    'GuidedBackprop - Saliency': GuidedBackprop(model).attribute(x, target=3) - plain['saliency'],
    'Deconvolution - Saliency': Deconvolution(model).attribute(x, target=3) - plain['saliency'],
    'DeepLift - InputXGradient': deep - plain['input'],
}
change = (model(x) - model(torch.zeros_like(x)))[0, 3].item()
print(f'torch {torch.__version__}, captum 0.9.0, largest value of the gradient {plain["saliency"].abs().max():.2g}')
for name, difference in found.items():
    print(f'largest |{name}|: {difference.abs().max():.1g}')
print(f'change of the score {change:.3f}, sum of DeepLift {deep.sum():.3f}, delta {delta.item():.3f}')
largest = plain['saliency'].abs().max()
if any(difference.abs().max() > 1e-3 * largest for difference in found.values()) or largest == 0:
    raise SystemExit('The behaviour has changed.')
if abs(delta.item()) < 0.05 * abs(change):
    raise SystemExit('The rule of DeepLift holds now.')
PY
