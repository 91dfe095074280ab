"""The network that libraries hook: any layout of feature maps, and nothing left on the network afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import token_network
from torch import Tensor, nn

import timm_castream
from timm_castream.attribution import attribute
from timm_castream.attribution.peers.hookable import hookable
from timm_castream.inference.predictor import Predictor


def state(model: nn.Module) -> list[Any]:
    """Everything that a library could leave: attributes, hooks, modules, modes, weights and gradients."""
    modules = [
        (name, type(module), sorted(vars(module)), module.training, list(module._modules),
         [len(value) for key, value in sorted(vars(module).items()) if 'hooks' in key])
        for name, module in model.named_modules()
    ]  # fmt: skip
    return [modules, [(p.requires_grad, p.grad is None, p.sum().item()) for p in model.parameters()]]


@pytest.mark.parametrize('mode', ['gap', 'ca'])
@pytest.mark.parametrize('backbone', ['test_resnet', 'swin', 'test_vit'])
def test_the_maps_pass_the_layer_as_channels_rows_and_columns_and_the_scores_stay(
    backbone: str, mode: str, make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    model = make_model(backbone)
    predictor = Predictor(model)
    with predictor.evaluating():
        with predictor.pooled_by(mode):
            expected = model(x)
        seen = []
        with hookable(predictor, mode) as network:
            network.layer.register_forward_hook(lambda module, args, output: seen.append(output.shape[1:]))
            torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)
            network.layer.register_forward_hook(lambda module, args, output: output.roll(1, 1))
            assert (network(x) - expected).abs().max() > 1e-3
    side = {'test_resnet': 2, 'swin': 2, 'test_vit': 4}[backbone]
    assert seen == [(predictor.stage.dim, side, side)] * 2


def test_tokens_that_a_network_sorts_by_windows_get_their_place_back() -> None:
    model, size = token_network('hiera')
    predictor = Predictor(model)
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with predictor.evaluating():
        expected = model(x)
        with hookable(predictor, 'gap') as network:
            torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)
            network.layer.register_forward_hook(lambda module, args, output: output.roll(1, 1))
            assert (network(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    'method',
    [
        'captum:DeepLift', 'captum:GuidedGradCam', 'captum:LayerIntegratedGradients,n_steps=3', 'grad-cam:FullGrad',
        'grad-cam:AblationCAM', 'torchcam:ScoreCAM', 'torchcam:SmoothGradCAMpp',
    ],
)  # fmt: skip
def test_nothing_is_left_on_the_network(method: str, make_model: Callable[..., nn.Module], x: Tensor) -> None:
    model = make_model('test_resnet').train()
    model.fc.bias.requires_grad_(False)
    model.bn1.weight.grad = gradient = torch.ones_like(model.bn1.weight)
    before = state(model)
    attribute(model, x, method, torch.tensor([1, 2]))
    assert state(model) == before
    assert model.bn1.weight.grad is gradient and gradient.eq(1).all()


@pytest.mark.parametrize('method', ['captum:DeepLift', 'grad-cam:FullGrad', 'torchcam:GradCAM'])
def test_nothing_is_left_where_the_network_fails_in_the_middle(
    method: str, make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    model = make_model('test_resnet')

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        raise RuntimeError('in the middle')

    model.layer3.register_forward_hook(fail)
    before = state(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f'{method}.*in the middle'):
            attribute(model, x, method, torch.tensor([1, 2]))
        assert state(model) == before


def test_a_library_sees_the_network_inside_compiled_and_parallel_wrappers(
    make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    model, target = make_model('test_resnet'), torch.tensor([1, 2])
    expected = attribute(model, x, 'grad-cam:LayerCAM', target)
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        torch.testing.assert_close(attribute(wrapped, x, 'grad-cam:LayerCAM', target), expected)


def test_frozen_networks_and_gradient_checkpointing_do_not_show(
    make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    model, target = make_model('test_resnet'), torch.tensor([1, 2])
    methods = ('grad-cam:GradCAM', 'torchcam:LayerCAM', 'captum:LayerGradCam')
    expected = {name: attribute(model, x, name, target) for name in methods}
    frozen = copy.deepcopy(model)
    timm_castream.freeze_backbone(frozen)
    frozen.requires_grad_(False)
    frozen.set_grad_checkpointing()
    for name in methods:
        torch.testing.assert_close(attribute(frozen, x, name, target), expected[name])
    assert frozen.grad_checkpointing


def test_autocast_of_the_caller_does_not_reach_the_library(make_model: Callable[..., nn.Module], x: Tensor) -> None:
    model, target = make_model('test_resnet'), torch.tensor([1, 2])
    expected = attribute(model, x, 'grad-cam:GradCAM', target)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(attribute(model, x, 'grad-cam:GradCAM', target), expected)


def test_any_network_takes_methods_of_pixels_and_those_of_a_named_layer(x: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()
    target = torch.tensor([1, 2])
    assert attribute(model, x, 'captum:Saliency', target).shape == (2, 64, 64)
    assert attribute(model, x, 'torchcam:LayerCAM', target, layer='2').shape == (2, 15, 15)
    with pytest.raises(ValueError, match=r'torchcam:LayerCAM.*Sequential.*layer='):
        attribute(model, x, 'torchcam:LayerCAM', target)
