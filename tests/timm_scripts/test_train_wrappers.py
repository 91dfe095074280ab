"""Trainings of one or two epochs with timm's own scripts."""

from __future__ import annotations

import itertools
import json
import logging
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import timm.task
import timm.utils
import torch
from PIL import Image
from references import VOC_CLASSES, devkit_mean_average_precision
from states import make_file
from torch import nn

from timm_castream.datasets import VOC2012, VOC_IGNORE
from train_wrappers import train, validate

pytest_plugins = ('stand_in_scripts',)

pytestmark = pytest.mark.slow
CLASSES = 3
SMALL = ['--model', 'test_resnet_castream', '--img-size', '64', '--device', 'cpu', '-j', '1', '-b', '6']
COMMON = [*SMALL, '--num-classes', str(CLASSES)]


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """An image folder: 3 classes that differ in colour, 12 images each to train and 4 to validate."""
    root, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for split, number in (('train', 12), ('validation', 4)):
        for label, i in itertools.product(range(CLASSES), range(number)):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            pixels[..., label] = 255
            path = root / split / str(label) / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope='module')
def gap_checkpoint(tmp_path_factory):
    """A GAP network's weights with norm statistics that no other network has."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=CLASSES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    path = tmp_path_factory.mktemp('gap') / 'gap.pth'
    torch.save(model.state_dict(), path)
    return path


@torch.no_grad()
def predictions(model, dataset):
    """Logits and targets of a data set, from a plain loop."""
    dataset.transform = timm.data.create_transform(
        (3, 64, 64), **{key: model.pretrained_cfg[key] for key in ('mean', 'std', 'crop_pct', 'interpolation')}
    )
    output, target = zip(*((model(image[None]), torch.as_tensor(label)) for image, label in dataset), strict=True)
    return torch.cat(output), torch.stack(target)


def assert_only_the_stream_was_trained(checkpoint, gap_checkpoint, keys=('state_dict',)):
    gap = torch.load(gap_checkpoint, weights_only=True)
    for key in keys:
        state = checkpoint[key]
        assert all(torch.equal(state[name], value) for name, value in gap.items())
        stream = state.keys() - gap.keys()
        assert stream and all(name.startswith('castream.') for name in stream)
    trained = [index for group in checkpoint['optimizer']['param_groups'] for index in group['params']]
    assert len(trained) == len(stream)
    return {name: state[name] for name in stream}


def test_two_epochs_with_the_real_script_train_the_stream_alone_and_resume(
    real_scripts, images, gap_checkpoint, tmp_path, capsys
):
    options = [
        '--timm-script',
        real_scripts['train.py'],
        '--data-dir',
        str(images),
        *COMMON,
        '--model-kwargs',
        'freeze_backbone=True',
        f'backbone_checkpoint={gap_checkpoint}',
        '--opt',
        'momentum',
        '--lr',
        '0.1',
        '--weight-decay',
        '0.01',
        '--warmup-epochs',
        '0',
        '--smoothing',
        '0',
        '--output',
        str(tmp_path),
        '--experiment',
        'run',
        '--model-ema',
        '--model-ema-decay',
        '0.5',
        '--amp',
        '--amp-dtype',
        'bfloat16',
        '--channels-last',
        '--grad-accum-steps',
        '2',
    ]
    last = tmp_path / 'run' / 'last.pth.tar'
    streams = []
    for more in (['--epochs', '2'], ['--epochs', '3', '--resume', str(last)]):
        assert train.main([*options, *more]) == 0, capsys.readouterr().err
        # timm's own file, made a moment ago: it holds the namespace of the arguments
        checkpoint = torch.load(last, weights_only=False)
        keys = ('state_dict_ema', 'state_dict')
        streams.append(assert_only_the_stream_was_trained(checkpoint, gap_checkpoint, keys))
    assert checkpoint['epoch'] == 2
    weights = [name for name in streams[0] if name.endswith('weight')]
    assert not any(torch.equal(streams[0][name], streams[1][name]) for name in weights)

    # validate.py loads what train.py wrote, and scores it as a plain loop does
    assert (
        validate.main(
            [
                '--timm-script',
                real_scripts['validate.py'],
                '--checkpoint',
                str(last),
                '--data-dir',
                str(images),
                *COMMON,
                '--results-file',
                str(tmp_path / 'results.json'),
                '--results-format',
                'json',
            ]
        )
        == 0
    )
    model = timm.create_model('test_resnet_castream', num_classes=CLASSES).eval()
    model.load_state_dict(checkpoint['state_dict'])
    output, target = predictions(model, timm.data.create_dataset('', str(images), 'validation'))
    expected = 100 * (output.argmax(1) == target).float().mean().item()
    assert json.loads((tmp_path / 'results.json').read_text())['top1'] == pytest.approx(expected, abs=1e-3)


def test_the_real_script_runs_without_a_wrapper(real_scripts, images, gap_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'train.py',
            '--device-modules',
            'timm_castream',
            '--data-dir',
            str(images),
            *COMMON,
            '--model-kwargs',
            'freeze_backbone=True',
            f'backbone_checkpoint="{gap_checkpoint}"',
            '--epochs',
            '1',
            '--output',
            str(tmp_path),
            '--experiment',
            'run',
        ],
    )
    runpy.run_path(real_scripts['train.py'], run_name='__main__')
    checkpoint = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=False)
    assert_only_the_stream_was_trained(checkpoint, gap_checkpoint)


def test_two_processes_train_a_class_specific_stream_on_cpus(real_scripts, images, gap_checkpoint, tmp_path):
    run = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc-per-node',
            '2',
            '-m',
            'train_wrappers.train',
            '--timm-script',
            real_scripts['train.py'],
            '--data-dir',
            str(images),
            *COMMON,
            '--model-kwargs',
            'freeze_backbone=True',
            'stream_class_specific=True',
            f'backbone_checkpoint={gap_checkpoint}',
            '--epochs',
            '1',
            '--smoothing',
            '0',
            '--torchcompile',
            'eager',
            '--output',
            str(tmp_path),
            '--experiment',
            'run',
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert 'trains without labels' not in run.stderr
    checkpoint = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=False)
    assert_only_the_stream_was_trained(checkpoint, gap_checkpoint)


@pytest.mark.parametrize(
    ('program', 'options', 'message'),
    [
        (train, ['--dataset', 'cub'], "no data set 'cub'; known are cub200"),
        (train, ['--train-split', 'tran'], "no split 'tran', it has train, validation"),
        (train, ['--num-classes', '2'], 'The data set has 3 classes, the model has 2: pass --num-classes 3'),
        (train, ['-b', '37'], 'The 36 training images fill no batch of 37: pass a smaller --batch-size'),
        (validate, ['--dataset', 'cub', '--checkpoint', 'last.pth'], "no data set 'cub'; known are cub200"),
        (validate, ['--split', 'tset', '--checkpoint', 'last.pth'], "no split 'tset', it has train, validation"),
        (validate, ['--pretrained'], 'No pretrained weights exist for test_resnet_castream'),
        (validate, [], 'There are no weights to validate'),
    ],
    ids=str,
)
def test_a_mistake_that_the_script_finds_late_is_one_line(
    real_scripts, images, tmp_path, monkeypatch, capsys, program, options, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, 'raiseExceptions', False)  # timm's handlers keep the stderr of an earlier test
    torch.save(timm.create_model('test_resnet_castream', num_classes=CLASSES).state_dict(), 'last.pth')
    script = real_scripts['train.py' if program is train else 'validate.py']
    assert program.main(['--timm-script', script, '--data-dir', str(images), *COMMON, *options]) == 2
    error = capsys.readouterr().err
    assert 'Traceback' not in error and message in error.splitlines()[-1]


def write_voc(root: Path, split: str, labels: np.ndarray) -> None:
    """A split in the devkit's layout, with noise for images; labels are 1, -1 or 0 for difficult, (N, 20)."""
    rng = np.random.default_rng(0)
    names = [f'{split}_{i:06d}' for i in range(len(labels))]
    make_file(root / 'ImageSets' / 'Main' / f'{split}.txt', '\n'.join(names))
    for column, category in zip(labels.T, VOC_CLASSES, strict=True):
        lines = [f'{name} {label:2d}' for name, label in zip(names, column, strict=True)]
        make_file(root / 'ImageSets' / 'Main' / f'{category}_{split}.txt', '\n'.join(lines))
    (root / 'JPEGImages').mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (60, 70, 3), dtype=np.uint8)).save(root / 'JPEGImages' / f'{name}.jpg')


def test_voc_is_trained_and_scored_by_the_real_scripts(real_scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root, rng = tmp_path / 'VOC2012', np.random.default_rng(0)
    labels = {split: rng.choice([-1, 0, 1], p=[0.5, 0.1, 0.4], size=(12, 20)) for split in ('train', 'val')}
    for split in labels:
        write_voc(root, split, labels[split])
    gap = timm.create_model('test_resnet', num_classes=20)
    torch.save(gap.state_dict(), tmp_path / 'gap.pth')

    # The recipe as it is, but for the size
    options = [*SMALL, '--data-dir', str(root)]
    assert (
        train.main(
            [
                '--timm-script',
                real_scripts['train.py'],
                '-c',
                'voc2012.yaml',
                *options,
                '--epochs',
                '1',
                '--model-kwargs',
                f'backbone_checkpoint={tmp_path / "gap.pth"}',
            ]
        )
        == 0
    ), capsys.readouterr().err
    last = tmp_path / 'output' / 'train' / 'voc2012_castream' / 'last.pth.tar'
    checkpoint = torch.load(last, weights_only=False)
    assert_only_the_stream_was_trained(checkpoint, tmp_path / 'gap.pth')
    assert 'eval_map' in (last.parent / 'summary.csv').read_text().splitlines()[0]

    assert (
        validate.main(
            [
                '--timm-script',
                real_scripts['validate.py'],
                *options,
                '--dataset',
                'voc2012',
                '--num-classes',
                '20',
                '--checkpoint',
                str(last),
                '--results-file',
                'results.json',
                '--results-format',
                'json',
            ]
        )
        == 0
    )
    model = timm.create_model('test_resnet_castream', num_classes=20).eval()
    model.load_state_dict(checkpoint['state_dict'])
    output = predictions(model, VOC2012(root, 'val'))[0].double().numpy()
    target = np.where(labels['val'] == 0, VOC_IGNORE, labels['val'] == 1)
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['map'] == pytest.approx(devkit_mean_average_precision(target, output), abs=1e-3)
