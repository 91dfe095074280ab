"""The command line that timm's scripts get."""

from __future__ import annotations

import argparse

import pytest
import torch
import yaml
from states import make_file

from timm_castream._utils.keywords import ParseKwargs
from timm_castream.timm_scripts.arguments import prepare

pytest_plugins = ('stand_in_scripts',)
pytestmark = pytest.mark.usefixtures('no_script_of_this_machine')


def test_model_kwargs_of_recipe_and_command_line_are_merged_and_the_command_line_wins(script, tmp_path):
    kwargs = {'freeze_backbone': True, 'stream_start': 1, 'list': [1, 'a'], 'text': "it's 1e-3"}
    recipe = make_file(tmp_path / 'mine.yaml', yaml.safe_dump({'lr': 0.25, 'model_kwargs': kwargs}))
    code, seen = script('-c', str(recipe), '--model-kwargs', 'stream_start=3', 'backbone_checkpoint=/a/b-1.pth')
    assert code == 0
    assert seen['lr'] == 0.25
    assert seen['model_kwargs'] == {**kwargs, 'stream_start': 3, 'backbone_checkpoint': '/a/b-1.pth'}


@pytest.mark.parametrize('options', [[], ['--dist-bn', 'broadcast']])
def test_the_statistics_of_a_frozen_backbone_are_never_distributed(script, options):
    assert script(*options, '--model-kwargs', 'freeze_backbone=True')[1]['dist_bn'] == ''
    expected = options[-1] if options else 'reduce'
    assert script(*options, '--model-kwargs', 'freeze_backbone=False')[1]['dist_bn'] == expected


@pytest.mark.parametrize(
    ('options', 'amp'),
    [
        (['--device', 'cpu'], False),
        (['--device', 'cpu', '--amp'], True),
        (['--device', 'cuda'], True),
        (['--device', 'cuda', '--no-amp'], False),
    ],
)
def test_mixed_precision_of_a_recipe_is_left_out_on_a_cpu_unless_the_user_asks_for_it(
    script, tmp_path, monkeypatch, caplog, options, amp
):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    recipe = make_file(tmp_path / 'mine.yaml', 'amp: true\n')
    code, seen = script('-c', str(recipe), *options)
    assert (code, seen['amp']) == (0, amp)
    assert ('mine.yaml asks for mixed precision, which is left out' in caplog.text) == (options == ['--device', 'cpu'])


def test_a_recipe_is_found_by_name_among_the_packaged_ones_unless_a_file_has_that_name(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('imagenet_sgd90.yaml', 'imagenet_sgd90'):
        assert script('-c', name)[1]['model_kwargs'] == {'backbone_pretrained': True, 'freeze_backbone': True}
    make_file(tmp_path / 'imagenet_sgd90.yaml', 'lr: 7.0')
    assert script('-c', 'imagenet_sgd90.yaml')[1]['lr'] == 7.0


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('nowhere.yaml', None, 'imagenet_sgd90.yaml'),
        ('list.yaml', '- 1', 'mapping'),
        ('broken.yaml', 'a: [', 'not a YAML file'),
    ],
)
def test_a_recipe_that_cannot_be_read_is_one_line(script, tmp_path, capsys, name, content, message):
    if content is not None:
        make_file(tmp_path / name, content)
    assert script('-c', str(tmp_path / name)) == (2, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--test-pool'], '--test-pool'),
        (['--torchscript'], '--torchscript'),
        (['--clip-grad', '1', '--clip-mode', 'agc'], 'last ones of the stream'),
        (['--mixup', '0.2', '--model-kwargs', 'stream_class_specific=True'], '--mixup'),
        (['--cutmix', '1', '--model-kwargs', 'stream_class_specific=True'], '--cutmix'),
        (['--cutmix-minmax', '0', '1', '--model-kwargs', 'stream_class_specific=True'], '--cutmix'),
        (['--kd-model-name', 'resnet50', '--model-kwargs', 'stream_class_specific=True'], '--kd-model-name'),
    ],
)
def test_options_that_would_skip_the_stream_are_refused_for_a_stream_alone(script, capsys, options, message):
    assert script('--model', 'resnet50_castream', *options) == (2, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert script('--model', 'resnet50', *options)[0] == 0


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--data-dir', 'nowhere'], 'no folder nowhere'),
        (['--dataset', ''], '--data-dir'),
        (['--dataset', 'cub200'], '--data-dir'),
        (['--model', 'resnet50_castrem'], 'no model resnet50_castrem'),
        (['--model', 'vgg16_castream'], 'vgg16 takes no CA-Stream: layers stand between'),
        (['--model-kwargs', 'stream_start'], 'takes KEY=VALUE, not stream_start (see castream train --help)'),
        (['--learning-rat', '1'], 'unrecognized arguments: --learning-rat 1 (see castream train --help)'),
        (['--resume', 'nowhere.pth.tar'], 'nowhere.pth.tar, which --resume names'),
        (['--device', 'cuda'], '--device cpu'),
    ],
)
def test_what_is_not_there_is_one_line(script, capsys, monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert script(*options) == (2, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize('name', ['resnet50.tv_in1k', 'resnet50_castream', 'hf-hub:some/one', 'resnet*', 'all'])
def test_every_name_of_a_model_that_timms_scripts_take_is_handed_on(script, name):
    assert script('--model', name)[1]['model'] == name


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ([], '--checkpoint'),
        (['--pretrained'], None),
        (['--checkpoint', 'last.pth.tar'], None),
        (['--model', 'resnet50'], None),
    ],
)
def test_a_validation_of_a_stream_needs_weights(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    make_file(tmp_path / 'last.pth.tar')
    parser = argparse.ArgumentParser()
    for name, default in (('--model', 'test_resnet_castream'), ('--checkpoint', ''), ('--dataset', 'digits')):
        parser.add_argument(name, default=default)
    parser.add_argument('--pretrained', action='store_true')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
    if message is None:
        assert prepare({'parser': parser}, options).argv == options
    else:
        with pytest.raises(ValueError, match=f'^There are no weights to validate.*{message}'):
            prepare({'parser': parser}, options)


def test_without_a_graphics_card_the_script_runs_on_the_cpu(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    code, seen = script()
    assert code == 0 and seen['device'] == 'cpu'
    code, seen = script('--device', 'cuda')
    assert code == 2 and 'There is no CUDA device here' in capsys.readouterr().err
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert script()[1]['device'] == 'mps'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert script()[1]['device'] == 'cuda'


def test_mixed_precision_on_a_cpu_is_told_and_its_type_implies_it(script, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert not script()[1]['amp'] and 'Mixed precision' not in caplog.text
    code, seen = script('--amp-dtype', 'bfloat16')
    assert code == 0 and seen['amp'] and seen['amp_dtype'] == 'bfloat16'
    assert '--amp-dtype asks for mixed precision' in caplog.text and 'Mixed precision on a CPU' in caplog.text
    caplog.clear()
    assert script('--amp')[1]['amp'] and 'Mixed precision on a CPU' in caplog.text
    caplog.clear()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert script('--amp', '--amp-dtype', 'bfloat16')[1]['amp'] and 'Mixed precision' not in caplog.text
