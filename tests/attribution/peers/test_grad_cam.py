"""Maps of pytorch-grad-cam's methods by name against pytorch-grad-cam called by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam
import torch
from by_hand import grad_cam_maps, seed, unit_range
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate

from timm_castream import pooling
from timm_castream.attribution import attribute
from timm_castream.attribution.peers import LIBRARIES, why_not
from timm_castream.inference.predictor import Predictor

TARGET = torch.tensor([7, 2])
ARGUMENTS: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in (
            'GradCAM', 'HiResCAM', 'GradCAMElementWise', 'GradCAMPlusPlus', 'XGradCAM', 'LayerCAM', 'EigenCAM',
            'EigenGradCAM', 'SegEigenCAM', 'KPCA_CAM', 'ShapleyCAM', 'FinerCAM', 'FullGrad', 'ScoreCAM',
        )
    },
    'FEM': {'k': 0.5},
    'AblationCAM': {'batch_size': 8},
    'SESS': {'num_scales': 2, 'smooth': False},
}  # fmt: skip
# ShapleyCAM reshapes neither the maps that it weighs nor the class token away, and AblationCAM ablates the class token.
# FullGrad is refused where it misses most biases, and HiResCAM of tokens that are normalised behind the layer.
NOT_BY_HAND = {
    ('swin', 'ShapleyCAM'),
    ('test_vit', 'ShapleyCAM'),
    ('test_vit', 'AblationCAM'),
    ('test_convnext', 'FullGrad'),
    ('swin', 'FullGrad'),
    ('test_vit', 'FullGrad'),
    ('test_vit', 'HiResCAM'),
}
FAST = [
    *(('test_resnet', name) for name in ARGUMENTS),
    ('test_convnext', 'GradCAMPlusPlus'),
    ('swin', 'EigenGradCAM'),
    ('swin', 'AblationCAM'),
    ('test_vit', 'GradCAM'),
    ('test_vit', 'ScoreCAM'),
    ('test_vit', 'KPCA_CAM'),
]
ALL = [
    (backbone, name)
    for backbone in ('test_resnet', 'test_convnext', 'swin', 'test_vit')
    for name in ARGUMENTS
    if (backbone, name) not in NOT_BY_HAND
]


def check(backbone: str, name: str, make_model: Callable[..., nn.Module], x: Tensor, mode: str) -> None:
    model, arguments = make_model(backbone), ARGUMENTS[name]
    expected = grad_cam_maps(name, backbone, model, x, TARGET, mode, **arguments)
    source = ','.join([f'grad-cam:{name}', *(f'{key}={value}' for key, value in arguments.items())])
    torch.testing.assert_close(attribute(model, x, source, TARGET, mode), expected, atol=2e-4, rtol=0)
    assert (expected.amax((1, 2)) == 1).any()


@pytest.mark.parametrize(('backbone', 'name'), FAST)
def test_maps_are_those_of_pytorch_grad_cam_by_hand(
    backbone: str, name: str, make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    check(backbone, name, make_model, x, 'ca' if name in ('LayerCAM', 'ShapleyCAM') else 'gap')


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['gap', 'ca'])
@pytest.mark.parametrize(('backbone', 'name'), ALL)
def test_maps_are_those_of_pytorch_grad_cam_by_hand_on_every_kind_of_network(
    backbone: str, name: str, mode: str, make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    check(backbone, name, make_model, x, mode)


def test_arguments_of_the_call_and_of_the_base_method_reach_the_library(
    make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    model = make_model('test_resnet')
    plain = attribute(model, x, 'grad-cam:EigenGradCAM', TARGET, 'ca')
    smooth = attribute(model, x, 'grad-cam:EigenGradCAM,aug_smooth=True', TARGET, 'ca')
    assert (plain - smooth).abs().max() > 0.05
    finer = attribute(model, x, 'grad-cam:FinerCAM,alpha=0.5,comparison_categories=[1,2],base_method=LayerCAM', TARGET)
    assert (finer - attribute(model, x, 'grad-cam:FinerCAM', TARGET)).abs().max() > 0.05


def test_finer_cam_compares_the_class_with_others(make_model: Callable[..., nn.Module], x: Tensor) -> None:
    model = make_model('test_resnet')
    maps = attribute(model, x, 'grad-cam:FinerCAM', TARGET, 'gap')
    assert (maps - attribute(model, x, 'grad-cam:GradCAM', TARGET, 'gap')).abs().max() > 0.05
    # The score by its formula: differences to the three nearest classes, weighted by their probabilities.
    feature_maps = model.forward_features(x).detach().requires_grad_()
    logits = model.forward_gap_head(feature_maps)
    scores = []
    for row, c in zip(logits, TARGET.tolist(), strict=True):
        nearest = (row - row[c]).abs().argsort()[1:4]
        weights = row.softmax(0)[nearest]
        scores.append((weights * (row[c] - row[nearest])).sum() / weights.sum())
    (gradient,) = torch.autograd.grad(torch.stack(scores).sum(), feature_maps)
    by_hand = (gradient.mean((2, 3), keepdim=True) * feature_maps).sum(1).detach()
    resized = interpolate(unit_range(by_hand)[:, None], (64, 64), mode='bilinear')[:, 0]  # as the library does
    torch.testing.assert_close(maps, unit_range(resized), atol=1e-4, rtol=0)


@pytest.mark.parametrize('name', ['grad-cam:FinerCAM', 'torchcam:FinerCAM'])
def test_finer_cam_takes_no_function(name: str, make_model: Callable[..., nn.Module], x: Tensor) -> None:
    with pytest.raises(ValueError, match='it compares the class with others, and target is a function'):
        attribute(make_model('test_resnet'), x, name, lambda output: output.sum())


def test_random_weights_are_those_of_the_image_and_the_seed(make_model: Callable[..., nn.Module], x: Tensor) -> None:
    model, expected = make_model('test_resnet'), []
    for i in range(2):
        np.random.seed(seed(i))
        expected.append(grad_cam_maps('RandomCAM', 'test_resnet', model, x[i : i + 1], TARGET[i : i + 1]))
    state = np.random.get_state()[1].copy()
    maps = attribute(model, x, 'grad-cam:RandomCAM', TARGET, 'gap')
    torch.testing.assert_close(maps, torch.cat(expected), atol=1e-5, rtol=0)
    assert np.array_equal(state, np.random.get_state()[1])
    assert not torch.equal(maps, attribute(model, x, 'grad-cam:RandomCAM', TARGET, 'gap', seed=1))


def test_shapley_cam_reads_tokens(make_model: Callable[..., nn.Module], x: Tensor) -> None:
    """Behind the pooled map of swin are an average and a linear layer: no second derivative, so Grad-CAM is left."""
    model = make_model('swin')
    torch.testing.assert_close(
        attribute(model, x, 'grad-cam:ShapleyCAM', TARGET, 'gap'),
        grad_cam_maps('GradCAM', 'swin', model, x, TARGET),
        atol=1e-4,
        rtol=0,
    )


class GridOfTokens(nn.Module):
    """A ViT whose patch tokens pass `layer` as a map before the last block, for a library that does not reshape them."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit
        self.layer = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        vit, last = self.vit, self.vit.blocks[-1]
        tokens = vit.blocks[:-1](vit.norm_pre(vit._pos_embed(vit.patch_embed(x))))
        grid = self.layer(tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
        tokens = torch.cat([tokens[:, :1], grid.flatten(2).transpose(1, 2)], 1)
        return vit.forward_head(vit.norm(last(tokens)))


def test_shapley_cam_of_tokens_is_that_of_the_library_on_a_grid(
    make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    model = make_model('test_vit')
    with pooling(model, 'gap'), sdpa_kernel(SDPBackend.MATH):  # it takes second derivatives of the attention
        network = GridOfTokens(model)
        torch.testing.assert_close(network(x), model(x))
        scores = [pytorch_grad_cam.utils.model_targets.ClassifierOutputTarget(int(c)) for c in TARGET]
        method = pytorch_grad_cam.ShapleyCAM(network, [network.layer])
        expected = unit_range(method(x.clone(), scores))
        method.activations_and_grads.activations, method.activations_and_grads.gradients = (
            [],
            [],
        )  # the library's own clean-up fails on views
    maps = attribute(model, x, 'grad-cam:ShapleyCAM', TARGET, 'gap')
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=0)
    assert maps.amax() == 1
    # The tokens are normalised next, so the scores do not depend on their length: the second derivative times the tokens
    # is minus the gradient (Euler), and the weights are those of Grad-CAM times 1.5.
    torch.testing.assert_close(maps, attribute(model, x, 'grad-cam:GradCAM', TARGET, 'gap'), atol=1e-5, rtol=0)


def test_products_with_tokens_are_refused_before_a_normalisation_and_run_behind_it(
    make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    model = make_model('test_vit')
    predictor = Predictor(model, ('gap',))
    with pytest.raises(ValueError, match=rf'grad-cam:HiResCAM does not fit .*layer={predictor.norm_layer}'):
        attribute(model, x, 'grad-cam:HiResCAM', TARGET, 'gap')
    maps = attribute(model, x, 'grad-cam:HiResCAM', TARGET, 'gap', layer=predictor.norm_layer)
    # The library resizes the maps of the layer to the image.
    own = attribute(model, x, 'hires_cam', TARGET, 'gap')
    assert ((maps[:, 8::16, 8::16] > 0.5) == (own > 0.5)).float().mean() > 0.8


def test_every_method_of_this_pytorch_grad_cam_works_or_has_a_reason() -> None:
    helpers = {'AblationLayer', 'AblationLayerVit', 'AblationLayerFasterRCNN', 'ActivationsAndGradients'}
    classes = {name for name, value in vars(pytorch_grad_cam).items() if isinstance(value, type)}
    assert classes - helpers == set(LIBRARIES['grad-cam'].methods)


@pytest.mark.parametrize(
    ('backbone', 'fits'),
    [
        ('test_resnet', True),
        ('test_convnext', False),
        ('test_vit', False),
        ('swin', False),
        ('test_efficientnet', False),
    ],
)
def test_full_grad_is_refused_where_the_library_misses_most_biases(
    backbone: str, fits: bool, make_model: Callable[..., nn.Module]
) -> None:
    predictor = Predictor(make_model(backbone))
    counted = len(pytorch_grad_cam.FullGrad(predictor.backbone, []).bias_data)
    biases = len([name for name, _ in predictor.backbone.named_parameters() if name.endswith('bias')])
    problem = why_not('grad-cam:FullGrad', predictor, torch.randn(1, 3, 64, 64))
    assert (problem == '') == fits == (2 * counted > biases)
    assert fits or f'{biases - counted} of the {biases} layers with a bias are others' in problem
