"""Networks after methods of the user that change them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from timm_castream.attribution import attribute_all
from timm_castream.attribution.restoring import as_it_was


def to_train_mode(model: nn.Module, x: Tensor) -> None:
    model.train()
    model(x)  # which changes the statistics of batch normalisation


def leave_a_hook(model: nn.Module, x: Tensor) -> None:
    model.layer2.register_forward_hook(lambda module, args, output: 2 * output)


def change_weights(model: nn.Module, x: Tensor) -> None:
    model.fc.weight.data.zero_()
    model.conv1[0].requires_grad_(False)
    model(x).sum().backward()


def replace_a_module(model: nn.Module, x: Tensor) -> None:
    model.act1 = nn.Identity()
    model.layer3 = nn.Identity()


CHANGES: list[Callable[[nn.Module, Tensor], None]] = [to_train_mode, leave_a_hook, change_weights, replace_a_module]


@pytest.mark.parametrize('change', CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize('raises', [False, True])
def test_whatever_a_method_does_to_the_network_is_undone(
    change: Callable[[nn.Module, Tensor], None], raises: bool, make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    model = make_model('test_resnet')
    before = attribute_all(model, x, ('grad_cam', 'hires_cam'))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]

    def method(images: Tensor, target: Tensor) -> Tensor:
        change(model, images)
        if raises:
            raise KeyError('on purpose')
        return images.sum(1)

    methods: dict[str, Any] = {'mine': method, 'grad_cam': 'grad_cam', 'hires_cam': 'hires_cam'}
    if raises:
        with pytest.raises(RuntimeError, match="method 'mine' raised KeyError"):
            attribute_all(model, x, methods)
        after = attribute_all(model, x, ('grad_cam', 'hires_cam'))
    else:
        after = attribute_all(model, x, methods)
    assert all(torch.equal(after[key], maps) for key, maps in before.items())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_hook_that_a_method_keeps_is_there_when_it_runs_again(
    make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    model = make_model('test_resnet')
    seen: list[Tensor] = []
    hooked = []

    def method(images: Tensor, target: Tensor) -> Tensor:
        if not hooked:
            hooked.append(model.layer4.register_forward_hook(lambda module, args, output: seen.append(output)))
        seen.clear()
        model(images)
        return seen[-1].detach().sum(1)

    first = attribute_all(model, x, {'mine': method, 'grad_cam': 'grad_cam'})
    assert len(seen) == 1  # Grad-CAM's forward ran without it
    assert set(first) == {(pooling, name) for pooling in ('gap', 'ca') for name in ('mine', 'grad_cam')}


def test_frozen_parameters_and_gradients_stay(make_model: Callable[..., nn.Module]) -> None:
    model = make_model('test_resnet')
    model.fc.weight.requires_grad_(False)
    model.fc.bias.grad = torch.ones(10)
    with as_it_was(model):
        assert model.fc.bias.grad is None
        model.fc.weight.requires_grad_(True)
    assert not model.fc.weight.requires_grad and model.fc.bias.grad.eq(1).all()
