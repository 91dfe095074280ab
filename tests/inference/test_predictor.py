"""The network under explanation: models without a stream, modules that are not timm's, and settings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from timm_castream.attribution import attribute
from timm_castream.evaluate import evaluate
from timm_castream.inference.predictor import Predictor


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    ).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def loader_of(images: Tensor, classes: int) -> DataLoader:
    return DataLoader(TensorDataset(images, torch.arange(len(images)) % classes), 2)


def test_any_module_is_evaluated_under_its_own_forward(images: Tensor) -> None:
    model = small_network()
    maps = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(2))
    report = evaluate(
        model, loader_of(images, 4), {'mine': maps.numpy()}, metrics=('average_drop',), mean=(0.5,) * 3, std=(0.25,) * 3
    )
    assert report.poolings == ('gap',) and not report.differences
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    masks = nn.functional.interpolate(((maps - low) / (high - low))[:, None], (32, 32), mode='bilinear')
    with torch.no_grad():
        p, o = (model(x).softmax(1)[range(4), range(4)] for x in (images, ((images * 0.25 + 0.5) * masks - 0.5) / 0.25))
    assert report['gap', 'mine', 'average_drop'].value == pytest.approx(
        (100 * (p - o).clamp(min=0) / p).mean().item(), abs=1e-3
    )
    accuracy = 100 * (model(images).argmax(1) == torch.arange(4)).float().mean().item()
    assert report.accuracy['gap'].value == pytest.approx(accuracy)


def test_a_named_layer_gives_any_module_feature_maps(images: Tensor) -> None:
    model = small_network()
    maps = attribute(model, images, 'grad_cam', torch.arange(4), 'gap', layer='1')
    features = model[:2](images).detach().requires_grad_()
    scores = model[2:](features)
    gradient = torch.autograd.grad(scores[range(4), range(4)].sum(), features)[0]
    cam = (gradient.mean((2, 3), keepdim=True) * features).sum(1).clamp(min=0).detach()
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    torch.testing.assert_close(maps, torch.where(high > low, (cam - low) / (high - low), 0.0))
    with pytest.raises(ValueError, match=r'Sequential is no timm model.*layer='):
        attribute(model, images, 'grad_cam', torch.arange(4), 'gap')


def test_a_module_without_a_normalisation_asks_for_it(images: Tensor) -> None:
    with pytest.raises(ValueError, match='Sequential has no mean for its images: pass mean='):
        evaluate(small_network(), loader_of(images, 4), ('centre',), metrics=('average_drop',))


def test_a_plain_timm_model_is_evaluated_like_one_with_a_stream_under_gap(make_model: Callable[..., nn.Module]) -> None:
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    model = make_model('test_resnet')
    plain = timm.create_model('test_resnet', num_classes=10).eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith('castream.')})
    ours = evaluate(model, loader_of(images, 10), ('grad_cam', 'score_cam'))
    theirs = evaluate(plain, loader_of(images, 10), ('grad_cam', 'score_cam'))
    assert theirs.poolings == ('gap',) and theirs.network == 'test_resnet'
    for key, estimate in theirs.figures.items():
        assert estimate.value == pytest.approx(ours[key].value, abs=1e-3), key
    with pytest.raises(ValueError, match='has no CA-Stream'):
        evaluate(plain, loader_of(images, 10), poolings=('ca',))
    with pytest.raises(ValueError, match='has no CA-Stream'):
        evaluate(plain, loader_of(images, 10), ('attention',))


def test_labels_beyond_the_classes_of_any_module_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match='has classes from 4 to 5, the model has 0 to 3'):
        evaluate(
            small_network(),
            DataLoader(TensorDataset(images, torch.arange(2, 6)), 2, drop_last=False),
            ('centre',),
            metrics=('average_drop',),
            mean=(0.0,) * 3,
            std=(1.0,) * 3,
        )


def test_a_temperature_divides_the_logits_of_its_pooling(make_model: Callable[..., nn.Module]) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    network = Predictor(make_model('test_resnet'), temperatures={'gap': 2.0, 'ca': 0.5})
    with network.evaluating():
        logits = network.logits(images)
        for pooling, temperature in (('gap', 2.0), ('ca', 0.5)):
            expected = (logits[pooling].double() / temperature).softmax(1)
            torch.testing.assert_close(network.probabilities(logits[pooling], pooling).double(), expected)
