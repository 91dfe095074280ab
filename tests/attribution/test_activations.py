"""Maps of models of every kind: wrapped, compiled, quantised, in half precision, of other libraries.

The oracles are the same weights without the wrapper, and autograd through the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from conftest import make_backbone
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from timm_castream import attach, attention_maps, forward_both, pooling
from timm_castream.attribution import attribute, attribute_all
from timm_castream.inference.predictor import Predictor

MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)
CAMS = ('grad_cam', 'grad_cam_pp', 'score_cam', 'layer_cam', 'xgrad_cam', 'hires_cam')


class Normalise(nn.Module):
    """Pixels in [0, 1] to normalised images."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('mean', torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer('std', torch.tensor(STD).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Returns(nn.Module):
    """A wrapper that changes the output of a model."""

    def __init__(self, model: nn.Module, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, images: Tensor) -> Any:
        return self.change(self.model(images))


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def model(make_model: Callable[..., nn.Module]) -> nn.Module:
    model = make_model('test_resnet')
    model.get_classifier().weight.data.mul_(20)
    model.pretrained_cfg.update(mean=MEAN, std=STD)
    return model


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_efficientnet'])
def test_a_wrapper_that_normalises_gives_the_maps_of_its_model_on_normalised_images(
    name: str, make_model: Callable[..., nn.Module], pixels: Tensor
) -> None:
    model = make_model(name).double()
    model.get_classifier().weight.data.mul_(20)
    model.pretrained_cfg.update(mean=MEAN, std=STD)
    wrapper = nn.Sequential(Normalise(), model).double()
    x = wrapper[0](pixels.double())
    target = torch.tensor([[1, 7], [3, 0]])
    methods = ('attention', *CAMS) if name == 'test_resnet' else ('attention', 'grad_cam')
    expected = attribute_all(model, x, methods, target)
    assert all(maps.any() for maps in expected.values())
    given = attribute_all(wrapper, pixels.double(), methods, target, mean=(0.0,), std=(1.0,))
    for key, maps in expected.items():
        torch.testing.assert_close(given[key], maps, atol=1e-6, rtol=0)  # its buffers were float32
    torch.testing.assert_close(forward_both(wrapper, pixels.double()), forward_both(model, x))
    torch.testing.assert_close(attention_maps(wrapper, pixels.double()), attention_maps(model, x))


def test_a_wrapper_that_changes_its_images_must_say_how_they_are_normalised(model: nn.Module, pixels: Tensor) -> None:
    wrapper = nn.Sequential(Normalise(), model)
    with pytest.raises(ValueError, match=r'Sequential changes its images.*ResNet.*mean='):
        attribute(wrapper, pixels, 'score_cam')
    # One that gives them on has those of the model inside.
    inside = attribute(nn.Sequential(model), pixels, 'score_cam')
    torch.testing.assert_close(inside, attribute(model, pixels, 'score_cam'))


@pytest.mark.parametrize(
    'change',
    [
        lambda logits: {'logits': 3 * logits},
        lambda logits: (3 * logits, logits),
        lambda logits: (3 * logits)[:, :, None, None],
    ],
    ids=['mapping', 'tuple', 'map of one location'],
)
def test_a_wrappers_own_logits_are_explained_whatever_holds_them(
    change: Callable[[Tensor], Any], model: nn.Module, pixels: Tensor
) -> None:
    network = Predictor(Returns(model, change))
    with network.evaluating():
        logits = network.logits(pixels)
    for mode in ('gap', 'ca'):
        with torch.no_grad(), pooling(model, mode):
            torch.testing.assert_close(logits[mode], 3 * model(pixels), atol=1e-4, rtol=0)  # of another memory format
    sharper = copy.deepcopy(model)
    sharper.get_classifier().weight.data.mul_(3)
    sharper.get_classifier().bias.data.mul_(3)
    target = torch.tensor([1, 5])
    ours = attribute_all(network.model, pixels, CAMS, target)
    for key, maps in attribute_all(sharper, pixels, CAMS, target).items():
        torch.testing.assert_close(ours[key], maps, atol=1e-4, rtol=0)


def test_every_stream_in_an_ensemble_is_switched(model: nn.Module, pixels: Tensor) -> None:
    class Mean(nn.Module):
        def __init__(self, *models: nn.Module) -> None:
            super().__init__()
            self.models = nn.ModuleList(models)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([model(x) for model in self.models]).mean(0)

    other = copy.deepcopy(model)
    for parameter in other.castream.parameters():
        parameter.data.mul_(1.3)
    ensemble = Mean(model, other)
    with torch.no_grad():
        expected = [forward_both(one, pixels) for one in (model, other)]
        both = forward_both(ensemble, pixels)
    for mode in ('gap', 'ca'):
        torch.testing.assert_close(both[mode], (expected[0][mode] + expected[1][mode]) / 2)
    with pytest.raises(ValueError, match=r'Mean holds 2 models with a CA-Stream: .*layer='):
        attribute(ensemble, pixels, 'grad_cam')
    assert attribute(ensemble, pixels, 'grad_cam', layer='models.1.layer4').shape == (2, 2, 2)


def test_a_wrapper_that_calls_its_model_several_times_is_refused(model: nn.Module, pixels: Tensor) -> None:
    class Flips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x) + self.model(x.flip(3))

    with torch.no_grad(), pooling(model, 'gap'):
        expected = model(pixels) + model(pixels.flip(3))
    torch.testing.assert_close(forward_both(Flips(), pixels)['gap'], expected)
    with pytest.raises(ValueError, match='Flips calls its forward_head 2 times'):
        attribute(Flips(), pixels, 'grad_cam')


def test_a_subclass_with_a_forward_of_its_own_is_explained_by_it(pixels: Tensor) -> None:
    class Doubled(timm.models.ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.forward_head(self.forward_features(x * 2))

    plain = make_backbone('test_resnet')
    own = copy.deepcopy(plain)
    own.__class__ = Doubled
    for method in ('grad_cam', 'hires_cam'):
        expected = attribute(plain, pixels * 2, method, torch.arange(10).expand(2, 10))
        assert expected.any()
        torch.testing.assert_close(attribute(own, pixels, method, torch.arange(10).expand(2, 10)), expected)


def test_float_images_meet_a_half_model_in_its_precision(model: nn.Module, pixels: Tensor) -> None:
    half = copy.deepcopy(model).bfloat16()
    torch.testing.assert_close(attention_maps(half, pixels)[-1], attention_maps(model, pixels)[-1], atol=0.05, rtol=0)
    both = forward_both(half, pixels)
    for mode, logits in forward_both(model, pixels).items():
        assert (both[mode].float() - logits).abs().max() < 0.1 * logits.abs().max()
    maps = attribute_all(half, pixels, ('attention', *CAMS))
    assert all(value.dtype == torch.float32 and value.amax() == 1 for value in maps.values())


@pytest.mark.parametrize('how', ['compile', 'model.compile', 'in a wrapper'])
def test_a_compiled_network_of_others_that_ran_before_has_the_maps_of_the_uncompiled_one(
    how: str, pixels: Tensor
) -> None:
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(num_classes=5).eval()
    expected = attribute(plain, pixels, 'grad_cam', torch.tensor([1, 2]), layer='layer3')
    assert expected.any()
    model, layer = copy.deepcopy(plain), 'layer3'
    if how == 'model.compile':
        model.compile(backend='eager')
    else:
        model = torch.compile(model, backend='eager')
    if how == 'in a wrapper':
        model, layer = nn.Sequential(model), '0.layer3'
    with torch.no_grad():
        model(pixels)
    maps = attribute(model, pixels, 'grad_cam', torch.tensor([1, 2]), layer=layer)
    torch.testing.assert_close(maps, expected)


@pytest.mark.filterwarnings('ignore')
def test_a_dynamically_quantised_head_has_no_gradients_and_score_cam_works(pixels: Tensor) -> None:
    plain = make_backbone('test_resnet')
    plain.get_classifier().weight.data.mul_(20)
    model = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})
    with pytest.raises(ValueError, match=r'No gradient of the class scores of ResNet reaches .*score_cam'):
        attribute(model, pixels, 'grad_cam', torch.tensor([1, 5]))
    maps = attribute(model, pixels, 'score_cam', torch.tensor([1, 5]))
    assert (maps - attribute(plain, pixels, 'score_cam', torch.tensor([1, 5]))).abs().mean() < 0.05


def token_vit() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model('test_vit', img_size=64, num_classes=10).eval()
    nn.init.normal_(model.head.weight, std=0.5)
    return model


def hf_vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=64,
        patch_size=16,
        num_labels=5,
        initializer_range=0.3,
    )
    return ViTForImageClassification(config).eval()


@pytest.mark.parametrize(
    ('make', 'layer', 'works'),
    [
        (token_vit, 'blocks.5', "'blocks.4'"),
        (token_vit, 'blocks.5.attn', "'blocks.4'"),
        (token_vit, 'norm', "'blocks.4'"),
        (hf_vit, 'vit.layernorm', r"'vit\.layers\.1'"),
        (hf_vit, 'vit.layers.2', r"'vit\.layers\.1'"),
    ],
)
def test_a_layer_whose_tokens_nothing_reads_is_refused_with_one_that_works(
    make: Callable[[], nn.Module], layer: str, works: str, pixels: Tensor
) -> None:
    model = make()
    with pytest.raises(ValueError, match=f"reaches the locations of layer '{layer}'.*name layer {works}"):
        attribute(model, pixels, 'grad_cam', torch.tensor([1, 4]), layer=layer)
    assert attribute(model, pixels, 'grad_cam', torch.tensor([1, 4]), layer=works.strip("'").replace('\\', '')).any()


def test_a_transformers_model_has_the_maps_of_autograd_through_it(pixels: Tensor) -> None:
    model, layer = hf_vit().double(), 'vit.layers.1'
    outputs: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    logits = model(pixels.double()).logits
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[:, 3].sum(), outputs[0])
    features, gradient = (t[:, 1:].transpose(1, 2).unflatten(2, (4, 4)).detach() for t in (outputs[0], gradient))
    cam = (gradient.mean((2, 3), keepdim=True) * features).sum(1).clamp(min=0)
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    maps = attribute(model, pixels.double(), 'grad_cam', torch.tensor([3, 3]), layer=layer)
    torch.testing.assert_close(maps, torch.where(high > low, (cam - low) / (high - low), 0))
    assert maps.any()
    score = attribute(model, pixels.double(), 'score_cam', 3, layer=layer, mean=MEAN, std=STD)
    assert score.shape == (2, 4, 4) and score.any()


def test_labels_made_under_inference_mode_are_taken(model: nn.Module, pixels: Tensor) -> None:
    with torch.inference_mode():
        labels, images = torch.tensor([1, 5]), pixels.clone()
    for method in CAMS:
        expected = attribute(model, pixels, method, labels.clone())
        assert torch.equal(attribute(model, images, method, labels), expected)


def test_a_model_made_under_inference_mode_is_refused_by_gradient_methods(pixels: Tensor) -> None:
    with torch.inference_mode():
        model = make_backbone('test_resnet')
    with pytest.raises(ValueError, match=r'weights of ResNet were made under torch\.inference_mode'):
        attribute(model, pixels, 'grad_cam')
    assert attribute(model, pixels, 'score_cam').any()


@pytest.mark.parametrize('target', [5, [5, 5], torch.tensor([5, 5]).numpy(), torch.tensor([5, 5], dtype=torch.int32)])
def test_targets_are_numbers_lists_and_arrays_too(target: Any, model: nn.Module, pixels: Tensor) -> None:
    expected = attribute(model, pixels, 'grad_cam', torch.tensor([5, 5]))
    assert torch.equal(attribute(model, pixels, 'grad_cam', target), expected)


def test_one_logit_explains_both_answers(pixels: Tensor) -> None:
    model = attach(make_backbone('test_resnet', num_classes=1))
    double = model.double()
    x = pixels.double()
    network = Predictor(double)
    assert network.num_classes == 2
    with network.evaluating():
        probability = {p: network.probabilities(logits, p) for p, logits in network.logits(x).items()}
    for mode in ('gap', 'ca'):
        with torch.no_grad(), pooling(double, mode):
            yes = double(x)[:, 0].sigmoid()
        torch.testing.assert_close(probability[mode], torch.stack([1 - yes, yes], 1))
    # Two classes with the logits -z and z have the same gradients.
    two = attach(make_backbone('test_resnet', num_classes=2)).double()
    two.load_state_dict({k: v for k, v in double.state_dict().items() if not k.startswith('fc.')}, strict=False)
    two.fc.weight.data.copy_(torch.cat([-double.fc.weight, double.fc.weight]))
    two.fc.bias.data.copy_(torch.cat([-double.fc.bias, double.fc.bias]))
    target = torch.tensor([[0, 1], [0, 1]])
    gradient_methods = tuple(name for name in CAMS if name != 'score_cam')
    for key, maps in attribute_all(two, x, gradient_methods, target).items():
        assert maps.any()
        torch.testing.assert_close(attribute_all(double, x, gradient_methods, target)[key], maps)
    with pytest.raises(ValueError, match='the model has 0 to 1'):
        attribute(double, x, 'grad_cam', 2)


def test_one_logit_of_a_multi_label_model_is_one_class(pixels: Tensor) -> None:
    model = make_backbone('test_resnet', num_classes=1)
    network = Predictor(model, activation='sigmoid')
    with network.evaluating():
        logits = network.logits(pixels)['gap']
    assert network.num_classes == 1 and logits.shape == (2, 1)
    with pytest.raises(ValueError, match='the model has 0 to 0'):
        attribute(model, pixels, 'grad_cam', 1, activation='sigmoid')


def test_maps_of_a_model_in_train_mode_leave_its_statistics_alone(model: nn.Module, pixels: Tensor) -> None:
    expected = forward_both(model, pixels), attention_maps(model, pixels)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    torch.testing.assert_close((forward_both(model, pixels), attention_maps(model, pixels)), expected)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize('name', ['test_vit', 'deit_tiny_distilled_patch16_224'])
def test_hires_cam_of_a_class_token_reads_the_layer_behind_the_norm(name: str, pixels: Tensor) -> None:
    torch.manual_seed(0)
    sizes = {} if name == 'test_vit' else {'embed_dim': 32, 'depth': 6, 'num_heads': 2}
    model = timm.create_model(name, img_size=64, num_classes=10, **sizes).eval().double()
    for classifier in (module for module in model.modules() if isinstance(module, nn.Linear)):
        nn.init.normal_(classifier.weight, std=0.3)
    outputs: list[Tensor] = []
    handle = model.get_submodule('blocks.5.norm1').register_forward_hook(lambda m, args, output: outputs.append(output))
    logits = model(pixels.double())
    handle.remove()
    prefix = model.num_prefix_tokens
    target = torch.arange(10).expand(2, 10)
    maps = attribute(model, pixels.double(), 'hires_cam', target)
    assert maps.any()
    for k in range(10):
        (gradient,) = torch.autograd.grad(logits[:, k].sum(), outputs[0], retain_graph=True)
        cam = (gradient * outputs[0])[:, prefix:].sum(2).clamp(min=0).detach().view(2, 4, 4)
        low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
        torch.testing.assert_close(maps[:, k], torch.where(high > low, (cam - low) / (high - low), 0))
    # In float32 the input of the last block gives rounding noise, which is constant.
    noise = attribute(model.float(), pixels, 'hires_cam', target, layer='blocks.4')
    assert not noise.any()


class Then(nn.Module):
    """A network and what becomes of its output."""

    def __init__(self, network: nn.Module, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.network(x))


@pytest.mark.parametrize(
    ('num_classes', 'last', 'word', 'activation'),
    [
        (10, nn.Softmax(1), 'softmax', 'softmax'),
        (10, lambda scores: scores.half().softmax(1), 'softmax', 'softmax'),
        (1, nn.Sigmoid(), 'sigmoid', 'softmax'),
        (10, nn.Sigmoid(), 'sigmoid', 'sigmoid'),
    ],
)
def test_a_network_that_gives_probabilities_is_refused(
    num_classes: int, last: Callable[[Tensor], Tensor], word: str, activation: str, pixels: Tensor
) -> None:
    network = timm.create_model('test_resnet', num_classes=num_classes).eval()
    with pytest.raises(ValueError, match=f'Then gives probabilities, .* without its {word}'):
        attribute(Then(network, last), pixels, 'grad_cam', layer='network.layer4', activation=activation)


def test_the_logarithm_of_probabilities_has_the_probabilities_of_the_network(pixels: Tensor) -> None:
    network = timm.create_model('test_resnet', num_classes=10).eval()
    predictor = Predictor(Then(network, lambda scores: scores.softmax(1).log()))
    with torch.no_grad():
        expected = network(pixels).softmax(1)
        found = predictor.probabilities(predictor.all_logits(pixels)['gap'])
    torch.testing.assert_close(found.float(), expected)
    predictor.check_scores(predictor.all_logits(pixels))


@pytest.mark.parametrize('freeze', [False, True])
def test_a_traced_network_has_the_scores_of_the_network_and_no_layers(freeze: bool, pixels: Tensor) -> None:
    network = timm.create_model('test_resnet', num_classes=10).eval()
    traced = torch.jit.trace(network, pixels)
    traced = torch.jit.freeze(traced) if freeze else traced
    predictor = Predictor(traced)
    with predictor.evaluating():
        logits = predictor.all_logits(pixels)['gap']
    torch.testing.assert_close(logits, network(pixels), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="layer 'layer4'"):
        attribute(traced, pixels, 'grad_cam', layer='layer4')


def test_a_function_in_place_of_a_network_is_one_sentence(pixels: Tensor) -> None:
    with pytest.raises(ValueError, match=r'must be a torch\.nn\.Module, got function'):
        attribute(lambda x: x, pixels, 'random')  # type: ignore[arg-type]


@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'test_vit'])
def test_a_batch_in_two_halves_has_the_maps_of_its_images_one_by_one(
    name: str, make_model: Callable[..., nn.Module]
) -> None:
    model = make_model(name).double()
    x = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    target = torch.tensor([1, 7, 3, 0, 2])
    methods = ('attention', 'grad_cam', 'grad_cam_pp')
    given = attribute_all(model, x, methods, target, batch_size=4)
    single = [attribute_all(model, x[i : i + 1], methods, target[i : i + 1]) for i in range(5)]
    for key, maps in given.items():
        torch.testing.assert_close(maps, torch.cat([one[key] for one in single]), atol=1e-9, rtol=0)
    assert all(maps.any() for maps in given.values())
