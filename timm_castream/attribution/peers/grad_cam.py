"""Methods of pytorch-grad-cam: weighted feature maps, resized to the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...inference.predictor import Predictor
from .hookable import HookableNetwork
from .library import Library, PeerMethod, without_other_classes, zero_before_norm

_LAYERS = 'it multiplies the maps of several layers, and an evaluation has one'


def _without_biases(predictor: Predictor) -> str:
    """FullGrad adds a map for each bias. The library finds those of layers of exactly two types."""
    with_bias = [m for m in predictor.backbone.modules() if isinstance(getattr(m, 'bias', None), nn.Parameter)]
    others = [m for m in with_bias if type(m) not in (nn.Conv2d, nn.BatchNorm2d)]
    if 2 * len(others) <= len(with_bias):
        return ''
    return (
        f'it adds the parts of the biases of nn.Conv2d and nn.BatchNorm2d alone, and {len(others)} of the '
        f'{len(with_bias)} layers with a bias are others'
    )


class GradCam(Library):
    """pytorch-grad-cam's classes: `Class(model, [layer])(x, targets)`."""

    prefix, module, package = 'grad-cam', 'pytorch_grad_cam', 'grad-cam'
    given = frozenset(
        {
            'model',
            'target_layers',
            'reshape_transform',
            'input_tensor',
            'targets',
            'tta_transforms',
            'ablation_layer',
            'target_idx',
        }
    )
    methods = {
        row.name: row
        for row in (
            PeerMethod('GradCAM'),
            PeerMethod('HiResCAM', unfit=zero_before_norm),
            PeerMethod('GradCAMElementWise'),
            PeerMethod('GradCAMPlusPlus'),
            PeerMethod('XGradCAM'),
            PeerMethod('LayerCAM'),
            PeerMethod('EigenCAM'),
            PeerMethod('EigenGradCAM'),
            PeerMethod('SegEigenCAM'),
            PeerMethod('KPCA_CAM'),
            PeerMethod('FEM'),
            PeerMethod('ShapleyCAM'),
            PeerMethod('FinerCAM', alone=True, unfit=without_other_classes),
            PeerMethod('FullGrad', layer=False, forwards=12, unfit=_without_biases),
            PeerMethod('RandomCAM', random=True),
            PeerMethod('AblationCAM', forward_a_channel=True, forwards=1),
            PeerMethod('ScoreCAM', alone=True, forward_a_channel=True, forwards=1),
            PeerMethod(
                'SESS',
                forwards=400,
                costly='its default twelve scales take more than a hundred forwards and backwards an image',
            ),
            PeerMethod('RefineCAM', refused=_LAYERS),
            PeerMethod(
                'GuidedBackpropReLUModel',
                refused='it leaves other ReLU modules in the network: take captum:GuidedBackprop',
            ),
            PeerMethod('DeepFeatureFactorization', refused='it finds concepts, and explains no score'),
        )
    }

    def functions(self, row: PeerMethod, arguments: Mapping[str, Any]) -> tuple[Callable[..., Any], ...]:
        cls = self.method_class(row.name)
        return cls.__init__, cls.__call__, cls.forward

    def maps(
        self,
        network: HookableNetwork,
        x: Tensor,
        classes: list[int],
        row: PeerMethod,
        arguments: Mapping[str, Any],
        batch_size: int,
    ) -> np.ndarray:
        target = import_module('pytorch_grad_cam.utils.model_targets').ClassifierOutputTarget
        init, call, forward = self.split(row, arguments)
        targets: list[Any] | None = [target(index) for index in classes]
        if row.name == 'FinerCAM':  # with targets it compares no classes, and is its base method
            targets, forward['target_idx'] = None, classes[0]
        method = self.method_class(row.name)(network, [network.layer] if row.layer else [], **init)
        try:
            # The second derivative that ShapleyCAM takes is written for plain attention alone.
            with sdpa_kernel(SDPBackend.MATH) if row.name == 'ShapleyCAM' else nullcontext():
                return method(x, targets, **call, **forward)
        finally:
            # Its own clean-up detaches them in place, which fails on views with a message at some later time.
            kept = getattr(method, 'base_cam', method).activations_and_grads
            kept.activations, kept.gradients = [], []
