"""The demo on photographs: what it writes, that its values are those of the functions, and that it leaves nothing half done."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.nn import functional as F

import timm_castream
from timm_castream import cli
from timm_castream.attribution import attribute
from timm_castream.datasets.photographs import photographs
from timm_castream.demo import explain_photographs
from timm_castream.demo import photographs as module


@pytest.fixture
def model(make_model: Callable[..., nn.Module]) -> Any:
    model: Any = make_model('test_resnet')
    names = tuple(f'thing {i}' for i in range(10))
    model.pretrained_cfg = {**model.pretrained_cfg, 'input_size': (3, 64, 64), 'label_names': names}
    return model


def test_the_photographs_are_files_of_the_libraries() -> None:
    paths = photographs()
    assert [path.stem for path in paths] == [
        *('chelsea', 'coffee', 'motorcycle_left', 'rocket', 'camera', 'astronaut'),
        *('flower', 'china'),
    ]
    assert all(np.asarray(Image.open(path)).std() > 10 for path in paths)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('timm_castream.datasets.photographs.find_spec', lambda name: None)
    with pytest.raises(ModuleNotFoundError) as caught:
        photographs()
    assert caught.value.name == 'skimage'


def test_the_report_holds_the_classes_the_pictures_and_the_values(model: Any, tmp_path: Path) -> None:
    paths = photographs()[:3]
    report = explain_photographs(tmp_path / 'out', model, paths)
    files = {str(path.relative_to(tmp_path / 'out')) for path in (tmp_path / 'out').rglob('*') if path.is_file()}
    names = [path.stem for path in paths]
    pictures = {f'pictures/{name}.png' for name in (*names, 'grid')}
    assert files == {'report.md', 'metrics.json', 'images.csv', *pictures}

    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    x = torch.stack([transform(Image.open(path).convert('RGB')) for path in paths])
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ('mean', 'std'))
    text = (tmp_path / 'out' / 'report.md').read_text(encoding='utf-8')
    for pooling in ('gap', 'ca'):
        with timm_castream.pooling(model, pooling), torch.no_grad():
            p, classes = model(x).softmax(1).max(1)
        maps = attribute(model, x, 'grad_cam', classes, pooling)
        mask = F.interpolate(maps[:, None], (64, 64), mode='bilinear')
        with timm_castream.pooling(model, pooling), torch.no_grad():
            o = model(((x * std + mean) * mask - mean) / std).softmax(1).gather(1, classes[:, None])[:, 0]
        expected = 100 * ((p - o).clamp(min=0) / p).mean().item()
        assert report[pooling, 'grad_cam', 'average_drop'].value == pytest.approx(expected, rel=1e-3)
        row = next(line for line in text.splitlines() if line.startswith(f'| Grad-CAM | {pooling.upper()} |'))
        assert row.split(' | ')[2] == f'{expected:.1f}'
        for name, index, value in zip(names, classes.tolist(), p.tolist(), strict=True):
            line = next(line for line in text.splitlines() if line.startswith(f'| [{name}'))
            assert f'thing {index} {100 * value:.0f} %' in line
    for target in re.findall(r'\]\(([^)]+)\)', text):
        assert (tmp_path / 'out' / target).is_file(), target
    facts = json.loads((tmp_path / 'out' / 'metrics.json').read_text(encoding='utf-8'))
    assert list(facts['classes']) == [path.name for path in paths]


def test_an_interrupted_demo_leaves_no_file(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, 'evaluate', interrupted)  # the pictures are written by then
    with pytest.raises(KeyboardInterrupt):
        explain_photographs(tmp_path / 'output', model, photographs()[:1])
    assert list((tmp_path / 'output').iterdir()) == []


def test_the_command_says_first_what_it_does_and_last_where_to_look(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, 'open_model', lambda name: model)
    monkeypatch.setattr(module, 'photographs', lambda: photographs()[:2])
    assert cli.main(['demo', '--output', str(tmp_path / 'out')]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'about a minute' in lines[0]
    assert str(tmp_path / 'out' / 'report.md') in lines[-2] and 'castream explain' in lines[-1]
    assert any(line.startswith('| Grad-CAM | CA - GAP |') for line in lines)


def test_quick_is_for_the_training_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(['demo', '--quick']) == 2
    assert '--train' in capsys.readouterr().err
