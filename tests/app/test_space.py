"""The folder of a Space: complete, pinned, and enough to start the page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from timm_castream.app import space
from timm_castream.app.page_model import PageModel
from timm_castream.app.space import pinned_requirements, write_examples, write_space
from timm_castream.datasets.photographs import photographs
from timm_castream.inference.predictor import Predictor

pytest.importorskip('gradio', reason='a Space pins the gradio that is installed')


@pytest.fixture
def opened() -> PageModel:
    torch.manual_seed(0)
    model = timm.create_model('test_resnet_castream', num_classes=3, stream_start=2).eval()
    return PageModel(Predictor(model, activation='sigmoid'), 'test_resnet_castream', "It's {random}.")


def test_a_space_has_the_files_that_the_hub_expects(opened: PageModel, tmp_path: Path) -> None:
    folder = write_space(opened, tmp_path / 'page')
    _, front, text = (folder / 'README.md').read_text(encoding='utf-8').split('---\n', 2)
    fields = yaml.safe_load(front)
    assert {'title', 'emoji', 'colorFrom', 'colorTo', 'sdk', 'sdk_version', 'app_file', 'license'} <= set(fields)
    assert fields['sdk'] == 'gradio' and fields['sdk_version'] == metadata.version('gradio')
    assert fields['app_file'] == 'app.py' and (folder / 'app.py').is_file()
    assert "It's {random}." in text
    assert (folder / 'examples' / '0_chelsea.jpg').is_file()
    assert list((folder / 'hf_configs').glob('*.json')) and list((folder / 'train_wrappers').rglob('*.yaml'))
    assert not list(folder.rglob('__pycache__')) and [path.name for path in tmp_path.iterdir()] == ['page']


def test_every_requirement_is_pinned_to_the_installed_version(opened: PageModel, tmp_path: Path) -> None:
    lines = (write_space(opened, tmp_path / 'page') / 'requirements.txt').read_text(encoding='utf-8').splitlines()
    pins = dict(line.split('==') for line in lines)
    assert {'torch', 'timm', 'gradio', 'matplotlib', 'scikit-learn', 'torchmetrics', 'safetensors'} <= set(pins)
    assert not {'timm_castream', 'pytest', 'mkdocs', 'timm-castream'} & set(pins)
    for name, version in pins.items():
        assert version == metadata.version(name).partition('+')[0]
        assert re.fullmatch(r'[\w.]+', version)
    assert pins == pinned_requirements()


def start(folder: Path, cwd: Path) -> dict[str, Any]:
    """Imports the app of a Space in a process of its own, from another directory, and returns facts on it.

    An editable install of this package is hidden from the process.
    """
    code = (
        'import json, runpy, sys, torch\n'
        f'sys.path.insert(0, {str(folder)!r})\n'
        'sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]\n'
        f'page = runpy.run_path({str(folder / "app.py")!r})\n'
        'import hf_configs, timm_castream, train_wrappers\n'
        'opened = page["opened"]\n'
        'print(json.dumps({"packages": [m.__file__ for m in (timm_castream, hf_configs, train_wrappers)],'
        ' "name": opened.name, "weights": opened.weights,'
        ' "activation": opened.predictor.activation, "training": opened.model.training,'
        ' "logits": opened.model(torch.ones(1, 3, 64, 64))[0].tolist(),'
        ' "functions": [f.api_name for f in page["app"].fns.values()]}))\n'
    )
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'} | {'HF_HUB_OFFLINE': '1'}
    result = subprocess.run(
        [sys.executable, '-c', code], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_space_starts_from_its_folder_alone_with_the_same_network(opened: PageModel, tmp_path: Path) -> None:
    facts = start(write_space(opened, tmp_path / 'page'), tmp_path)
    with torch.no_grad():
        expected = opened.model(torch.ones(1, 3, 64, 64))[0].tolist()
    packages = ('timm_castream', 'hf_configs', 'train_wrappers')
    assert facts['packages'] == [str(tmp_path / 'page' / name / '__init__.py') for name in packages]
    assert facts['name'] == opened.name and facts['weights'] == opened.weights
    assert facts['activation'] == 'sigmoid' and facts['training'] is False
    assert facts['logits'] == pytest.approx(expected, rel=1e-5)
    assert 'explain' in facts['functions'] and 'open' not in facts['functions']


@pytest.mark.slow
def test_a_space_holds_a_plain_network_of_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    opened = PageModel(Predictor(timm.create_model('test_resnet', num_classes=3).eval()), 'test_resnet', 'Random.')
    facts = start(write_space(opened, tmp_path / 'page'), tmp_path)
    with torch.no_grad():
        expected = opened.model(torch.ones(1, 3, 64, 64))[0].tolist()
    assert facts['logits'] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_folder_that_exists_is_left_alone(opened: PageModel, tmp_path: Path) -> None:
    (tmp_path / 'page').mkdir()
    (tmp_path / 'page' / 'mine').touch()
    with pytest.raises(FileExistsError, match='exists already'):
        write_space(opened, tmp_path / 'page')
    assert [path.name for path in (tmp_path / 'page').iterdir()] == ['mine']


def test_a_space_is_written_whole_or_not_at_all(
    opened: PageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError('disk full')

    monkeypatch.setattr(space, 'write_examples', fail)
    with pytest.raises(OSError, match='disk full'):
        write_space(opened, tmp_path / 'page')
    assert list(tmp_path.iterdir()) == []


def test_the_examples_are_the_photographs_that_libraries_ship(tmp_path: Path) -> None:
    paths = write_examples(tmp_path / 'examples')
    assert [path.name for path in paths[:2]] == ['0_chelsea.jpg', '1_coffee.jpg'] and paths == sorted(paths)
    cat, original = (np.asarray(Image.open(path).convert('RGB'), dtype=float) for path in (paths[0], photographs()[0]))
    assert len(paths) == len(photographs()) and np.abs(cat - original).mean() < 4
