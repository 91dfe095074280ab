"""Calls of captum, pytorch-grad-cam and torch-cam as their own documents write them, on a network that has no hooks of ours.

Letters: B images, D channels, h x w locations.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from timm_castream import pooling
from timm_castream.inference.predictor import Predictor


def _tokens(tensor: Tensor) -> Tensor:
    """(B, 1 + 16, D) tokens of test_vit at 64 pixels as (B, D, 4, 4)."""
    return tensor[:, 1:].reshape(len(tensor), 4, 4, -1).permute(0, 3, 1, 2)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 3, 1, 2)


# The module that a user names, and what the libraries call the reshape transform.
LAYERS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[Tensor], Tensor] | None]] = {
    'test_resnet': (lambda model: model.layer4, None),
    'test_convnext': (lambda model: model.stages[-1], None),
    'swin': (lambda model: model.norm, _channels_last),
    'test_vit': (lambda model: model.get_submodule(str(Predictor(model, ('gap',)).cam_layer)), _tokens),
}


def unit_range(maps: Any) -> Tensor:
    maps = torch.as_tensor(maps).detach().float().clamp(min=0)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0.0)


def seed(index: int) -> int:
    """The seed of an image, of the seed 0 of an evaluation and its position."""
    return int(np.random.SeedSequence([0, index]).generate_state(1)[0])


def captum_maps(
    name: str, backbone: str, model: nn.Module, x: Tensor, target: Tensor, mode: str = 'gap', **arguments: Any
) -> Tensor:
    cls = getattr(importlib.import_module('captum.attr'), name)
    layer, reshape = LAYERS[backbone]
    reads_layer = name.startswith('Layer') or name in ('GuidedGradCam', 'InternalInfluence')
    with pooling(model, mode):
        explainer = cls(model, layer(model)) if reads_layer else cls(model)
        if name != 'LayerActivation':
            arguments['target'] = target
        maps = explainer.attribute(x.clone(), **arguments)
    if reads_layer and reshape is not None:
        maps = reshape(maps)
    return unit_range(maps.sum(1))


def grad_cam_maps(
    name: str, backbone: str, model: nn.Module, x: Tensor, target: Tensor, mode: str = 'gap', **arguments: Any
) -> Tensor:
    module = importlib.import_module('pytorch_grad_cam')
    score = importlib.import_module('pytorch_grad_cam.utils.model_targets').ClassifierOutputTarget
    layer, reshape = LAYERS[backbone]
    if name == 'AblationCAM' and reshape is not None:
        arguments['ablation_layer'] = module.AblationLayerVit()
    with pooling(model, mode):
        method = getattr(module, name)(
            model=model, target_layers=[layer(model)], reshape_transform=reshape, **arguments
        )
        if name == 'FinerCAM':  # it chooses the classes that it compares where it is given no targets
            images = [method(input_tensor=x[i : i + 1].clone(), target_idx=int(c)) for i, c in enumerate(target)]
            return unit_range(np.concatenate(images))
        return unit_range(method(input_tensor=x.clone(), targets=[score(int(c)) for c in target]))


def torchcam_maps(
    name: str, backbone: str, model: nn.Module, x: Tensor, target: Tensor, mode: str = 'gap', **arguments: Any
) -> Tensor:
    cls = getattr(importlib.import_module('torchcam.methods'), name)
    layer, reshape = LAYERS[backbone]
    if name == 'CAM':
        arguments['fc_layer'] = model.get_classifier()
    with pooling(model, mode), cls(model, layer(model), reshape_transform=reshape, **arguments) as extractor:
        return unit_range(extractor(target.tolist(), model(x.clone()))[0])
