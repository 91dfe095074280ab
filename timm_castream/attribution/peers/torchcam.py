"""Methods of torch-cam: weighted feature maps at the size of the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ...inference.predictor import Predictor
from .hookable import HookableNetwork
from .library import Library, PeerMethod, without_other_classes


def _without_pooling(predictor: Predictor) -> str:
    if predictor.is_timm and predictor.cam_layer is None:
        return ''
    return (
        'it takes the weights of the classifier for those of the channels, and the classifier reads no average of a map'
    )


class TorchCam(Library):
    """torch-cam's extractors: `Class(model, layer)(classes, scores)`."""

    prefix, module, package = 'torchcam', 'torchcam.methods', 'torchcam'
    given = frozenset(
        {
            'model',
            'target_layer',
            'input_shape',
            'enable_hooks',
            'reshape_transform',
            'class_idx',
            'scores',
            'normalized',
            'targets',
            'fc_layer',
        }
    )
    methods = {
        row.name: row
        for row in (
            PeerMethod('CAM', unfit=_without_pooling),
            PeerMethod('GradCAM'),
            PeerMethod('GradCAMpp'),
            PeerMethod('SmoothGradCAMpp', random=True, forwards=10),
            PeerMethod('XGradCAM'),
            PeerMethod('LayerCAM'),
            PeerMethod('FinerCAM', unfit=without_other_classes),
            PeerMethod('ScoreCAM', forward_a_channel=True, forwards=1),
            PeerMethod(
                'SSCAM', random=True, forward_a_channel=True, forwards=35, costly='it takes 35 forwards a channel'
            ),
            PeerMethod('ISCAM', forward_a_channel=True, forwards=10, costly='it takes 10 forwards a channel'),
            PeerMethod('RefineCAM', refused='it multiplies the maps of several layers, and an evaluation has one'),
            PeerMethod(
                'LeGrad', refused='it reads blocks of nn.MultiheadAttention, which the networks of timm do not have'
            ),
        )
    }

    def functions(self, row: PeerMethod, arguments: Mapping[str, Any]) -> tuple[Callable[..., Any], ...]:
        cls = self.method_class(row.name)
        return cls.__init__, cls.__call__

    def maps(
        self,
        network: HookableNetwork,
        x: Tensor,
        classes: list[int],
        row: PeerMethod,
        arguments: Mapping[str, Any],
        batch_size: int,
    ) -> Tensor:
        init, call = self.split(row, arguments)
        if row.name == 'CAM':
            init['fc_layer'] = network.classifier
        extractor = self.method_class(row.name)(network, network.layer, **init)
        return extractor(classes, network(x), **call)[0]
