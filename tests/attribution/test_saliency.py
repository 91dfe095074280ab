"""Attributions of whole models against autograd through the whole network, loops over masks, and three other libraries.

The oracles run the model as timm does, `model(x)`, image by image and channel by channel in float64.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import timm
import torch
from captum.attr import LayerGradCam
from conftest import make_backbone
from pytorch_grad_cam import GradCAM, GradCAMPlusPlus
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from references import count_masks
from torch import Tensor, nn
from torch.nn import functional as F
from torchcam.methods import GradCAM as TorchCamGradCAM

from timm_castream import attention_maps, forward_both, pooling
from timm_castream.attribution import attention_identity, attribute, attribute_all
from timm_castream.attribution.methods import PAPER_METHODS as METHODS

# Each backbone's pooled stage, and whether that gives (B, H, W, D).
POOLED = {'test_resnet': 'layer4', 'test_convnext': 'stages.3', 'test_efficientnet': 'bn2', 'swin': 'norm'}
CAMS = ('grad_cam', 'grad_cam_pp')
POOLINGS = ('gap', 'ca')
TARGET = torch.tensor([7, 2])
TARGETS = torch.arange(0, 10, 2)  # some unlikely: their maps are zero


@pytest.fixture
def x() -> Tensor:
    """Images of which the pooled map has 3 x 3 locations."""
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def runners_up(model: nn.Module, x: Tensor) -> Tensor:
    """(B,) classes that are not predicted, but not so unlikely that their maps are negative all over."""
    return sum(forward_both(model, x).values()).topk(2).indices[:, 1]


@pytest.fixture
def model(make_model: Callable[..., nn.Module]) -> nn.Module:
    return decided(make_model('test_resnet'))


@torch.no_grad()
def decided(model: nn.Module) -> nn.Module:
    """Spreads the logits: the probabilities of an untrained network are all alike."""
    model.get_classifier().weight.mul_(20)
    return model


def in_float64(model: nn.Module, x: Tensor, side: int = 96) -> tuple[nn.Module, Tensor]:
    return model.double(), x[..., :side, :side].double()


@contextmanager
def output_of(model: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        outputs.append(output)
        return output.clone()  # which what follows may change in place

    handle = model.get_submodule(layer).register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def unit_range(cam: np.ndarray) -> np.ndarray:
    cam = np.maximum(cam, 0)
    return (cam - cam.min()) / (cam.max() - cam.min() or 1)


def assert_same_maps(maps: Tensor, expected: list[np.ndarray], atol: float = 1e-9) -> None:
    """(K, h, w) against K maps, of which some must show something."""
    assert any(np.ptp(cam) for cam in expected)
    np.testing.assert_allclose(maps.numpy(), np.stack(expected), atol=atol)


def cam_oracle(model: nn.Module, x: Tensor, method: str, mode: str, layer: str, nhwc: bool) -> list[np.ndarray]:
    """One image, a map for each of its TARGETS, by autograd through the whole network and sums over locations."""
    with torch.enable_grad(), pooling(model, mode), output_of(model, layer) as outputs:
        logits = model(x[None])[0]
        gradients = [torch.autograd.grad(logits[k], outputs[0], retain_graph=True)[0] for k in TARGETS]
    cams = []
    for gradient in gradients:
        maps, gradient = (t.detach()[0].permute(2, 0, 1) if nhwc else t.detach()[0] for t in (outputs[0], gradient))
        total = np.zeros(maps.shape[1:])
        for a, g in zip(maps.numpy(), gradient.numpy(), strict=True):
            if method == 'grad_cam':
                weight = g.mean()
            else:
                weight = sum(v**2 / (2 * v**2 + a.sum() * v**3) * v for v in g.flatten() if v > 0)
            total += weight * a
        cams.append(unit_range(total))
    return cams


@torch.no_grad()
def score_cam_oracle(
    model: nn.Module, x: Tensor, mode: str, layer: str, nhwc: bool, sigmoid: bool = False
) -> list[np.ndarray]:
    """One image, a map for each of its TARGETS, one mask after the other."""
    mean, std = (x.new_tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    with pooling(model, mode), output_of(model, layer) as outputs:
        model(x[None])
    maps = outputs[0][0].permute(2, 0, 1) if nhwc else outputs[0][0]
    masks = []
    for a in maps:
        mask = F.interpolate(a[None, None], x.shape[1:], mode='bilinear', align_corners=True)[0, 0]
        masks.append((mask - mask.min()) / (mask.max() - mask.min()) if mask.max() > mask.min() else 0 * mask)
    with pooling(model, mode):
        logits = model(torch.stack([((x * std + mean) * mask - mean) / std for mask in masks]))
    cams = []
    for k in TARGETS:
        total = np.zeros(maps.shape[1:])
        for a, mask, row in zip(maps, masks, logits, strict=True):
            weight = row[k].sigmoid() if sigmoid else row.softmax(0)[k]
            total += float(weight) * a.numpy() * bool(mask.any())
        cams.append(unit_range(total))
    return cams


@pytest.mark.parametrize('mode', POOLINGS)
@pytest.mark.parametrize('name', POOLED)
def test_grad_cams_are_those_of_autograd_through_the_whole_network(
    name: str, mode: str, make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    model, x = in_float64(make_model(name), x, 64 if name == 'swin' else 96)
    for method in CAMS:
        maps = attribute(model, x, method, TARGETS.expand(2, -1), mode)
        for b in range(2):
            assert_same_maps(maps[b], cam_oracle(model, x[b], method, mode, POOLED[name], name == 'swin'))


@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'swin'])
def test_score_cam_is_a_loop_over_masked_images_for_both_poolings(
    name: str, make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    model, x = in_float64(decided(make_model(name)), x, 64)
    maps = attribute_all(model, x, ('score_cam',), TARGETS.expand(2, -1), batch_size=50)
    for mode in POOLINGS:
        for b in range(2):
            expected = score_cam_oracle(model, x[b], mode, POOLED[name], name == 'swin')
            assert_same_maps(maps[mode, 'score_cam'][b], expected)
    assert (maps['gap', 'score_cam'] - maps['ca', 'score_cam']).abs().max() > 1e-3


def test_score_cam_of_a_multi_label_model_weighs_by_the_sigmoid(model: nn.Module, x: Tensor) -> None:
    model, x = in_float64(model, x[:1], 64)
    maps = attribute(model, x, 'score_cam', TARGETS[None], activation='sigmoid')
    assert_same_maps(maps[0], score_cam_oracle(model, x[0], 'ca', 'layer4', False, sigmoid=True))
    assert (maps - attribute(model, x, 'score_cam', TARGETS[None])).abs().max() > 1e-3


@pytest.mark.parametrize(
    ('name', 'layer', 'nhwc'),
    [
        ('test_resnet', 'layer3', False),  # the stream reads it, and so does the next stage
        ('test_resnet', 'layer4.0.bn2', False),  # changed in place by what follows
        ('test_convnext', 'stages.3.blocks.0.mlp.fc2', True),  # the paper's ConvNeXt rows
        ('test_convnext', 'stages.3.blocks.0.mlp', True),
        ('swin', 'layers.2.blocks.0', True),
    ],
)
def test_a_named_layer_is_explained_by_every_method_under_both_poolings(
    name: str, layer: str, nhwc: bool, make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    model, x = in_float64(decided(make_model(name)), x[1:], 64)
    maps = attribute_all(model, x, (*CAMS, 'score_cam'), TARGETS[None], layer=layer)
    for mode in POOLINGS:
        for method in CAMS:
            assert_same_maps(maps[mode, method][0], cam_oracle(model, x[0], method, mode, layer, nhwc))
        assert_same_maps(maps[mode, 'score_cam'][0], score_cam_oracle(model, x[0], mode, layer, nhwc))


def test_the_layout_of_a_layer_is_found_where_images_are_not_square(make_model: Callable[..., nn.Module]) -> None:
    image = torch.randn(1, 3, 64, 128, generator=torch.Generator().manual_seed(5))
    model, x = in_float64(make_model('test_convnext'), image, 128)
    for layer, nhwc in (('stages.3', False), ('stages.3.blocks.0.mlp', True)):
        maps = attribute(model, x, 'grad_cam', TARGETS[None], layer=layer)
        assert maps.shape[2:] == (2, 4)
        assert_same_maps(maps[0], cam_oracle(model, x[0], 'grad_cam', 'ca', layer, nhwc))


def test_the_layout_of_a_linear_layer_is_known_where_all_its_sides_are_equal(
    make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    model, x = in_float64(make_model('test_convnext'), x[:1])
    layer = 'stages.0.blocks.0.mlp.fc2'  # 24 channels of 24 x 24
    maps = attribute(model, x, 'grad_cam', TARGETS[None], layer=layer)
    assert_same_maps(maps[0], cam_oracle(model, x[0], 'grad_cam', 'ca', layer, True))


def test_gradient_checkpointing_does_not_show_and_stays_on(model: nn.Module, x: Tensor) -> None:
    plain = {layer: attribute_all(model, x, CAMS, layer=layer) for layer in (None, 'layer2')}
    model.set_grad_checkpointing()
    for layer, expected in plain.items():
        for key, maps in attribute_all(model, x, CAMS, layer=layer).items():
            torch.testing.assert_close(maps, expected[key])
    assert model.grad_checkpointing


@pytest.mark.parametrize('mode', POOLINGS)
def test_grad_cams_agree_with_pytorch_grad_cam(mode: str, model: nn.Module, x: Tensor) -> None:
    target = runners_up(model, x)
    with torch.no_grad():  # its epsilon of 1e-6 must be small beside g^2
        model.get_classifier().weight.mul_(1e6)
    targets = [ClassifierOutputTarget(int(t)) for t in target]
    for method, peer in (('grad_cam', GradCAM), ('grad_cam_pp', GradCAMPlusPlus)):
        maps = attribute(model, x, method, target, mode)
        with pooling(model, mode), peer(model=model, target_layers=[model.layer4]) as cam:
            expected = cam(input_tensor=x, targets=targets)
        resized = F.interpolate(maps[:, None], x.shape[2:], mode='bilinear', align_corners=False)[:, 0]
        for b in range(2):
            np.testing.assert_allclose(unit_range(resized[b].numpy()), expected[b], atol=1e-4)


@pytest.mark.parametrize('mode', POOLINGS)
def test_models_work_unmodified_inside_torchcam_and_captum(mode: str, model: nn.Module, x: Tensor) -> None:
    target = runners_up(model, x)
    maps = attribute(model, x, 'grad_cam', target, mode).numpy()
    with pooling(model, mode), TorchCamGradCAM(model, 'layer4') as extractor:
        peer = extractor(target.tolist(), model(x))[0].detach()
    captum = LayerGradCam(model, model.layer4)
    with pooling(model, mode):
        attributions = captum.attribute(x, target, relu_attributions=True)[:, 0].detach()
    for b in range(2):
        np.testing.assert_allclose(unit_range(peer[b].numpy()), maps[b], atol=1e-5)
        np.testing.assert_allclose(unit_range(attributions[b].numpy()), maps[b], atol=1e-5)


def test_the_attention_is_the_pooled_stages_averaged_over_heads_and_the_same_for_every_class_and_pooling(
    make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    model, x = in_float64(make_model('test_resnet', stream_heads=2), x)
    maps = attribute_all(model, x, ('attention',), torch.tensor([[1, 2], [3, 4]]))
    for b in range(2):
        expected = unit_range(attention_maps(model, x)[-1][b].mean(0).detach().numpy())
        for mode in POOLINGS:
            for k in range(2):
                np.testing.assert_allclose(maps[mode, 'attention'][b, k].numpy(), expected, atol=1e-9)


def test_without_a_target_each_pooling_explains_its_own_prediction(model: nn.Module) -> None:
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        predicted = {mode: logits.argmax(1) for mode, logits in forward_both(model, x).items()}
    assert not torch.equal(predicted['gap'], predicted['ca'])
    maps = attribute_all(model, x, CAMS)
    assert all(torch.equal(maps[key], value) for key, value in attribute_all(model, x, CAMS, predicted).items())
    for mode in POOLINGS:
        assert torch.equal(maps[mode, 'grad_cam'], attribute(model, x, 'grad_cam', predicted[mode], mode))


def test_several_targets_an_image_give_the_maps_of_each(model: nn.Module, x: Tensor) -> None:
    model, x = in_float64(model, x, 64)
    targets = torch.tensor([[7, 1, 7], [2, 5, 0]])
    for layer, methods in ((None, METHODS), ('layer3', CAMS)):
        maps = attribute_all(model, x, methods, targets, layer=layer)
        assert all(value.shape[:2] == (2, 3) for value in maps.values())
        for k in range(3):
            for key, single in attribute_all(model, x, methods, targets[:, k], layer=layer).items():
                torch.testing.assert_close(maps[key][:, k], single, atol=1e-9, rtol=0)


def test_a_target_for_each_pooling_can_have_its_own_shape(model: nn.Module, x: Tensor) -> None:
    maps = attribute_all(model, x, ('grad_cam',), {'gap': torch.tensor([[1], [2]]), 'ca': None})
    assert maps['gap', 'grad_cam'].ndim == 4 and maps['ca', 'grad_cam'].ndim == 3


def test_an_image_gives_the_same_maps_alone_and_in_a_batch_whatever_the_batch_size(model: nn.Module, x: Tensor) -> None:
    model, x = in_float64(model, x, 64)
    together = attribute_all(model, x, METHODS, TARGET)
    for batch_size in (1, 7, 1000):
        for key, maps in attribute_all(model, x[1:], METHODS, TARGET[1:], batch_size=batch_size).items():
            torch.testing.assert_close(maps[0], together[key][1], atol=1e-9, rtol=0)


def test_a_class_specific_stream_is_explained_with_the_query_of_the_class_that_gap_predicts(
    make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    model, x = in_float64(make_model('test_resnet', stream_class_specific=True), x)
    maps = attribute_all(model, x, CAMS, TARGETS.expand(2, -1))
    for method in CAMS:
        assert_same_maps(maps['ca', method][0], cam_oracle(model, x[0], method, 'ca', 'layer4', False))


def test_a_plain_timm_model_is_explained_like_one_with_a_stream_under_gap(model: nn.Module, x: Tensor) -> None:
    plain = make_backbone('test_resnet')
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith('castream.')})
    for method in (*CAMS, 'score_cam'):
        torch.testing.assert_close(
            attribute(plain, x, method, TARGET, 'gap'), attribute(model, x, method, TARGET, 'gap'), atol=1e-5, rtol=0
        )
    assert torch.equal(attribute(plain, x, 'grad_cam', TARGET), attribute(plain, x, 'grad_cam', TARGET, 'gap'))
    assert torch.equal(attribute(model, x, 'grad_cam', TARGET), attribute(model, x, 'grad_cam', TARGET, 'ca'))
    with pytest.raises(ValueError, match=r"ResNet has no CA-Stream; .*, or choose pooling 'gap'\."):
        attribute(plain, x, 'grad_cam', pooling='ca')
    with pytest.raises(ValueError, match='has no CA-Stream'):
        attribute(plain, x, 'attention')


def test_a_greyscale_network_names_what_score_cam_needs() -> None:
    network = timm.create_model('test_resnet_castream', num_classes=4, in_chans=1).eval()
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    with pytest.raises(ValueError, match=r"got 3 for images of 1 channel: set model\.pretrained_cfg\['mean'\]"):
        attribute(network, x, 'score_cam')
    network.pretrained_cfg.update(mean=(0.5,), std=(0.5,))
    assert attribute(network, x, 'score_cam').shape == (1, 2, 2)


def test_every_registered_variant_has_a_mean_and_a_std_for_score_cam() -> None:
    for name in timm.list_models('*_castream'):
        cfg = timm.models.get_pretrained_cfg(name)
        assert len(cfg.mean) == len(cfg.std) == 3


class Passes:
    """Counts the images that pass a module, and in which gradient mode."""

    def __init__(self, module: nn.Module) -> None:
        self.images: list[int] = []
        self.with_gradients: set[bool] = set()
        self.handle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.images.append(len(output))
        self.with_gradients.add(torch.is_grad_enabled())


def test_all_grad_cams_of_both_poolings_cost_one_forward_without_a_graph(model: nn.Module, x: Tensor) -> None:
    passes = Passes(model.layer4)
    attribute_all(model, x, ('attention', *CAMS), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert passes.images == [2] and passes.with_gradients == {False}


def test_score_cam_of_both_poolings_costs_one_forward_of_each_mask_in_batches_of_the_size_given(
    model: nn.Module, x: Tensor
) -> None:
    with torch.no_grad():
        masks = count_masks(model.forward_features(x))
    passes = Passes(model.conv1)
    attribute_all(model, x, ('score_cam',), torch.tensor([[1, 2], [4, 5]]), batch_size=50)
    assert passes.images[0] == 2 and sum(passes.images[1:]) == masks
    assert set(passes.images[1:-1]) == {50} and passes.with_gradients == {False}


def test_gap_alone_does_not_run_the_stream(model: nn.Module, x: Tensor) -> None:
    passes = Passes(model.castream.blocks[0])
    attribute_all(model, x, (*CAMS, 'score_cam'), poolings=('gap',))
    assert not passes.images


def test_a_constant_feature_map_gives_zeros_by_every_method(model: nn.Module, x: Tensor) -> None:
    model.layer4.register_forward_hook(lambda module, args, output: output.mean((2, 3), keepdim=True).expand_as(output))
    for key, maps in attribute_all(model, x).items():
        assert maps.eq(0).all(), key


@pytest.mark.parametrize('caller', [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('layer', [None, 'layer3'])
def test_the_callers_gradient_mode_does_not_show_and_stays(
    caller: Callable[[], Any], layer: str | None, model: nn.Module, x: Tensor
) -> None:
    expected = attribute_all(model, x, layer=layer)
    with caller():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        maps = attribute_all(model, x.clone(), layer=layer)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    for key, value in maps.items():
        torch.testing.assert_close(value, expected[key])
        assert not value.requires_grad


def state_of(model: nn.Module) -> Any:
    return (
        [module.training for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
        [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        [buffer.sum().item() for buffer in model.buffers()],
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize('layer', [None, 'layer3'])
def test_the_model_runs_in_eval_mode_and_is_as_before_afterwards(
    layer: str | None, model: nn.Module, x: Tensor
) -> None:
    expected = attribute_all(model, x, target=TARGET, layer=layer)
    model.train()
    model.layer2.eval()
    next(model.parameters()).requires_grad_(False)
    before = state_of(model)
    for key, maps in attribute_all(model, x, target=TARGET, layer=layer).items():
        torch.testing.assert_close(maps, expected[key])
    assert state_of(model) == before


@pytest.mark.parametrize('broken', ['layer4', 'fc'])
@pytest.mark.parametrize('layer', [None, 'layer2'])
def test_the_model_is_as_before_after_an_error(layer: str | None, broken: str, model: nn.Module, x: Tensor) -> None:
    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError('broken')

    model.train()
    model.get_submodule(broken).register_forward_pre_hook(fail)
    before = state_of(model)
    with pytest.raises((RuntimeError, ValueError), match='broken'):
        attribute_all(model, x, layer=layer)
    assert state_of(model) == before


def test_threads_do_not_see_each_other(model: nn.Module) -> None:
    images = torch.randn(4, 2, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    layers = ('layer3', None, 'layer3', 'layer2')
    expected = [attribute_all(model, x, CAMS, layer=layer) for x, layer in zip(images, layers, strict=True)]
    wrong: list[Any] = []

    def work(i: int) -> None:
        for _ in range(5):
            try:
                for key, maps in attribute_all(model, images[i], CAMS, layer=layers[i]).items():
                    torch.testing.assert_close(maps, expected[i][key])
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize('half', ['autocast', 'weights'])
def test_half_precision_gives_float32_maps_close_to_those_of_float32(half: str, model: nn.Module, x: Tensor) -> None:
    expected = attribute_all(model, x, target=TARGET)
    if half == 'weights':
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast('cpu', torch.bfloat16, enabled=half == 'autocast'):
        maps = attribute_all(model, x, target=TARGET)
    for key, value in maps.items():
        assert value.dtype == torch.float32
        assert torch.corrcoef(torch.stack([value.flatten(), expected[key].flatten()]))[0, 1] > 0.95, key


@pytest.mark.parametrize('options', [{}, {'stream_block': 'proj_ca'}, {'stream_heads': 2}, {'stream_start': 4}])
def test_attention_logits_are_the_class_agnostic_cam_of_eq_5(
    options: dict[str, Any], make_model: Callable[..., nn.Module], x: Tensor
) -> None:
    model, x = in_float64(make_model('test_resnet', **options), x)
    identity = attention_identity(model, x)
    torch.testing.assert_close(identity.attention_logits, identity.cam, rtol=1e-10, atol=1e-10)
    assert identity.cam.shape == (2, 3, 3) and identity.cam.std() > 0.1
    # One head's attention is the softmax of these logits.
    if 'stream_heads' not in options:
        softmax = (identity.cam.flatten(1) / 96**0.5).softmax(1)
        torch.testing.assert_close(attention_maps(model, x)[-1].flatten(1), softmax)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            {'method': 'gradcam'},
            r"method 'gradcam' is unknown \(did you mean 'grad_cam'\?\), valid ones: 'attention', 'grad_cam'",
        ),
        ({'pooling': 'max'}, "pooling 'max' is unknown, valid ones: 'gap', 'ca'"),
        ({'activation': 'relu'}, "activation 'relu' is unknown"),
        ({'layer': 'layer9'}, "layer 'layer9' is no module of ResNet; it has conv1"),
        ({'layer': 'castream.blocks.0'}, r'castream\.blocks\.0 of ResNet gives \(1, 32\) and not one feature map'),
        (
            {'layer': 'castream'},
            "layer 'castream' of ResNet runs after the pooling or not at all: .* for example 'layer4'",
        ),
        ({'layer': 'global_pool'}, "layer 'global_pool' of ResNet runs after the pooling or not at all"),
        ({'layer': ''}, "layer '' is no module"),
        ({'batch_size': 0}, 'batch_size must be a positive int, got 0'),
        ({'target': torch.tensor([1, 10])}, 'target has classes from 1 to 10, the model has 0 to 9'),
        ({'target': torch.tensor([-1, 1])}, 'target has classes from -1 to 1'),
        (
            {'target': torch.tensor([1])},
            r'target must be a tensor of shape \(2,\) or \(2, K\), a row an image, got \(1,\)',
        ),
        ({'target': torch.zeros(2, 1, 1).long()}, r'got \(2, 1, 1\)'),
        ({'target': 'cat'}, 'got str'),
        ({'target': torch.tensor([0.5, 1.0])}, 'target must hold class indices, got torch.float32'),
        ({'target': {'gap': torch.tensor([1, 1])}}, "target has no classes for pooling 'ca', only for 'gap'"),
        ({'x': torch.zeros(3, 64, 64)}, r'got \(3, 64, 64\)'),
        ({'x': torch.zeros(0, 3, 64, 64)}, r'got \(0, 3, 64, 64\)'),
        ({'x': torch.zeros(2, 4, 64, 64)}, 'x has 4 channels, ResNet takes images of 3'),
        ({'x': torch.zeros(2, 3, 64, 64).byte()}, 'of torch.uint8'),
        ({'x': torch.full((2, 3, 64, 64), float('nan'))}, 'x must be finite, got NaN or infinity'),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    arguments: dict[str, Any], message: str, model: nn.Module, x: Tensor
) -> None:
    arguments = {'x': x, 'method': 'grad_cam', **arguments}
    with pytest.raises(ValueError, match=message) as error:
        attribute(model, **arguments)
    assert '\n' not in str(error.value)


def test_a_model_without_classes_or_without_a_map_is_refused(model: nn.Module, x: Tensor) -> None:
    for arguments in ((0,), (0, '')):
        model.reset_classifier(*arguments)
        with pytest.raises(ValueError, match='gives no class scores'):
            attribute(model, x, 'grad_cam')
    with pytest.raises(ValueError, match=r'CrossVit pools no feature map: its forward_features gives list'):
        attribute(timm.create_model('crossvit_9_240'), x, 'grad_cam', pooling='gap')
    with pytest.raises(ValueError, match='is no timm model'):
        attribute(nn.Conv2d(3, 3, 1), x, 'grad_cam', pooling='gap')


def test_a_layer_that_runs_more_than_once_is_refused(model: nn.Module, x: Tensor) -> None:
    shared = nn.Identity()
    model.layer3[0].drop_block, model.layer4[0].drop_block = shared, shared
    with pytest.raises(ValueError, match='runs 2 times before the pooling'):
        attribute(model, x, 'grad_cam', layer='layer4.0.drop_block')


@pytest.mark.parametrize(
    'method', ['grad_cam', 'hires_cam', 'captum:InputXGradient', 'grad-cam:GradCAM', 'torchcam:LayerCAM']
)
@pytest.mark.parametrize('mode', POOLINGS)
def test_a_function_of_the_output_that_picks_a_class_gives_the_maps_of_the_class(
    mode: str, method: str, model: nn.Module, x: Tensor
) -> None:
    maps = attribute(model, x, method, lambda output: output[3], mode)
    torch.testing.assert_close(maps, attribute(model, x, method, 3, mode), atol=1e-5, rtol=0)
    assert maps.shape[:1] == (2,) and maps.ndim == 3


def test_the_similarity_of_an_embedding_is_a_target_as_in_torch_cam(model: nn.Module, x: Tensor) -> None:
    model.reset_classifier(0)
    wanted = torch.randn(96, generator=torch.Generator().manual_seed(1))

    def similarity(embedding: Tensor) -> Tensor:
        return torch.cosine_similarity(embedding, wanted, dim=0)

    with pooling(model, 'gap'), TorchCamGradCAM(model, 'layer4') as extractor:
        expected = extractor(scores=model(x), targets=similarity)[0]
    for name in ('grad_cam', 'torchcam:GradCAM'):
        maps = attribute(model, x, name, similarity, 'gap')
        for b in range(2):
            np.testing.assert_allclose(maps[b].numpy(), unit_range(expected[b].detach().numpy()), atol=1e-4)
    assert expected.std() > 0.1


def test_score_cam_weighs_by_the_values_of_a_function(model: nn.Module, x: Tensor) -> None:
    maps = attribute(model, x, 'score_cam', lambda output: output.softmax(0)[3], 'gap')
    torch.testing.assert_close(maps, attribute(model, x, 'score_cam', 3, 'gap'), atol=1e-5, rtol=0)


def test_one_regression_output_is_explained_as_it_is(make_model: Callable[..., nn.Module], x: Tensor) -> None:
    model = make_model('test_resnet', {'num_classes': 1})
    maps = attribute(model, x, 'grad_cam', lambda output: output, 'gap')
    negative = attribute(model, x, 'grad_cam', lambda output: -output[0], 'gap')
    assert (maps * negative).abs().max() < 1e-6 < (maps - negative).abs().max()


@pytest.mark.parametrize('method', ['grad_cam', 'score_cam', 'captum:Saliency'])
@pytest.mark.parametrize(
    ('function', 'message'),
    [
        (lambda output: output, r'must give a tensor of one floating-point number, got \(10,\)\.$'),
        (lambda output: 3.0, 'must give .* got float'),
        (lambda output: output.argmax(), r'must give .* got one of torch\.int64'),
        (lambda output: output[0] > 0, r'must give .* got one of torch\.bool'),
        (lambda output: output[10], 'raised IndexError: index 10 is out of bounds'),
        (lambda output, target: output[0], 'raised TypeError: .*missing 1 required positional argument'),
    ],
)
def test_a_function_that_gives_no_number_is_refused(
    model: nn.Module, x: Tensor, method: str, function: Callable[..., Any], message: str
) -> None:
    with pytest.raises(
        ValueError, match=rf'^target as a function gets the output for one image, \(10,\), and {message}'
    ):
        attribute(model, x, method, function)


@pytest.mark.parametrize('function', [lambda output: output[3].detach(), lambda output: torch.ones(())])
@pytest.mark.parametrize('method', ['grad_cam', 'captum:Saliency', 'grad-cam:GradCAM', 'torchcam:LayerCAM'])
def test_a_function_without_a_gradient_is_told_to_methods_that_need_one_alone(
    model: nn.Module, x: Tensor, method: str, function: Callable[..., Any]
) -> None:
    with pytest.raises(
        (ValueError, RuntimeError), match='target as a function gives numbers without a gradient, as after'
    ):
        attribute(model, x, method, function)
    for name in ('score_cam', 'captum:Occlusion'):
        torch.testing.assert_close(
            attribute(model, x, name, lambda output: output[3].detach()),
            attribute(model, x, name, lambda output: output[3]),
        )


def test_a_list_of_functions_is_refused(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r'target must be a tensor of shape \(2,\) .*, got list'):
        attribute(model, x, 'grad_cam', [lambda output: output[0]] * 2)
