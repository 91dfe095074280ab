"""Measurements: shared between metrics and poolings, and added by a function and a row."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import timm_castream
from timm_castream.attribution import attribute
from timm_castream.evaluate import evaluate
from timm_castream.evaluation.report import Report
from timm_castream.metrics import METRICS, Measurements, MetricRow
from timm_castream.metrics.curves import saliency_rank
from timm_castream.metrics.faithfulness import area_under_curve, average_drop
from timm_castream.metrics.measurements import (
    MEASUREMENTS,
    REFERENCES,
    MapGroup,
    References,
    measurement,
    measurement_of_one_pooling,
    perturbed,
    reference,
)

SIDE, LABELS = 32, torch.tensor([3, 0, 7])
POOLINGS = ('gap', 'ca')


@pytest.fixture
def model(make_model) -> nn.Module:
    model = make_model('test_resnet', {'output_stride': 8}, SIDE)
    with torch.no_grad():
        model.fc.weight.mul_(8)
    return model


@pytest.fixture
def images() -> Tensor:
    coarse = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    return F.interpolate(coarse, (SIDE, SIDE), mode='bicubic')


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """The tables as they were, after a test that adds to them."""
    saved = [(table, dict(table)) for table in (MEASUREMENTS, REFERENCES, METRICS)]
    yield
    for table, content in saved:
        table.clear()
        table.update(content)


def run(model: nn.Module, images: Tensor, methods: tuple[str, ...], metrics: tuple[str, ...], **kwargs) -> Report:
    return evaluate(model, DataLoader(TensorDataset(images, LABELS), 3), methods, metrics=metrics, **kwargs)


def add(name: str, needs: str, values, **kwargs) -> None:
    METRICS[name] = MetricRow(name, name, name.upper(), True, frozenset({needs}), values, **kwargs)


def probability(model: nn.Module, images: Tensor, pooling: str) -> Tensor:
    """(B,) of the labels."""
    with torch.no_grad(), timm_castream.pooling(model, pooling):
        return model(images).softmax(1)[range(len(images)), LABELS]


@pytest.mark.parametrize('name', METRICS)
def test_a_metric_reads_what_it_names_and_no_more(name: str) -> None:
    row = METRICS[name]
    assert row.needs <= MEASUREMENTS.keys()
    shapes = {
        'road_morf_prob': (2, 5),
        'road_lerf_prob': (2, 5),
        'pixel_shares': (2, 5),
        'map_of_masked': (2, 8, 8),
        'maps_of_randomised': (2, 4, 8, 8),
    }
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 8, 8, generator=generator)
    measured = {
        name: torch.rand(shapes.get(name, (2, 5) if name.endswith('_curve') else (2,)), generator=generator)
        for name in row.needs
    } | {
        'masked_prob': torch.tensor([0.5, 0.25]),
        'insertion_curve': torch.rand(2, 5),
        'deletion_curve': torch.rand(2, 5),
        'saliency': maps,
        'boxes': torch.tensor([[[1.0, 1, 5, 5]]] * 2),
    }
    prob = torch.tensor([0.5, 0.5])
    assert len(row.values(Measurements(prob=prob, **{need: measured[need] for need in row.needs}))) == 2
    for need in row.needs:
        less = {other: measured[other] for other in row.needs - {need}}
        with pytest.raises(AttributeError, match=need):
            row.values(Measurements(prob=prob, **less))


def test_maps_that_both_poolings_share_are_forwarded_once(model, images) -> None:
    forwards: list[int] = []
    handle = model.conv1.register_forward_hook(lambda module, args, output: forwards.append(len(output)))
    report = run(model, images, ('random', 'centre', 'attention'), ('average_drop', 'deletion'))
    handle.remove()
    points = SIDE // 8 - 1
    assert sum(forwards) == 3 + 3 + 3 * 3 * (1 + points)  # images, zeros, and the changed images of three methods
    for pooling in POOLINGS:
        alone = run(model, images, ('random', 'centre', 'attention'), ('average_drop', 'deletion'), poolings=(pooling,))
        for (_, method, metric), estimate in alone.figures.items():
            assert report[pooling, method, metric].value == pytest.approx(estimate.value, abs=1e-4)


def test_maps_that_agree_on_some_images_are_measured_as_those_that_differ(model, images) -> None:
    maps = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    maps[1, 1] = maps[0, 1]
    forwards: list[int] = []
    handle = model.conv1.register_forward_hook(lambda module, args, output: forwards.append(len(output)))
    arrays = {'mine': {'gap': maps[0].numpy(), 'ca': maps[1].numpy()}}
    report = run(model, images, arrays, ('average_drop', 'insertion'), target='predicted')
    handle.remove()
    assert sum(forwards) == 3 + 3 + (2 + 2 + 1) * (1 + SIDE // 8 - 1)
    for position, pooling in enumerate(POOLINGS):
        alone = run(
            model, images, {'mine': maps[position].numpy()}, ('average_drop', 'insertion'), target='predicted',
            poolings=(pooling,),
        )  # fmt: skip
        for column in ('average_drop', 'insertion'):
            name = f'{pooling}/mine/{column}'
            assert report.values.pairs[name] == pytest.approx(alone.values.pairs[name], abs=1e-4)


def test_a_mask_of_ones_own_is_a_function_and_a_row(model, images) -> None:
    @measurement
    def top_half_prob(maps: MapGroup) -> Tensor:
        return maps.predict_each(lambda index: maps.mask(index, maps.rank[index] < SIDE * SIDE // 2))

    add('top_half', 'top_half_prob', lambda m: average_drop(m.prob, m.top_half_prob))
    report = run(model, images, ('grad_cam',), ('top_half',))
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    for pooling in POOLINGS:
        saliency = attribute(model, images, 'grad_cam', LABELS, pooling)[:, None].double()
        flat = F.interpolate(saliency, (SIDE, SIDE), mode='bilinear').float().flatten(1)
        masks = torch.zeros_like(flat)
        for mask, values in zip(masks, flat, strict=True):
            mask[values.sort(descending=True, stable=True).indices[: SIDE * SIDE // 2]] = 1
        pixels = (images * std + mean) * masks.view(3, 1, SIDE, SIDE)
        p, o = (probability(model, x, pooling) for x in (images, (pixels - mean) / std))
        expected = 100 * (p - o).clamp(min=0) / p
        assert report.values.pairs[f'{pooling}/grad_cam/top_half'] == pytest.approx(expected.numpy(), abs=1e-3)


def test_a_curve_from_another_end_is_a_reference_a_function_and_a_row(model, images) -> None:
    @reference
    def black(references: References) -> Tensor:
        mean, std = references.predictor.normalisation(references.x)
        return (-mean / std).expand(3, SIDE, SIDE)[None]

    @measurement
    def black_curve(maps: MapGroup) -> Tensor:
        return perturbed(maps, 'black', 'image')

    add('from_black', 'black_curve', lambda m: area_under_curve(m.black_curve), curve='black_curve')
    report = run(model, images, ('grad_cam',), ('from_black',), poolings=('ca',), keep_curves=True)
    saliency = attribute(model, images, 'grad_cam', LABELS, 'ca')[:, None].double()
    rank = saliency_rank(F.interpolate(saliency, (SIDE, SIDE), mode='bilinear')[:, 0].float())
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    dark = (-mean / std).expand_as(images)
    expected = torch.stack(
        [
            probability(model, torch.where((rank < step * 8 * SIDE)[:, None], images, dark), 'ca')
            for step in range(SIDE // 8 + 1)
        ],
        dim=1,
    )
    assert report.curves['ca', 'grad_cam', 'from_black'] == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_metric_of_stability_explains_other_images(model, images) -> None:
    @measurement_of_one_pooling
    def distance(maps: MapGroup) -> Tensor:
        assert maps.explain is not None
        same, noisy = (
            maps.explain_each(lambda index, shift=shift: maps.references.x[maps.image[index]] + shift)
            for shift in (0, 0.1)
        )
        torch.testing.assert_close(same, maps.saliency)
        return (noisy - maps.saliency).abs().mean((1, 2))

    add('instability', 'distance', lambda m: 100 * m.distance)
    report = run(model, images, ('grad_cam', 'centre'), ('instability',))
    for pooling in POOLINGS:
        one, other = (
            attribute(model, x, 'grad_cam', LABELS, pooling)[:, None].double() for x in (images, images + 0.1)
        )
        resized = [F.interpolate(maps, (SIDE, SIDE), mode='bilinear') for maps in (one, other)]
        expected = 100 * (resized[0] - resized[1]).abs().mean((1, 2, 3))
        assert expected.max() > 0.1
        values = report.values.pairs[f'{pooling}/grad_cam/instability']
        assert values == pytest.approx(expected.numpy(), abs=1e-2)
        assert report[pooling, 'centre', 'instability'].value == 0
