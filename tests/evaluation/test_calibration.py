"""Temperature scaling against a search over a grid, and in an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from timm_castream import forward_both
from timm_castream.evaluate import evaluate
from timm_castream.evaluation.calibration import fit_temperature


@pytest.mark.parametrize('scale', [0.3, 1.0, 5.0])
def test_the_fitted_temperature_is_the_best_of_a_fine_grid(scale: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 5)) * 2
    labels = np.array([rng.choice(5, p=np.exp(row) / np.exp(row).sum()) for row in logits])
    logits *= scale
    grid = np.exp(np.linspace(-3, 3, 6001))
    losses = []
    for temperature in grid:
        scaled = logits / temperature
        losses.append(np.mean(np.log(np.exp(scaled).sum(1)) - scaled[range(400), labels]))
    fitted = fit_temperature(torch.from_numpy(logits), torch.from_numpy(labels))
    assert fitted == pytest.approx(grid[np.argmin(losses)], rel=2e-3)


def test_multi_label_targets_use_the_binary_cross_entropy_without_ignored_classes() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(300, 4)) * 3
    labels = (rng.uniform(size=(300, 4)) < 1 / (1 + np.exp(-logits / 2))).astype(np.float32)
    labels[rng.uniform(size=labels.shape) < 0.1] = -1
    grid = np.exp(np.linspace(-2, 3, 5001))
    counted = labels >= 0
    losses = [np.mean(np.logaddexp(0, np.where(labels > 0, -1, 1)[counted] * logits[counted] / t)) for t in grid]
    fitted = fit_temperature(torch.from_numpy(logits), torch.from_numpy(labels))
    assert fitted == pytest.approx(grid[np.argmin(losses)], rel=2e-3)


def test_an_evaluation_fits_on_images_outside_its_sample(make_model, tmp_path: Path) -> None:
    model: nn.Module = make_model('test_resnet')
    images = torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 10
    loader = DataLoader(TensorDataset(images, labels), 4)
    arguments = {'methods': ('grad_cam',), 'metrics': ('average_drop',), 'num_samples': 5}
    report = evaluate(model, loader, **arguments, temperature='fit', output_dir=tmp_path)
    inside = report.values.images['image'].tolist()
    outside = [i for i in range(12) if i not in inside]
    with torch.no_grad():
        logits = forward_both(model, images)
    for pooling in ('gap', 'ca'):
        expected = fit_temperature(logits[pooling][outside], labels[outside])
        assert report.settings['temperatures'][pooling] == pytest.approx(expected, rel=1e-2)
        p = (logits[pooling][inside] / expected).softmax(1)[range(5), labels[inside]]
        assert report.confidence[pooling].value == pytest.approx(100 * p.mean().item(), abs=0.1)
    assert f'GAP {report.settings["temperatures"]["gap"]:.3f}' in str(report)
    given = evaluate(model, loader, **arguments, temperature=report.settings['temperatures'])
    assert given['ca', 'grad_cam', 'average_drop'].value == pytest.approx(
        report['ca', 'grad_cam', 'average_drop'].value, abs=1e-3
    )
    assert json.loads((tmp_path / 'temperatures.json').read_text()).keys() == {'gap', 'ca'}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'temperature': 'fit'}, "temperature='fit' needs images outside the sample"),
        ({'temperature': 'best'}, "temperature 'best' is unknown"),
        ({'temperature': {'gap': 1.0}}, "temperature must give pooling 'ca' a positive number"),
        ({'temperature': {'gap': 1.0, 'ca': -2.0}}, "temperature must give pooling 'ca' a positive number"),
        (
            {'temperature': {'gap': float('inf'), 'ca': 1.0}},
            "pooling 'gap' a positive number below infinity, got .*inf",
        ),
        ({'temperature': {'gap': '2', 'ca': 1.0}}, "pooling 'gap' a positive number"),
        ({'temperature': {'gap': 1, 'ca': 1, 'avg': 3}}, "pooling 'avg', which is unknown, valid ones: 'gap', 'ca'"),
        ({'temperature': 1.5}, r"temperature 1\.5 is unknown, valid ones: 'fit', or a number for each pooling, as in"),
        (
            {'temperature': [1.0, 2.0]},
            r"temperature \[1\.0, 2\.0\] is unknown, valid ones: 'fit', or a number for each",
        ),
        ({'num_samples': 2.5}, r'num_samples must be a positive int, got 2\.5'),
        ({'num_samples': '2'}, "num_samples must be a positive int, got '2'"),
        ({'num_samples': 3}, 'num_samples 3 is out of range, the data set has 2 images'),
    ],
)
def test_bad_temperatures_and_samples_are_refused(make_model, arguments, message) -> None:
    loader = DataLoader(TensorDataset(torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.long)), 2)
    with pytest.raises(ValueError, match=message):
        evaluate(make_model('test_resnet'), loader, ('grad_cam',), metrics=('average_drop',), **arguments)
