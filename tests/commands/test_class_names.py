"""Names for the classes of weights that name none, in the commands that open a model."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_castream import cli

NO_NAMES = 'The weights name none of their'


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], int]:
    """Runs a command with a plain state dict of a network with so many classes, in a folder with images."""
    rng = np.random.default_rng(0)
    for name in ('images/eel', 'images/cat'):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / name / 'a.png')
    (tmp_path / 'names.txt').write_text('cat\ndog\neel\n')
    (tmp_path / 'short.txt').write_text('cat\ndog\n')
    (tmp_path / 'twice.txt').write_text('cat\ndog\ncat\n')
    monkeypatch.chdir(tmp_path)

    def main(words: str, num_classes: int = 3) -> int:
        torch.manual_seed(0)
        torch.save(timm.create_model('test_resnet_castream', num_classes=num_classes).state_dict(), 'plain.pth')
        network = f'--model test_resnet_castream --checkpoint plain.pth --num-classes {num_classes} --device cpu'
        command, *options = words.split()
        return cli.main([command, *network.split(), *options])

    return main


EXPLAIN = 'explain images/cat/a.png --methods grad_cam --poolings gap'


def test_weights_without_names_are_told_once_and_get_those_of_a_file(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level('INFO'):
        assert run(EXPLAIN) == 0
    without = capsys.readouterr().out
    assert caplog.text.count(NO_NAMES) == 1 and '--class-names imagenet' not in caplog.text
    caplog.clear()
    with caplog.at_level('INFO'):
        assert run(f'{EXPLAIN} --class-names names.txt') == 0
    assert NO_NAMES not in caplog.text
    expected = without
    for index, name in enumerate(('cat', 'dog', 'eel')):
        assert f'class {index} 0.' in without
        expected = expected.replace(f'class {index} ', f'{name} ')
    assert capsys.readouterr().out == expected


def test_plain_weights_of_imagenet_get_its_names_by_a_word(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level('INFO'):
        assert run(EXPLAIN, 1000) == 0
    assert '--class-names imagenet those of ImageNet' in caplog.text
    best = int(capsys.readouterr().out.split('class ')[1].split()[0])
    assert run(f'{EXPLAIN} --class-names ImageNet', 1000) == 0
    assert f'GAP: {timm.data.ImageNetInfo().index_to_description(best)} 0.' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('short.txt', 'short.txt has 2 names, the model has 3 classes.'),
        ('twice.txt', "twice.txt has the name 'cat' twice."),
        ('none.txt', "There is no file none.txt with names of classes; 'imagenet' gives those of ImageNet."),
        ('imagenet', 'There is no ImageNet of 3 classes: name a file with the names.'),
    ],
)
def test_names_that_do_not_fit_are_refused(
    source: str, message: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f'{EXPLAIN} --class-names {source}') == 2
    assert message in capsys.readouterr().err


def test_one_logit_has_the_names_of_its_two_classes(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    Path('names.txt').write_text('cat\neel\n')
    evaluate = 'evaluate --data-dir images -j 0 --methods random --metrics average_drop --class-names'
    assert run(f'{evaluate} names.txt', 1) == 0
    with open('evaluation/images.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert {row['file'].partition('/')[0]: int(row['gap/class']) for row in rows} == {'cat': 0, 'eel': 1}
    capsys.readouterr()
    assert run(f'{EXPLAIN} --class-names names.txt --target eel cat', 1) == 0
    assert 'class ' not in capsys.readouterr().out


def test_one_name_for_one_logit_is_no_name_of_two_folders(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    Path('names.txt').write_text('cat\n')
    evaluate = 'evaluate --data-dir images -j 0 --methods random --metrics average_drop --class-names'
    assert run(f'{evaluate} names.txt', 1) == 2
    assert "the class 'eel' that is not known: the known classes are 'cat'" in capsys.readouterr().err
    assert run(f'{evaluate} names.txt --target predicted', 1) == 0
    assert "The model names 'cat' alone, and its one logit has two classes" in caplog.text
    Path('three.txt').write_text('cat\neel\nowl\n')
    assert run(f'{evaluate} three.txt', 1) == 2
    assert 'three.txt has 3 names, the model has one logit: two classes, 0 (no) and 1 (yes).' in capsys.readouterr().err


def test_folders_are_compared_with_the_names_and_a_repository_has_them(run: Callable[..., int]) -> None:
    evaluate = 'evaluate --data-dir images -j 0 --methods random --metrics average_drop --class-names names.txt'
    assert run(evaluate) == 0
    with open('evaluation/images.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert {row['file'].partition('/')[0]: int(row['gap/class']) for row in rows} == {'cat': 0, 'eel': 2}
    argv = 'push plain.pth --model test_resnet_castream --model-kwargs num_classes=3 --repo a/b --dry-run pushed'
    assert cli.main([*argv.split(), '--class-names', 'names.txt']) == 0
    assert json.loads(Path('pushed/config.json').read_text())['label_names'] == ['cat', 'dog', 'eel']
