"""Maps of captum's methods by name against captum called by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from by_hand import captum_maps, seed, torchcam_maps, unit_range
from captum.attr import NoiseTunnel, Saliency
from torch import Tensor, nn

from timm_castream import pooling
from timm_castream.attribution import attribute
from timm_castream.attribution.peers import LIBRARIES

TARGET = torch.tensor([7, 2])
# Of test_convnext those of class 7 are negative at every location in some methods, and maps of zeros would say little.
POSITIVE = {'test_convnext': torch.tensor([5, 8])}
RELU = ('DeepLift', 'GuidedBackprop', 'Deconvolution', 'GuidedGradCam')
# Occlusion's window is a quarter of each side of 64 pixels, and moves by half of that.
ARGUMENTS: dict[str, dict[str, Any]] = {
    'Occlusion': {'sliding_window_shapes': (3, 16, 16), 'strides': (3, 8, 8)},
    'Saliency': {},
    'InputXGradient': {},
    'IntegratedGradients': {'n_steps': 6},
    'LayerGradCam': {},
    'LayerActivation': {},
    'LayerGradientXActivation': {},
    'LayerIntegratedGradients': {'n_steps': 6},
    'LayerConductance': {'n_steps': 6},
    'InternalInfluence': {'n_steps': 6},
    'LayerDeepLift': {},
    **{name: {} for name in RELU},
}
FAST = [
    *(('test_resnet', name) for name in ARGUMENTS),
    ('swin', 'IntegratedGradients'),
    ('swin', 'LayerConductance'),
    ('swin', 'DeepLift'),
    ('test_vit', 'LayerActivation'),
    ('test_vit', 'InternalInfluence'),
    ('test_vit', 'LayerGradientXActivation'),
    ('test_convnext', 'LayerGradCam'),
]
# Their maps of a class-token network are refused: zero on paper, and rounding noise.
NOISE = ('LayerGradientXActivation', 'InternalInfluence')
# captum integrates from the baseline's class token too, which is no part of the map.
NOT_BY_HAND = {('test_vit', 'LayerIntegratedGradients')}
ALL = [
    (backbone, name)
    for backbone in ('test_resnet', 'test_convnext', 'swin', 'test_vit')
    for name in ARGUMENTS
    if (backbone, name) not in NOT_BY_HAND
]


def source(name: str) -> str:
    steps = ',n_steps=6' if 'n_steps' in ARGUMENTS[name] else ''
    return f'captum:{name}{steps}'


def check(backbone: str, name: str, make_model: Callable[..., nn.Module], x: Tensor, mode: str) -> None:
    model = make_model(backbone)
    target = POSITIVE.get(backbone, TARGET)
    if backbone != 'test_resnet' and name in RELU and (backbone, name) != ('swin', 'DeepLift'):  # Swin has a Softmax
        with pytest.raises(ValueError, match=rf'captum:{name} .*{type(model).__name__}.*no such module'):
            attribute(model, x, source(name), target, mode)
        return
    if backbone == 'test_vit' and name in NOISE:
        with pytest.raises(ValueError, match=rf'captum:{name} .*rounding noise: .*layer=blocks\.\d\.norm1'):
            attribute(model, x, source(name), target, mode)
        return
    if name == 'LayerGradCam' and backbone in ('swin', 'test_vit'):
        # captum takes the second axis for the channels, whatever it holds; torch-cam reads a reshaped map.
        expected = torchcam_maps('GradCAM', backbone, model, x, target, mode)
    else:
        # DeepLift's rule for softmax takes a mean over the batch, so it is called for one image at a time.
        size = 1 if 'DeepLift' in name else len(x)
        parts = zip(x.split(size), target.split(size), strict=True)
        expected = torch.cat([captum_maps(name, backbone, model, *part, mode, **ARGUMENTS[name]) for part in parts])
    torch.testing.assert_close(attribute(model, x, source(name), target, mode), expected, atol=2e-4, rtol=0)
    # The gradient of an average and a linear classifier is the same at every location.
    assert (expected.amax((1, 2)) == 1).any() or (name == 'InternalInfluence' and mode == 'gap')


@pytest.mark.parametrize(('backbone', 'name'), FAST)
def test_maps_are_those_of_captum_by_hand(
    backbone: str, name: str, make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    check(backbone, name, make_model, x, 'ca' if name in ('LayerConductance', 'InternalInfluence') else 'gap')


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['gap', 'ca'])
@pytest.mark.parametrize(('backbone', 'name'), ALL)
def test_maps_are_those_of_captum_by_hand_on_every_kind_of_network(
    backbone: str, name: str, mode: str, make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    check(backbone, name, make_model, x, mode)


def test_a_noise_tunnel_gives_the_same_map_alone_as_in_a_batch(make_model: Callable[..., nn.Module], x: Tensor) -> None:
    model = make_model('test_resnet')
    expected = []
    for i in range(2):
        torch.manual_seed(seed(i))
        with pooling(model, 'gap'):
            tunnel = NoiseTunnel(Saliency(model))
            maps = tunnel.attribute(x[i : i + 1], nt_type='smoothgrad_sq', nt_samples=3, target=TARGET[i : i + 1])
        expected.append(unit_range(maps.sum(1)))
    name = 'captum:NoiseTunnel,nt_type=smoothgrad_sq,nt_samples=3'
    before = torch.random.get_rng_state()
    torch.testing.assert_close(attribute(model, x, name, TARGET, 'gap'), torch.cat(expected), atol=1e-5, rtol=0)
    assert torch.equal(before, torch.random.get_rng_state())
    other = attribute(model, x, 'captum:NoiseTunnel,attribution_method=InputXGradient', TARGET, 'gap')
    assert (other - torch.cat(expected)).abs().max() > 0.1
    with pytest.raises(ValueError, match=r"attribution_method 'LayerGradCam', valid ones: Saliency, InputXGradient"):
        attribute(model, x, 'captum:NoiseTunnel,attribution_method=LayerGradCam', TARGET, 'gap')


def test_relevance_works_where_every_module_has_a_rule_and_leaves_the_network_as_it_was(x: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    ).eval()
    network = _Flat(model)
    from captum.attr import LRP

    expected = unit_range(LRP(network).attribute(x.clone(), target=TARGET).sum(1))
    torch.testing.assert_close(attribute(network, x, 'captum:LRP', TARGET), expected, atol=1e-6, rtol=0)
    unknown = nn.Sequential(model, nn.Flatten())
    before = {name: sorted(vars(module)) for name, module in unknown.named_modules()}
    with pytest.raises(RuntimeError, match=r'captum:LRP.*Flatten.*no rule'):
        attribute(unknown, x, 'captum:LRP', TARGET)
    assert before == {name: sorted(vars(module)) for name, module in unknown.named_modules()}


class _Flat(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).flatten(1)


def test_every_method_of_this_captum_works_or_has_a_reason() -> None:
    import captum.attr
    from captum.attr import Attribution

    # Base classes of others, and those for language models.
    others = {'Attribution', 'GradientAttribution', 'PerturbationAttribution', 'NeuronAttribution', 'LayerAttribution'}
    classes = {
        name
        for name in captum.attr.__all__
        if isinstance(getattr(captum.attr, name), type) and issubclass(getattr(captum.attr, name), Attribution)
    }
    assert {name for name in classes - others if 'LLM' not in name} == set(LIBRARIES['captum'].methods)
