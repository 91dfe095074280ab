"""Maps of torch-cam's extractors by name against torch-cam called by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchcam.methods
from by_hand import seed, torchcam_maps
from torch import Tensor, nn

from timm_castream.attribution import attribute
from timm_castream.attribution.peers import LIBRARIES

TARGET = torch.tensor([7, 2])
ARGUMENTS: dict[str, dict[str, Any]] = {
    'CAM': {},
    'GradCAM': {},
    'GradCAMpp': {},
    'XGradCAM': {},
    'LayerCAM': {},
    'FinerCAM': {'gamma': 0.3, 'num_references': 2},
    'ScoreCAM': {'batch_size': 16},
    'ISCAM': {'num_samples': 2},
}
FAST = [
    *(('test_resnet', name) for name in ARGUMENTS),
    ('test_convnext', 'GradCAMpp'),
    ('swin', 'ScoreCAM'),
    ('test_vit', 'LayerCAM'),
    ('test_vit', 'FinerCAM'),
]
ALL = [
    (backbone, name)
    for backbone in ('test_resnet', 'test_convnext', 'swin', 'test_vit')
    for name in ARGUMENTS
    if (backbone, name) != ('test_vit', 'CAM')
]


def check(backbone: str, name: str, make_model: Callable[..., nn.Module], x: Tensor, mode: str) -> None:
    model, arguments = make_model(backbone), ARGUMENTS[name]
    expected = torchcam_maps(name, backbone, model, x, TARGET, mode, **arguments)
    source = ','.join([f'torchcam:{name}', *(f'{key}={value}' for key, value in arguments.items())])
    torch.testing.assert_close(attribute(model, x, source, TARGET, mode), expected, atol=2e-4, rtol=0)
    assert (expected.amax((1, 2)) == 1).any()


@pytest.mark.parametrize(('backbone', 'name'), FAST)
def test_maps_are_those_of_torch_cam_by_hand(
    backbone: str, name: str, make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    check(backbone, name, make_model, x, 'ca' if name == 'LayerCAM' else 'gap')


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['gap', 'ca'])
@pytest.mark.parametrize(('backbone', 'name'), ALL)
def test_maps_are_those_of_torch_cam_by_hand_on_every_kind_of_network(
    backbone: str, name: str, mode: str, make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    check(backbone, name, make_model, x, mode)


@pytest.mark.parametrize(
    ('name', 'arguments'), [('SmoothGradCAMpp', {'num_samples': 3}), ('SSCAM', {'num_samples': 1})]
)
def test_noise_is_that_of_the_image_and_the_seed(
    name: str, arguments: dict[str, Any], make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    model, expected = make_model('test_resnet'), []
    for i in range(2):
        torch.manual_seed(seed(i))
        expected.append(torchcam_maps(name, 'test_resnet', model, x[i : i + 1], TARGET[i : i + 1], **arguments))
    source = f'torchcam:{name},num_samples={arguments["num_samples"]}'
    torch.testing.assert_close(attribute(model, x, source, TARGET, 'gap'), torch.cat(expected), atol=2e-4, rtol=0)


def test_class_activation_maps_need_a_classifier_of_averaged_maps(
    make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    with pytest.raises(ValueError, match=r'torchcam:CAM .*VisionTransformer.*no average'):
        attribute(make_model('test_vit'), x, 'torchcam:CAM', TARGET, 'gap')


def test_every_method_of_this_torch_cam_works_or_has_a_reason() -> None:
    bases = {'OutputTarget'}
    classes = {
        name for name, value in vars(torchcam.methods).items() if isinstance(value, type) and not name.startswith('_')
    }
    assert classes - bases == set(LIBRARIES['torchcam'].methods)
