"""The table of methods against pytorch-grad-cam, the baselines against their formulas, and methods of the user."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from pytorch_grad_cam import HiResCAM, LayerCAM, XGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from timm_castream import pooling
from timm_castream.attribution import attribute, attribute_all
from timm_castream.attribution.activations import Activations
from timm_castream.attribution.methods import METHODS, PAPER_METHODS, TABLE_METHODS
from timm_castream.evaluate import evaluate

GRADIENT_METHODS = [name for name, method in METHODS.items() if 'gradients' in method.needs]
TARGET = torch.tensor([7, 2])
POOLINGS = ('gap', 'ca')


@pytest.fixture
def model(make_model: Callable[..., nn.Module]) -> nn.Module:
    model = make_model('test_resnet')
    with torch.no_grad():
        model.fc.weight.mul_(20)
    return model


@pytest.fixture
def x() -> Tensor:
    """Images with 3 x 3 locations in the pooled map."""
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))


def unit_range(maps: Tensor) -> Tensor:
    maps = maps.clamp(min=0)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0.0)


def test_rows_are_found_by_their_names_and_titles_are_unique() -> None:
    assert all(name == method.name for name, method in METHODS.items())
    assert len({method.title for method in METHODS.values()}) == len(METHODS)
    assert set(TABLE_METHODS) == {'grad_cam', 'grad_cam_pp', 'score_cam'}
    assert set(PAPER_METHODS) == {*TABLE_METHODS, 'attention'}


@pytest.mark.parametrize('mode', POOLINGS)
@pytest.mark.parametrize(
    ('method', 'peer'), [('layer_cam', LayerCAM), ('xgrad_cam', XGradCAM), ('hires_cam', HiResCAM)]
)
def test_gradient_methods_agree_with_pytorch_grad_cam(
    method: str, peer: Any, mode: str, model: nn.Module, x: Tensor
) -> None:
    class Unresized(peer):
        """Keeps the map at the size of the layer, which pytorch-grad-cam resizes and scales."""

        def compute_cam_per_layer(self, input_tensor: Tensor, targets: Any, eigen_smooth: bool) -> Any:
            activations = self.activations_and_grads.activations[0].cpu().numpy()
            gradients = self.activations_and_grads.gradients[0].cpu().numpy()
            self.cam = self.get_cam_image(
                input_tensor, self.target_layers[0], targets, activations, gradients, eigen_smooth
            )
            return super().compute_cam_per_layer(input_tensor, targets, eigen_smooth)

    model, x = model.double(), x.double()
    with pooling(model, mode), Unresized(model, [model.layer4]) as cam:
        cam(x, [ClassifierOutputTarget(int(c)) for c in TARGET])
        expected = unit_range(torch.from_numpy(cam.cam))
    torch.testing.assert_close(attribute(model, x, method, TARGET, mode), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1


def test_all_gradient_methods_share_one_forward_and_one_backward_a_pooling(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards, backwards = [], []
    model.conv1.register_forward_hook(lambda *args: forwards.append(1))
    gradients = Activations.gradients

    def counted(self: Activations, *args: Any) -> Tensor:
        backwards.append(1)
        return gradients(self, *args)

    monkeypatch.setattr(Activations, 'gradients', counted)
    maps = attribute_all(model, x, GRADIENT_METHODS, TARGET)
    assert len(GRADIENT_METHODS) == 5 and len(maps) == 10
    assert len(forwards) == 1 and len(backwards) == 2


def test_random_maps_depend_on_the_seed_and_the_position_of_the_image_alone(model: nn.Module) -> None:
    images = torch.randn(5, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, torch.zeros(5, dtype=torch.long)), 2)

    def drops(seed: int, **kwargs: Any) -> dict[int, float]:
        report = evaluate(model, loader, ('random',), ('gap',), metrics=('average_drop',), seed=seed, **kwargs)
        pairs = report.values.pairs
        return dict(zip(pairs['image'].tolist(), pairs['gap/random/average_drop'].tolist(), strict=True))

    every, some = drops(1), drops(1, num_samples=2)
    assert len(some) == 2
    for index, value in some.items():
        assert every[index] == pytest.approx(value, abs=1e-2)
    assert drops(2) != every
    maps = attribute(model, images, 'random', seed=1, pooling='gap')
    assert maps.shape == (5, 3, 3) and len({tuple(m.flatten().tolist()) for m in maps}) == 5
    assert torch.equal(maps, attribute(model, images, 'random', seed=1, pooling='ca'))
    assert maps.amin((1, 2)).eq(0).all() and maps.amax((1, 2)).eq(1).all()


def test_the_centre_is_a_gaussian_of_a_quarter_of_the_image(model: nn.Module) -> None:
    x = torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    maps = attribute(model, x, 'centre')[0]
    values = [
        [
            math.exp(-(((i + 0.5) / 96 - 0.5) ** 2) / (2 * 0.25**2) - ((j + 0.5) / 160 - 0.5) ** 2 / (2 * 0.25**2))
            for j in range(160)
        ]
        for i in range(96)
    ]
    low, high = min(map(min, values)), max(map(max, values))
    torch.testing.assert_close(maps, torch.tensor([[(v - low) / (high - low) for v in row] for row in values]))


def test_captum_through_a_callable_gives_the_figures_of_calling_it_by_hand(model: nn.Module, x: Tensor) -> None:
    explainer = IntegratedGradients(model)

    def integrated_gradients(images: Tensor, target: Tensor) -> Tensor:
        return explainer.attribute(images, target=target, n_steps=5)

    loader = DataLoader(TensorDataset(x, TARGET), 2)
    report = evaluate(model, loader, {'IG': integrated_gradients}, metrics=('average_drop', 'insertion'))
    by_hand = {}
    for mode in POOLINGS:
        with pooling(model, mode):
            by_hand[mode] = explainer.attribute(x, target=TARGET, n_steps=5).detach().sum(1).numpy()
    saved = evaluate(model, loader, {'IG': by_hand}, metrics=('average_drop', 'insertion'))
    assert not np.allclose(by_hand['gap'], by_hand['ca'])
    for key, estimate in report.figures.items():
        assert saved[key].value == pytest.approx(estimate.value, abs=1e-3), key
    # By the definition of Average Drop.
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    masks = unit_range(torch.from_numpy(by_hand['ca']))[:, None]
    with torch.no_grad():
        p, o = (model(images).softmax(1)[range(2), TARGET] for images in (x, ((x * std + mean) * masks - mean) / std))
    assert report['ca', 'IG', 'average_drop'].value == pytest.approx(
        (100 * (p - o).clamp(min=0) / p).mean().item(), abs=1e-2
    )


@pytest.mark.parametrize('shape', ['(B, h, w)', '(B, 1, h, w)', '(B, C, H, W)', 'numpy'])
def test_a_callable_may_return_maps_of_any_size(shape: str, model: nn.Module, x: Tensor) -> None:
    signed = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    returned = {
        '(B, h, w)': signed[:, 0],
        '(B, 1, h, w)': signed[:, :1],
        '(B, C, H, W)': signed,
        'numpy': signed[:, 0].numpy(),
    }[shape]
    maps = attribute_all(model, x, {'mine': lambda images, target: returned}, TARGET)
    expected = unit_range(signed.sum(1) if shape == '(B, C, H, W)' else signed[:, 0])
    for mode in POOLINGS:
        torch.testing.assert_close(maps[mode, 'mine'], expected)


def test_a_callable_runs_with_gradients_under_each_pooling_once_for_each_class(model: nn.Module, x: Tensor) -> None:
    calls = []

    def gradient(images: Tensor, target: Tensor) -> Tensor:
        assert torch.is_grad_enabled() and not model.training
        images.requires_grad_()
        score = model(images).gather(1, target[:, None]).sum()
        calls.append((model._castream.pooling if hasattr(model._castream, 'pooling') else None, target.tolist()))
        return torch.autograd.grad(score, images)[0].abs()

    targets = torch.tensor([[1, 2], [3, 4]])
    maps = attribute_all(model.train(), x, {'gradient': gradient}, targets)
    assert [target for _, target in calls] == [[1, 3], [2, 4]] * 2
    assert maps['ca', 'gradient'].shape == (2, 2, 96, 96)
    assert not torch.allclose(maps['ca', 'gradient'], maps['gap', 'gradient'])
    for mode in POOLINGS:
        with pooling(model.eval(), mode):
            images = x.clone().requires_grad_()
            expected = torch.autograd.grad(model(images)[0, 2], images)[0].abs().sum(1)[:1]
        torch.testing.assert_close(maps[mode, 'gradient'][0, 1], unit_range(expected)[0], atol=1e-4, rtol=0)


def test_arrays_follow_the_order_of_the_data_set(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(6, 3, 64, 64, generator=generator), torch.arange(6)
    arrays = np.random.default_rng(0).uniform(0, 1, (6, 4, 4)).astype(np.float32)
    loader = DataLoader(TensorDataset(images, labels), 4)

    def drops(maps: np.ndarray, **kwargs: Any) -> dict[int, float]:
        report = evaluate(model, loader, {'mine': maps}, ('ca',), metrics=('average_drop',), **kwargs)
        pairs = report.values.pairs
        return dict(zip(pairs['image'].tolist(), pairs['ca/mine/average_drop'].tolist(), strict=True))

    whole, some = drops(arrays), drops(arrays, num_samples=3, seed=1)
    assert len(some) == 3
    for image, value in some.items():
        assert value == pytest.approx(whole[image], abs=1e-2)
    assert drops(arrays[::-1].copy()) != pytest.approx(whole)


@pytest.mark.parametrize(
    ('methods', 'message'),
    [
        ({'mine': np.zeros((3, 4, 4))}, "method 'mine' has 3 maps, the data set has 2 images"),
        ({'mine': {'gap': np.zeros((2, 4, 4))}}, "method 'mine' has no maps for pooling 'ca'"),
        ({'mine': np.zeros((2, 3, 4, 4))}, r'an array of shape \(N, h, w\).*got float64 of \(2, 3, 4, 4\)'),
        ({'grad_cam': 'score_cam'}, "method 'grad_cam' is the name of a built-in method"),
        ({'mine': lambda x, target: (1, 2)}, r"method 'mine' returned .* for 2 images"),
        ({'mine': 3}, "method 'mine' must be a name, a callable, an array .* got int"),
        ({'mine': 'lime'}, "method 'lime' is unknown, valid ones: 'attention', 'grad_cam'"),
        ({'a/b': 'grad_cam'}, "method 'a/b' has a slash"),
        # A row without a name, a row in two lines, two rows of one name.
        ({' ': 'grad_cam'}, "method ' ' has no label for a table"),
        ({'a\nb': 'grad_cam'}, r"method 'a\\nb' has no label for a table"),
        ({1: 'grad_cam', '1': 'layer_cam'}, "method '1' is given twice"),
        ({}, 'methods is empty'),
        (('grad_cam', 'grad_cam'), "method 'grad_cam' is given twice"),
        ({'mine': lambda x, target: torch.zeros(3, 4, 4)}, r"method 'mine' returned shape \(3, 4, 4\) for 2 images"),
    ],
)
def test_methods_that_do_not_fit_are_refused_in_a_sentence(
    methods: Any, message: str, model: nn.Module, x: Tensor
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(model, DataLoader(TensorDataset(x, TARGET), 2), methods)


def test_an_exception_of_a_callable_is_reported_with_the_method_and_its_type(model: nn.Module, x: Tensor) -> None:
    def method(images: Tensor, target: Tensor) -> Tensor:
        return {}['foo']

    with pytest.raises(RuntimeError, match="method 'mine' raised KeyError: 'foo'") as error:
        attribute_all(model, x, {'mine': method})
    assert isinstance(error.value.__cause__, KeyError)


def test_a_callable_leaves_no_gradients_behind(model: nn.Module, x: Tensor) -> None:
    def backward(images: Tensor, target: Tensor) -> Tensor:
        images.requires_grad_()
        model(images).gather(1, target[:, None]).sum().backward()
        return images.grad

    attribute_all(model, x, {'backward': backward}, TARGET)
    assert all(parameter.grad is None for parameter in model.parameters())


class TwoBranches(nn.Module):
    """A network with timm's methods that pools two tensors."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(6, 10)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        return [x.flatten(2), -x.flatten(2)]

    def forward_head(self, features: list[Tensor]) -> Tensor:
        return self.classifier(torch.cat([branch.mean(2) for branch in features], 1))

    def reset_classifier(self, num_classes: int) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def test_a_network_without_a_feature_map_takes_maps_of_ones_own() -> None:
    network = TwoBranches().eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match='TwoBranches'):
        attribute_all(network, x, ('grad_cam',))
    maps = attribute_all(network, x, {'mine': lambda images, target: images, 'random': 'random', 'centre': 'centre'})
    assert {key: tuple(value.shape) for key, value in maps.items()} == {
        ('gap', 'mine'): (1, 64, 64),
        ('gap', 'random'): (1, 2, 2),
        ('gap', 'centre'): (1, 64, 64),
    }
