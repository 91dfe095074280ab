"""The protocol on a batch, against loops over single images in float64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from references import count_masks, devkit_average_precision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import timm_castream
from timm_castream.attribution.user_methods import resolve_methods
from timm_castream.evaluate import evaluate
from timm_castream.evaluation.plan import Plan
from timm_castream.metrics import DEFAULT_METRICS as METRICS

METHODS = ('grad_cam', 'grad_cam_pp', 'score_cam')
POOLINGS = ('gap', 'ca')
SIDE, STEP = 48, 8 * 48
LABELS = torch.tensor([3, 0, 7, 7, 1])
MANY_LABELS = torch.tensor(
    [
        [1, 0, 0, -1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 1, 0, 0, 1, 0],
        [-1, 0, 0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0, 0, 0],
    ],
    dtype=torch.float32,
)


@pytest.fixture
def model(make_model) -> nn.Module:
    """Maps of 6 x 6, and probabilities that a mask moves."""
    model = make_model('test_resnet', {'output_stride': 8}, SIDE)
    with torch.no_grad():
        model.fc.weight.mul_(8)
    return model.double()


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(5, 3, 6, 6, generator=generator, dtype=torch.float64)
    fine = torch.randn(5, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return F.interpolate(coarse, (SIDE, SIDE), mode='bicubic') + 0.3 * fine


def loader_of(images: Tensor, labels: Tensor, batch_size: int = 2) -> DataLoader:
    return DataLoader(TensorDataset(images, labels), batch_size)


class Reference:
    """The protocol of one image after another, from the equations."""

    def __init__(self, model: nn.Module, pooling: str, multilabel: bool) -> None:
        self.model, self.pooling, self.multilabel = model, pooling, multilabel
        self.mean, self.std = (
            torch.tensor(model.pretrained_cfg[k], dtype=torch.float64).view(3, 1, 1) for k in ('mean', 'std')
        )

    def probabilities(self, images: Tensor) -> Tensor:
        with torch.no_grad(), timm_castream.pooling(self.model, self.pooling):
            logits = self.model(images)
        exp = logits.exp()
        return exp / (1 + exp) if self.multilabel else exp / exp.sum(1, keepdim=True)

    def features_and_gradient(self, image: Tensor, label: int) -> tuple[Tensor, Tensor]:
        kept = []

        def cut(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[0]

        handle = self.model.layer4.register_forward_hook(cut)
        with timm_castream.pooling(self.model, self.pooling):
            logit = self.model(image[None])[0, label]
        handle.remove()
        return kept[0][0].detach(), torch.autograd.grad(logit, kept)[0][0]

    def saliency(self, method: str, image: Tensor, label: int) -> Tensor:
        features, gradient = self.features_and_gradient(image, label)
        total = torch.zeros(features.shape[1:], dtype=torch.float64)
        if method == 'score_cam':
            features = features[features.amax((1, 2)) > features.amin((1, 2))]
            masks = F.interpolate(features[None], (SIDE, SIDE), mode='bilinear', align_corners=True)[0]
            masked = torch.stack([self.masked(image, scaled(mask)) for mask in masks])
            for channel, prob in zip(features, self.probabilities(masked)[:, label], strict=True):
                total += prob * channel
            return scaled(total.clamp(min=0))
        for channel, g in zip(features, gradient, strict=True):
            alpha = torch.where(g != 0, g**2 / (2 * g**2 + channel.sum() * g**3), 0)
            total += channel * (g.mean() if method == 'grad_cam' else (alpha * g.clamp(min=0)).sum())
        return scaled(total.clamp(min=0))

    def masked(self, image: Tensor, mask: Tensor) -> Tensor:
        return ((image * self.std + self.mean) * mask - self.mean) / self.std

    def metrics(self, method: str, image: Tensor, label: int) -> list[float]:
        saliency = F.interpolate(self.saliency(method, image, label)[None, None], (SIDE, SIDE), mode='bilinear')[0]
        p = self.probabilities(image[None])[0, label].item()
        o = self.probabilities(self.masked(image, saliency)[None])[0, label].item()
        order = np.argsort(-saliency.flatten().numpy().astype(np.float32), kind='stable')
        blurred = F.avg_pool2d(F.pad(image, (2, 2, 2, 2)), 5, 1)  # to 3e-6 the paper's 5 x 5 filter of sigma 5
        areas = []
        for start, finish in ((blurred, image), (image, torch.zeros_like(image))):
            frames = []
            for done in range(0, SIDE * SIDE + STEP, STEP):
                frame = start.clone().flatten(1)
                frame[:, order[:done]] = finish.flatten(1)[:, order[:done]]
                frames.append(frame.view(3, SIDE, SIDE))
            curve = self.probabilities(torch.stack(frames))[:, label].tolist()
            areas.append(sum((a + b) / 2 for a, b in itertools.pairwise(curve)) / (len(curve) - 1))
        return [100 * v for v in (max(0, p - o) / p, max(0, o - p) / (1 - p), float(o > p), *areas)]


def scaled(value: Tensor) -> Tensor:
    return (value - value.min()) / (value.max() - value.min()) if value.max() > value.min() else torch.zeros_like(value)


def explained(reference: Reference, images: Tensor, labels: Tensor, target: str) -> Iterator[tuple[Tensor, int]]:
    for image, label in zip(images, labels, strict=True):
        if target == 'predicted':
            yield image, int(reference.probabilities(image[None])[0].argmax())
        elif label.ndim:
            yield from ((image, c) for c, value in enumerate(label) if value == 1)
        else:
            yield image, int(label)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('labels', 'target'),
    [(LABELS, 'truth'), (LABELS, 'predicted'), (MANY_LABELS, 'truth')],
    ids=['truth', 'predicted', 'multi-label'],
)
def test_every_cell_of_the_table_equals_a_loop_over_single_images(model, images, labels, target) -> None:
    report = evaluate(model, loader_of(images, labels), METHODS, POOLINGS, target)
    seen = set()
    for pooling in POOLINGS:
        reference = Reference(model, pooling, labels.ndim > 1)
        chosen = list(explained(reference, images, labels, target))
        seen.add(tuple(c for _, c in chosen))
        for method in METHODS:
            expected = np.mean([reference.metrics(method, image, c) for image, c in chosen], axis=0)
            cells = [report[pooling, method, k].value for k in METRICS]
            np.testing.assert_allclose(cells, expected, atol=2e-3, err_msg=f'{pooling} {method}')
    if target == 'predicted':
        assert len(seen) == 2, 'the poolings must disagree on a class, or the test cannot tell whose class was taken'
    assert len({estimate.value for estimate in report.figures.values()}) > 20, 'cells of one value show nothing'


def test_accuracy_is_the_share_of_right_predictions_under_each_pooling(model, images) -> None:
    labels = Reference(model, 'ca', False).probabilities(images).argmax(1)
    labels[3] = (labels[3] + 1) % 10
    gap = 100 * (Reference(model, 'gap', False).probabilities(images).argmax(1) == labels).double().mean().item()
    report = evaluate(model, loader_of(images, labels), ('grad_cam',))
    assert report.accuracy_name == 'accuracy'
    assert report.accuracy['ca'].value == pytest.approx(80)
    assert report.accuracy['gap'].value == pytest.approx(gap)


def test_mean_average_precision_is_the_devkits_without_the_labels_that_do_not_count(model, images) -> None:
    report = evaluate(model, loader_of(images, MANY_LABELS), ('grad_cam',))
    assert report.accuracy_name == 'mAP'
    labels = MANY_LABELS.numpy()
    for pooling in POOLINGS:
        scores = Reference(model, pooling, True).probabilities(images).numpy()
        expected = [
            devkit_average_precision(labels[counts, c], scores[counts, c])
            for c in range(10)
            if ((counts := labels[:, c] >= 0) & (labels[:, c] == 1)).any()
        ]
        assert report.accuracy[pooling].value == pytest.approx(100 * np.mean(expected))


def images_through_the_backbone(model: nn.Module, *args, **kwargs) -> int:
    count = 0

    def add(module: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal count
        count += len(inputs[0])

    handle = model.conv1.register_forward_pre_hook(add)
    evaluate(model, *args, **kwargs)
    handle.remove()
    return count


def test_both_poolings_share_every_forward_but_those_of_their_own_maps(model, images) -> None:
    loader = loader_of(images, LABELS, batch_size=3)
    masks = count_masks(model.forward_features(images))
    own = 5 * len(METHODS) * (1 + 2 * (SIDE * SIDE // STEP - 1))  # masked images, and curves without their ends
    shared = 5 + 5 + 3 + masks  # images, blurred, zeros for the first batch, masks
    assert images_through_the_backbone(model, loader, METHODS, ('ca',)) == shared + own
    assert images_through_the_backbone(model, loader, METHODS, ('gap',)) == shared + own
    assert images_through_the_backbone(model, loader, METHODS, POOLINGS) == shared + 2 * own


@pytest.mark.parametrize('batch_size', [7, 1000])
def test_the_batch_size_of_a_forward_never_shows(model, images, batch_size) -> None:
    loader = loader_of(images[:3], LABELS[:3])
    expected, report = evaluate(model, loader), evaluate(model, loader, batch_size=batch_size)
    for key, estimate in expected.figures.items():
        assert report[key].value == pytest.approx(estimate.value, abs=1e-6), key


@pytest.mark.slow
def test_options_for_speed_change_rounding_alone(model, images, monkeypatch) -> None:
    model, images = model.float(), images[:3].float()
    loader = loader_of(images, LABELS[:3])
    expected = evaluate(model, loader)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend=backend, fullgraph=True))
    for options in ({'channels_last': True}, {'torchcompile': True, 'batch_size': 64}):
        report = evaluate(model, loader, **options)
        for key, estimate in expected.figures.items():
            assert report[key].value == pytest.approx(estimate.value, abs=0.05), (key, options)
    assert len(graphs) == 3, 'one graph for both poolings and one for each'


def test_probabilities_are_float32_under_autocast(model, images) -> None:
    model, images = model.float(), images.float()
    report = evaluate(model, loader_of(images, LABELS), ('grad_cam',), amp_dtype=torch.bfloat16)
    prob = report.values.pairs['ca/prob']
    bfloat16 = torch.tensor(prob).bfloat16().double().numpy()
    assert (prob != bfloat16).all()
    np.testing.assert_allclose(
        prob, Reference(model.double(), 'ca', False).probabilities(images.double())[range(5), LABELS], atol=0.1
    )


def test_saliency_of_another_layer_is_asked_for_by_name(model, images) -> None:
    loader = loader_of(images, LABELS)
    expected = evaluate(model, loader, ('grad_cam',))
    assert evaluate(model, loader, ('grad_cam',), layer='layer4').figures == expected.figures
    assert evaluate(model, loader, ('grad_cam',), layer='layer3').figures != expected.figures


@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        (torch.tensor([0, 1, 2, 10, 3]), 'has classes from 2 to 10, the model has 0 to 9'),
        (torch.tensor([0, -1, 2, 3, 3]), r'has classes from -1'),
        (torch.tensor([0.0, 1, 2, 3, 4]), r'class indices'),
        (torch.zeros(5, 4), r'\(2, 4\), the model has 10 classes'),
    ],
)
def test_labels_that_do_not_fit_are_refused(model, images, labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(model, loader_of(images, labels), ('grad_cam',))


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="target 'best' is unknown, valid ones: 'truth', 'predicted'"):
        Plan(resolve_methods(METHODS), POOLINGS, target='best')
