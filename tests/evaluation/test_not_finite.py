"""NaN and infinity in maps and in the scores of the network: what is left out of which figure, counted and named."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from six_images import Six
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_castream import pooling
from timm_castream.evaluate import evaluate
from timm_castream.evaluation.plots import draw_curves
from timm_castream.evaluation.report import Report
from timm_castream.evaluation.tables import compared


@pytest.fixture
def model(make_model) -> nn.Module:
    return make_model('test_resnet')


def is_image(x: Tensor, image: Tensor) -> Tensor:
    return (x == image).flatten(1).all(1)


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_an_image_for_which_the_network_gives_nan_is_in_no_figure_and_is_named(value, model, tmp_path) -> None:
    target = Six().images[3]

    class Net(nn.Module):
        def __init__(self, bad: bool) -> None:
            super().__init__()
            self.model, self.bad = model, bad

        def forward(self, x: Tensor) -> Tensor:
            scores = self.model(x)
            return torch.where(is_image(x, target)[:, None], value, scores) if self.bad else scores

    methods = {'mine': lambda x, t: x.sum(1), 'grad_cam': 'grad_cam'}
    report = evaluate(Net(True), DataLoader(Six(), 2), methods, output_dir=tmp_path)
    without = evaluate(Net(False), DataLoader(Six(3), 2), methods)
    assert report.num_images == 5 and report.num_maps('mine') == 5
    for key, estimate in without.figures.items():
        assert report.figures[key].value == pytest.approx(estimate.value, abs=1e-4), key
    assert report.accuracy['ca'].value == without.accuracy['ca'].value
    assert list(report.not_finite) == ['image 3'] and 'image 3' in str(report)
    saved = json.loads((tmp_path / 'evaluation.json').read_text())
    assert list(saved['not_finite']) == ['image 3']
    again = evaluate(Net(True), DataLoader(Six(), 2), methods, output_dir=tmp_path)  # resumes
    assert again.not_finite == report.not_finite and again.figures == report.figures


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_map_with_nan_is_in_no_figure_of_its_method_and_the_image_stays_in_the_others(value, model, tmp_path) -> None:
    """Image 3 has no map of `mine` under GAP alone, and image 1 none of `other` under both."""
    images = Six().images

    def mine(x: Tensor, classes: Tensor) -> Tensor:
        maps = x.sum(1)
        if not in_ca():
            maps[is_image(x, images[3]), 5, 5] = value
        return maps

    def other(x: Tensor, classes: Tensor) -> Tensor:
        maps = x.abs().sum(1)
        maps[is_image(x, images[1]), 5, 5] = value
        return maps

    def in_ca() -> bool:  # evaluate sets the model to the pooling
        with torch.no_grad():
            return not torch.equal(model(images[:1]), plain)

    with torch.no_grad(), pooling(model, 'gap'):
        plain = model(images[:1])
    methods = {'mine': mine, 'other': other, 'grad_cam': 'grad_cam'}
    metrics = ('average_drop', 'average_gain', 'insertion')
    report = evaluate(model, DataLoader(Six(), 2), methods, metrics=metrics, output_dir=tmp_path, keep_curves=True)

    # By hand: the figures of a method are means over its images, those of the others beside it over all six.
    good = {'mine': lambda x, t: x.sum(1), 'other': lambda x, t: x.abs().sum(1), 'grad_cam': 'grad_cam'}
    whole = evaluate(model, DataLoader(Six(), 2), good, metrics=metrics).values.pairs
    left = {'mine': [0, 1, 2, 4, 5], 'other': [0, 2, 3, 4, 5], 'grad_cam': [0, 1, 2, 3, 4, 5]}
    for method, kept in left.items():
        for metric in metrics:
            means = {p: whole[f'{p}/{method}/{metric}'][kept].mean() for p in ('gap', 'ca')}
            for p, expected in means.items():
                assert report[p, method, metric].value == pytest.approx(expected, abs=1e-4), (p, method, metric)
            difference = report.difference(method, metric)
            assert difference.value == pytest.approx(means['ca'] - means['gap'], abs=1e-4)
            assert difference.low <= difference.value <= difference.high
    shared = [0, 2, 4, 5]  # of both methods
    for (p, metric), value_ in report.compare('mine', 'other').items():
        paired = whole[f'{p}/mine/{metric}'][shared] - whole[f'{p}/other/{metric}'][shared]
        assert value_.value == pytest.approx(paired.mean(), abs=1e-4)
        assert paired.min() - 1e-3 <= value_.low <= value_.high <= paired.max() + 1e-3

    assert report.num_images == 6 and report.num_maps('mine', 'other') == 4
    assert [report.num_maps(method) for method in methods] == [5, 5, 6]
    assert report.not_finite_maps == {('gap', 'mine'): 1, ('gap', 'other'): 1, ('ca', 'other'): 1}
    assert list(report.not_finite) == ['image 1', 'image 3']
    printed = ' '.join(str(report).split())
    assert 'Maps that have NaN and are left out of their method: mine GAP 1, other GAP 1, other CA 1' in printed
    assert 'Maps without NaN, of 6: mine 5, other 5;' in printed and '2 images have NaN' in printed
    assert '4 of 6 maps, those without NaN in both methods' in compared(report, 'mine', 'other')
    with open(tmp_path / 'table.csv', newline='') as file:
        rows = {(row['method'], row['pooling']): row for row in csv.DictReader(file)}
    assert [rows['mine', p]['nan_maps'] for p in ('gap', 'ca')] == ['1', '0']
    assert [rows['mine', p]['maps'] for p in ('gap', 'ca', 'ca-gap')] == ['5', '5', '5']
    assert [rows['grad_cam', p]['maps'] for p in ('gap', 'ca', 'ca-gap')] == ['6', '6', '6']
    saved = json.loads((tmp_path / 'evaluation.json').read_text())
    assert [(row['nan_maps'], row['maps']) for row in saved['rows'] if row['pooling'] != 'ca-gap'] == [
        (1, 5), (0, 5), (1, 5), (1, 5), (0, 6), (0, 6)
    ]  # fmt: skip
    with open(tmp_path / 'images.csv', newline='') as file:
        cells = {row['file']: row for row in csv.DictReader(file)}
    assert cells['image 3']['gap/mine/average_drop'] == 'nan' and cells['image 3']['ca/mine/average_drop'] != 'nan'
    loaded = Report.load(tmp_path)
    assert loaded.figures == report.figures and loaded.not_finite == report.not_finite
    assert loaded.compare('mine', 'other') == report.compare('mine', 'other')
    draw_curves(report)  # without the missing ones


def test_a_method_that_gives_nan_on_every_image_has_no_figures_and_the_others_have(model) -> None:
    methods = {'mine': lambda x, target: x.sum(1) * math.nan, 'grad_cam': 'grad_cam'}
    report = evaluate(model, DataLoader(Six(), 2), methods, metrics=('average_drop', 'insertion'), keep_curves=True)
    alone = evaluate(model, DataLoader(Six(), 2), ('grad_cam',), metrics=('average_drop', 'insertion'))
    assert all(report[key] == estimate for key, estimate in alone.figures.items())
    assert math.isnan(report['ca', 'mine', 'average_drop'].value) and report.num_maps('mine') == 0
    assert 'nan' not in str(report).replace('NaN', '')
    draw_curves(report)


def test_nan_on_every_image_is_one_sentence(model) -> None:
    methods = {'mine': lambda x, target: x.sum(1) * math.nan}
    with pytest.raises(ValueError, match='No image has finite maps and scores: mine under gap gives NaN'):
        evaluate(model, DataLoader(Six(), 2), methods, metrics=('average_drop',))
    model.get_classifier().weight.data.fill_(math.nan)  # and that is no layer without gradients
    with pytest.raises(ValueError, match='No image has finite maps and scores: NaN scores under gap'):
        evaluate(model, DataLoader(Six(), 2), ('grad_cam',), ('gap',), metrics=('average_drop',), layer='layer3')


def test_a_method_without_values_has_a_dash_in_latex_as_in_text(model) -> None:
    methods = {'none': lambda x, target: x.sum(1) * math.nan, 'good': lambda x, target: x.sum(1)}
    report = evaluate(model, DataLoader(Six(), 2), methods, metrics=('average_drop',))
    for intervals in (True, False):
        rows = [line for line in report.to_latex(intervals).splitlines() if line.endswith(r'\\')][1:]
        assert [line.removesuffix(r' \\').split(' & ')[2] == '-' for line in rows] == [True] * 3 + [False] * 3
