"""timm's scripts run in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import timm.task
import timm.utils
import torch
import yaml
from states import make_file
from torch import nn

from train_wrappers import train, validate

pytest_plugins = ('stand_in_scripts',)
pytestmark = pytest.mark.usefixtures('no_script_of_this_machine')


def test_the_downloaded_script_runs_in_this_process_with_every_option_unchanged(
    monkeypatch, releases, server, tmp_path
):
    monkeypatch.setattr(timm, '__version__', '1.0.31')
    monkeypatch.setenv('SEEN', str(tmp_path / 'seen.json'))
    options = ['--dataset', 'digits', '--model-kwargs', 'a=1', 'b=x/y', '--lr', '0.5', '--device', 'cpu']
    assert train.main(options) == 0
    seen = json.loads((tmp_path / 'seen.json').read_text())
    assert seen['argv'][1:] == options
    assert seen['model_kwargs'] == {'a': 1, 'b': 'x/y'}
    assert seen['lr'] == 0.5
    assert seen['dataset_from'] == 'timm_castream.datasets'
    assert seen['task'] == 'CAStreamTask'


@pytest.mark.parametrize('options', [[], ['--crash', 'ZeroDivisionError'], ['--no-such-option']])
def test_timm_and_the_process_are_as_before_afterwards(script, options):
    def state():
        return (
            list(sys.argv),
            timm.data.create_dataset,
            timm.task.ClassificationTask,
            timm.utils.ParseKwargs,
            timm.utils.accuracy,
            nn.CrossEntropyLoss,
        )

    before = state()
    script(*options)
    assert state() == before


@pytest.mark.parametrize(
    ('error', 'code', 'lines'),
    [('ValueError', 2, 1), ('ours', 2, 1), ('ZeroDivisionError', 1, None), ('RuntimeError', 1, None)],
)
def test_an_error_names_the_release_of_the_script_and_that_of_timm(script, capsys, error, code, lines):
    make_file(script.path.parent / 'timm' / 'version.py', "__version__ = '9.8.7'\n")
    assert script('--crash', error)[0] == code
    err = capsys.readouterr().err.splitlines()
    assert 'on purpose' in err[-1] and 'v9.8.7' in err[-1] and f'timm {timm.__version__}' in err[-1]
    assert lines is None or len(err) == lines
    assert ('Traceback' in err[0]) == (lines is None)


def test_debug_shows_the_traceback_of_a_mistake(script, capsys):
    script('--crash', 'ValueError', '--debug')
    assert 'Traceback' in capsys.readouterr().err


def test_a_file_that_is_no_script_of_timm_is_named(script, capsys):
    script.path.write_text('x = 1')
    assert script() == (2, None)
    assert 'it has no parser' in capsys.readouterr().err


def test_help_shows_both_halves(script, capsys):
    assert script('--help')[0] == 0
    out = capsys.readouterr().out
    assert '--timm-script' in out and 'example: castream train' in out
    assert '--cutmix-minmax' in out


def test_help_without_a_script_shows_its_own_half_and_how_to_get_the_other(capsys):
    assert validate.main(['--help']) == 0
    out = capsys.readouterr().out
    assert 'example: castream validate' in out
    assert 'clone of timm' in out


@pytest.mark.parametrize(
    ('recipe', 'sentence'),
    [
        ({'pretrained': True}, '`pretrained: true` of mine.yaml asks for the weights of resnet18.tv_in1k.'),
        (
            {'model_kwargs': {'backbone_pretrained': 'a1_in1k'}},
            '`backbone_pretrained: a1_in1k` of mine.yaml asks for the weights of resnet18.tv_in1k.',
        ),
        ({}, ''),
    ],
)
def test_a_download_that_fails_names_the_option_of_the_recipe(script, tmp_path, capsys, recipe, sentence):
    path = make_file(tmp_path / 'mine.yaml', yaml.safe_dump({'lr': 1.0, **recipe}))
    assert script('-c', str(path), '--model', 'resnet18.tv_in1k', '--crash', 'offline')[0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'on purpose' in line and sentence in line
    assert sentence or 'asks for' not in line


def run_in_a_process(*options: str, **kwargs: Any) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, '-m', 'train_wrappers.train', *options],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        **kwargs,
    )


def test_help_ends_quietly_when_its_reader_stops(script):
    read, write = os.pipe()
    os.close(read)
    process = run_in_a_process('--timm-script', str(script.path), '--help', stdout=write)
    os.close(write)
    assert process.communicate(timeout=500)[1] == ''
    assert process.returncode in (0, 141)  # argparse itself may hide the error


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_script_that_hides_an_interruption_ends_with_130(number, script, tmp_path):
    waiting = """
    open(os.environ['SEEN'], 'w').close()
    try:
        import time
        time.sleep(1000)
    except KeyboardInterrupt:
        pass
"""
    script.path.write_text(script.path.read_text().replace('def main():\n', f'def main():{waiting}    return\n'))
    process = run_in_a_process('--timm-script', str(script.path), '--dataset', 'digits', stdout=subprocess.DEVNULL)
    while not (tmp_path / 'seen.json').exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert 'castream train: interrupted' in process.communicate(timeout=500)[1]
    assert process.returncode == 130


@pytest.mark.parametrize('content', ['', 'not a checkpoint', 'cut off'])
def test_a_damaged_checkpoint_to_resume_is_one_line(content, script, tmp_path, capsys):
    path = tmp_path / 'last.pth.tar'
    torch.save({'state_dict': {'a': torch.ones(1000)}}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:2000] if content == 'cut off' else content.encode())
    assert script('--resume', str(path)) == (2, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert 'last.pth.tar, which --resume names, is damaged' in line
    path.write_bytes(whole)
    assert script('--resume', str(path))[0] == 0
