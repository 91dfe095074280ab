"""Methods of captum (arXiv 2009.07896): attributions of pixels, or of the feature maps of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...inference.predictor import Predictor
from .hookable import HookableNetwork
from .library import Library, PeerMethod, parameter_names, split, zero_before_norm

_BASELINES = 'it needs a set of baseline images, which an evaluation does not have'
_MASK = 'it needs a mask that joins pixels to features: without one, a forward a pixel and more'
_BATCH = 'it swaps features between the images of a batch, so a map would depend on the other images'
_NEURON = 'it explains a neuron, and not a score of the network'
# captum replaces the backward of these types. Subclasses and other types, such as ReLU6 and GELU, keep their gradient.
_RESCALED = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.MaxPool2d, nn.Softmax)


def _without_relu(predictor: Predictor) -> str:
    if any(isinstance(module, nn.ReLU) for module in predictor.model.modules()):
        return ''
    return (
        'it replaces the backward of nn.ReLU, and the network has no such module: the maps would be those of '
        'captum:Saliency,abs=False'
    )


def _without_rescaled(predictor: Predictor) -> str:
    if any(type(module) in _RESCALED for module in predictor.model.modules()):
        return ''
    return (
        'it replaces the backward of nn.ReLU, nn.Sigmoid and the like, and the network has no such module: the maps '
        'would be those of captum:InputXGradient'
    )


def _window(shape: Sequence[int]) -> dict[str, Any]:
    """A window of a quarter of each side, moved by half of that."""
    channels, *sides = shape
    strides = [max(1, side // 8) for side in sides]
    return {'sliding_window_shapes': (channels, *(2 * stride for stride in strides)), 'strides': (channels, *strides)}


class Captum(Library):
    """captum's classes: `Class(forward, layer).attribute(x, target=...)`."""

    prefix, module, package = 'captum', 'captum.attr', 'captum'
    given = frozenset(
        {
            'forward_func',
            'model',
            'layer',
            'device_ids',
            'inputs',
            'target',
            'additional_forward_args',
            'return_convergence_delta',
            'attribute_to_layer_input',
            'show_progress',
            'verbose',
        }
    )
    methods = {
        row.name: row
        for row in (
            PeerMethod('Saliency', layer=False),
            PeerMethod('InputXGradient', layer=False),
            PeerMethod('IntegratedGradients', layer=False, forwards=80),
            # Its rule for softmax takes a mean over the whole batch.
            PeerMethod('DeepLift', layer=False, alone=True, unfit=_without_rescaled),
            PeerMethod('GuidedBackprop', layer=False, unfit=_without_relu),
            PeerMethod('Deconvolution', layer=False, unfit=_without_relu),
            PeerMethod('LRP', layer=False),
            PeerMethod('Occlusion', layer=False, forwards=40, defaults=_window),
            PeerMethod(
                'NoiseTunnel',
                layer=False,
                random=True,
                forwards=10,
                defaults=lambda shape: {'attribution_method': 'Saliency'},
            ),
            PeerMethod('GuidedGradCam', unfit=_without_relu),
            PeerMethod('LayerGradCam'),
            PeerMethod('LayerActivation'),
            PeerMethod('LayerGradientXActivation', unfit=zero_before_norm),
            PeerMethod('LayerIntegratedGradients', forwards=40),
            PeerMethod('LayerConductance', forwards=40),
            PeerMethod('InternalInfluence', forwards=40, unfit=zero_before_norm),
            PeerMethod('LayerDeepLift', alone=True),
            PeerMethod('LayerLRP'),
            *(
                PeerMethod(name, refused=_BASELINES)
                for name in ('GradientShap', 'DeepLiftShap', 'LayerGradientShap', 'LayerDeepLiftShap')
            ),
            *(
                PeerMethod(name, refused=_MASK)
                for name in (
                    'FeatureAblation',
                    'ShapleyValues',
                    'ShapleyValueSampling',
                    'Lime',
                    'KernelShap',
                    'LayerFeatureAblation',
                )
            ),
            *(PeerMethod(name, refused=_BATCH) for name in ('FeaturePermutation', 'LayerFeaturePermutation')),
            PeerMethod('LimeBase', refused='it needs functions of its own for sampling and similarity'),
            PeerMethod('DataLoaderAttribution', refused='it explains a data set, and not an image'),
            *(
                PeerMethod(name, refused=_NEURON)
                for name in (
                    'NeuronConductance',
                    'NeuronDeconvolution',
                    'NeuronDeepLift',
                    'NeuronDeepLiftShap',
                    'NeuronFeatureAblation',
                    'NeuronGradient',
                    'NeuronGradientShap',
                    'NeuronGuidedBackprop',
                    'NeuronIntegratedGradients',
                )
            ),
        )
    }

    def functions(self, row: PeerMethod, arguments: Mapping[str, Any]) -> tuple[Callable[..., Any], ...]:
        cls = self.method_class(row.name)
        if row.name != 'NoiseTunnel':
            return cls.__init__, cls.attribute
        inner = self._inner(arguments)
        return cls.__init__, cls.attribute, inner.__init__, inner.attribute

    def _inner(self, arguments: Mapping[str, Any]) -> Any:
        """The class of the method inside a NoiseTunnel."""
        name = arguments.get('attribution_method', 'Saliency')
        row = self.methods.get(name)
        if row is None or row.refused or row.layer or name == 'NoiseTunnel':
            valid = [row.name for row in self.methods.values() if not (row.refused or row.layer or row.random)]
            raise ValueError(
                f'captum:NoiseTunnel takes no attribution_method {name!r}, valid ones: {", ".join(valid)}.'
            )
        return self.method_class(name)

    def maps(
        self,
        network: HookableNetwork,
        x: Tensor,
        classes: list[int],
        row: PeerMethod,
        arguments: Mapping[str, Any],
        batch_size: int,
    ) -> Tensor:
        cls, functions = self.method_class(row.name), self.functions(row, arguments)
        if row.name == 'NoiseTunnel':
            outer, call, init, inner_call = split(arguments, functions)
            method = cls(self._inner(outer)(network, **init))
            call |= inner_call
        else:
            init, call = split(arguments, functions)
            method = cls(network, network.layer, **init) if row.layer else cls(network, **init)
        names = parameter_names(functions)
        # They bound the memory and do not show in the maps.
        for name, value in {
            'internal_batch_size': batch_size,
            'perturbations_per_eval': max(1, batch_size // len(x)),
        }.items():
            if name in names:
                call.setdefault(name, value)
        if 'target' in names:
            call['target'] = torch.tensor(classes, device=x.device)
        return method.attribute(x, **call)
