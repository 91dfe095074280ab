"""Plots of a report: lines and bands of the curves, and one interval a method and metric."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from timm_castream.evaluate import evaluate
from timm_castream.evaluation.plots import draw_curves, draw_differences
from timm_castream.evaluation.report import Report
from timm_castream.visualize import save

METHODS = ('grad_cam', 'centre')


@pytest.fixture
def report(make_model) -> Report:
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, torch.arange(4)), 2)
    return evaluate(make_model('test_resnet'), loader, METHODS, keep_curves=True)


def test_kept_curves_have_the_areas_of_the_table(report: Report) -> None:
    assert len(report.curves) == 2 * len(METHODS) * 2
    for (pooling, method, kind), curves in report.curves.items():
        assert curves.shape == (4, 9)
        areas = [100 * sum((a + b) / 2 for a, b in itertools.pairwise(curve)) / 8 for curve in curves]
        assert report[pooling, method, kind].value == pytest.approx(np.mean(areas), abs=1e-3)


def test_a_line_a_pooling_has_the_mean_of_its_curves(report: Report, tmp_path: Path) -> None:
    figure = draw_curves(report)
    panels = np.array(figure.axes).reshape(2, 2)
    for row, method in zip(panels, METHODS, strict=True):
        for axes, kind in zip(row, ('insertion', 'deletion'), strict=True):
            for line, pooling in zip(axes.lines, ('gap', 'ca'), strict=True):
                np.testing.assert_allclose(line.get_ydata(), report.curves[pooling, method, kind].mean(0))
    pixels = np.asarray(Image.open(save(figure, tmp_path / 'curves.png')).convert('L'))
    assert pixels.min() < 100 < 250 < pixels.max()


def test_each_interval_is_that_of_the_difference(report: Report) -> None:
    figure = draw_differences(report)
    assert len(figure.axes) == len(report.metrics)
    for axes, metric in zip(figure.axes, report.metrics, strict=True):
        intervals = [line.get_xdata() for line in axes.lines[1::2]]
        for interval, method in zip(intervals, METHODS, strict=True):
            assert list(interval) == [*report.difference(method, metric)[1:]]


def test_dollars_in_a_label_are_no_formula(make_model, tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.zeros(2, 3, 64, 64), torch.arange(2)), 2)
    methods = {r'$\nope$': 'centre', '$1 or 2$': 'random'}
    report = evaluate(make_model('test_resnet'), loader, methods, metrics=('insertion',), keep_curves=True)
    for figure in (draw_curves(report), draw_differences(report)):
        save(figure, tmp_path / 'plot.svg')  # text that matplotlib reads as a formula is drawn or fails here


def test_text_of_the_plots_lies_inside_the_width_of_a_column_whatever_the_labels(make_model) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, torch.arange(2)), 2)
    methods = {f'captum:IntegratedGradients,n_steps={i},internal_batch_size=16': 'centre' for i in range(3)}
    report = evaluate(
        make_model('test_resnet'), loader, methods, metrics=('insertion', 'insertion_share'), keep_curves=True
    )
    for figure in (draw_curves(report), draw_differences(report)):
        figure.draw_without_rendering()
        inches = figure.get_tightbbox()
        assert figure.get_size_inches()[0] <= 3.5 and inches.x0 > -0.05 and inches.x1 < 3.5
        for axes in figure.axes:
            assert axes.get_position().width > 0.25
        texts = [text for axes in figure.axes for text in (axes.title, axes._left_title) if text.get_text()]
        titles = [text.get_window_extent() for text in texts]
        assert all(title.x1 <= figure.bbox.x1 for title in titles)
        assert not any(a.overlaps(b) for a, b in itertools.combinations(titles, 2))


def test_reports_without_curves_or_differences_are_refused(make_model) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, torch.arange(2)), 2)
    report = evaluate(make_model('test_resnet'), loader, ('centre',), ('gap',), metrics=('average_drop',))
    with pytest.raises(ValueError, match='has no curves'):
        draw_curves(report)
    with pytest.raises(ValueError, match='one pooling alone'):
        draw_differences(report)
