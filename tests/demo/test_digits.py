"""The demo: what it writes, that a seed settles it, and that it leaves nothing half done."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import timm_castream
from timm_castream import demo
from timm_castream.attribution import attribute
from timm_castream.datasets import DigitScenes

TINY = demo.DemoSettings(train_images=128, validation_images=24, explained_images=8, gap_epochs=1, stream_epochs=1)


@pytest.fixture(scope='module')
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('demo') / 'output'
    demo.run(folder, seed=3, settings=TINY)
    return folder


def normalised(scenes: DigitScenes, model: nn.Module, number: int) -> torch.Tensor:
    """(number, 3, 64, 64), by hand."""
    cfg = model.pretrained_cfg
    pixels = torch.from_numpy(scenes.images[:number]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    return (pixels - mean) / std


def test_the_output_folder_holds_report_figures_and_weights(output):
    files = {str(path.relative_to(output)) for path in output.rglob('*') if path.is_file()}
    assert files == {
        'report.md',
        'metrics.json',
        'figure.png',
        'images.csv',
        'gap.safetensors',
        'stream.safetensors',
        'model/config.json',
        'model/model.safetensors',
        'model/README.md',
    }
    width, height = Image.open(output / 'figure.png').size
    assert width > 800 and height > 300
    report = (output / 'report.md').read_text()
    assert all(word in report for word in ('Grad-CAM++', 'Score-CAM', 'AD', 'figure.png', '--seed 3'))


def test_the_reported_accuracy_is_that_of_the_saved_model(output):
    model = timm.create_model(f'local-dir:{output / "model"}', pretrained=True).eval()
    scenes = DigitScenes('validation', TINY.validation_images, seed=3)
    x = normalised(scenes, model, len(scenes))
    metrics = json.loads((output / 'metrics.json').read_text())
    for pooling in ('gap', 'ca'):
        with timm_castream.pooling(model, pooling), torch.no_grad():
            predicted = torch.cat([model(image[None]).argmax(1) for image in x]).numpy()
        assert metrics['accuracy'][pooling] == pytest.approx(100 * np.mean(predicted == scenes.labels))


def test_the_saved_gap_network_and_stream_are_those_of_the_saved_model(output):
    whole = load_file(output / 'model' / 'model.safetensors')
    gap, stream = load_file(output / 'gap.safetensors'), load_file(output / 'stream.safetensors')
    assert gap.keys() | stream.keys() == whole.keys() and not gap.keys() & stream.keys()
    # Frozen means that the stream's training changed no backbone weight and no running statistic.
    assert all(torch.equal(value, whole[key]) for key, value in (gap | stream).items())


def test_the_saliency_in_the_box_is_a_sum_over_the_pixels_of_the_boxes(make_model):
    model = make_model(
        'test_resnet',
        backbone={'output_stride': 8, 'pretrained_cfg_overlay': {'input_size': (3, 64, 64), 'crop_pct': 1.0}},
    )
    scenes = DigitScenes('validation', 5, seed=1)
    shares = demo.saliency_in_box(model, scenes, batch_size=3, seed=0)
    target = torch.from_numpy(scenes.labels)
    maps = attribute(model, normalised(scenes, model, 5), 'grad_cam', target, 'gap')
    expected = []
    for saliency, ((x0, y0, x1, y1),) in zip(maps, np.reshape(scenes.boxes, (5, 1, 4)).tolist(), strict=True):
        big = nn.functional.interpolate(saliency[None, None].double(), (64, 64), mode='bilinear')[0, 0].numpy()
        inside = sum(big[row, column] for row in range(int(y0), int(y1)) for column in range(int(x0), int(x1)))
        expected.append(inside / big.sum())
    assert shares['grad_cam/gap'] == pytest.approx(100 * np.mean(expected), rel=1e-4)
    assert shares['attention/gap'] == pytest.approx(shares['attention/ca'])
    assert shares.keys() == {f'{m}/{p}' for m in ('attention', 'grad_cam', 'centre') for p in ('gap', 'ca')}


def test_a_second_run_with_the_seed_gives_the_same_metrics(output, tmp_path):
    demo.run(tmp_path, seed=3, settings=TINY)
    assert (tmp_path / 'metrics.json').read_text() == (output / 'metrics.json').read_text()


def test_an_interrupted_demo_leaves_no_file(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.digits, 'write_repository', interrupted)  # the report and the figure are written by then
    settings = demo.DemoSettings(
        train_images=16, validation_images=4, explained_images=2, batch_size=16, gap_epochs=1, stream_epochs=1
    )
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path / 'output', settings=settings)
    assert list((tmp_path / 'output').iterdir()) == []
