"""The wrappers of timm's train.py and validate.py: where the script comes from, what is done to its arguments and its
task, and a training of two epochs with the real one."""
from __future__ import annotations

import hashlib
import itertools
import json
import runpy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import timm.task
import timm.utils
import torch
import yaml
from PIL import Image
from timm.loss import BinaryCrossEntropy
from torch import nn

from timm_castream.datasets import VOC2012, VOC_IGNORE
from train_wrappers import finder, multilabel, train, validate
from train_wrappers.task import CAStreamTask

# A script with the outline of timm's: it writes down what it was given.
SCRIPT = """
import argparse, json, os, sys
import yaml
from timm import utils
from timm.data import create_dataset
from timm.task import ClassificationTask
config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument('-c', '--config', default='')
parser = argparse.ArgumentParser()
parser.add_argument('--data-dir')
parser.add_argument('--dataset', default='')
parser.add_argument('--model', default='resnet50')
parser.add_argument('--model-kwargs', nargs='*', default={}, action=utils.ParseKwargs)
parser.add_argument('--lr', type=float)
parser.add_argument('--mixup', type=float, default=0.)
parser.add_argument('--cutmix', type=float, default=0.)
parser.add_argument('--cutmix-minmax', nargs='+', default=None)
parser.add_argument('--clip-grad', type=float)
parser.add_argument('--clip-mode', default='norm')
parser.add_argument('--kd-model-name')
parser.add_argument('--torchscript', action='store_true')
parser.add_argument('--test-pool', action='store_true')
parser.add_argument('--dist-bn', default='reduce')
parser.add_argument('--resume', default='')
parser.add_argument('--device', default='cpu')
parser.add_argument('--crash')

def validate():
    pass

def main():
    found, rest = config_parser.parse_known_args()
    if found.config:
        with open(found.config) as file:
            parser.set_defaults(**yaml.safe_load(file))
    args = parser.parse_args(rest)
    if args.crash:
        raise {'ValueError': ValueError, 'ZeroDivisionError': ZeroDivisionError}[args.crash]('on purpose')
    with open(os.environ['SEEN'], 'w') as file:
        json.dump(dict(vars(args), argv=sys.argv, dataset_from=create_dataset.__module__,
                       task=ClassificationTask.__name__), file)

if __name__ == '__main__':
    raise SystemExit('run as a program')
"""


@pytest.fixture(autouse=True)
def _no_script_of_this_machine(monkeypatch, tmp_path):
    for variable in ('TIMM_TRAIN_SCRIPT', 'TIMM_VALIDATE_SCRIPT'):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv(finder.URL_VARIABLE, 'http://127.0.0.1:9')
    monkeypatch.setattr(timm, '__file__', str(tmp_path / 'site-packages' / 'timm' / '__init__.py'))


@pytest.fixture(scope='session')
def real_scripts():
    """timm's own scripts, from wherever the wrapper finds them on this machine."""
    try:
        return {name: str(finder.find_script(name)) for name in finder.SCRIPTS}
    except finder.ScriptNotFoundError as error:
        pytest.skip(f"timm's scripts are not to be had here: {error}")


@pytest.fixture
def server(monkeypatch):
    """A stand-in for GitHub on the loopback address: `answers` maps paths to bodies, `requests` lists what came."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            body = self.server.answers.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header('Content-Length', str(len(body or b'') + self.server.missing_bytes))
            self.end_headers()
            self.wfile.write(body or b'')

        def log_message(self, *args):
            pass

    stand_in = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    stand_in.answers, stand_in.requests, stand_in.missing_bytes = {}, [], 0
    threading.Thread(target=stand_in.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv(finder.URL_VARIABLE, f'http://127.0.0.1:{stand_in.server_port}')
    yield stand_in
    stand_in.shutdown()
    stand_in.server_close()


@pytest.fixture
def releases(monkeypatch, server):
    """Three known releases, with the server's file of each."""
    contents = {release: SCRIPT.encode() + b'# ' + release.encode() for release in ('1.0.27', '1.0.28', '1.0.40')}
    monkeypatch.setattr(finder, 'KNOWN_SHA256', {
        release: {'train.py': hashlib.sha256(content).hexdigest()} for release, content in contents.items()})
    server.answers.update({f'/v{release}/train.py': content for release, content in contents.items()})
    return contents


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The path of `SCRIPT`, and a function that runs the wrapper with it and gives what the script saw."""
    path = tmp_path / 'some_train.py'
    path.write_text(SCRIPT)
    monkeypatch.setenv('SEEN', str(tmp_path / 'seen.json'))

    def run(*options):
        seen = tmp_path / 'seen.json'
        seen.unlink(missing_ok=True)
        images = [] if '--data-dir' in options else ['--dataset', 'digits']
        code = train.main(['--timm-script', str(path), *images, *options])
        return code, json.loads(seen.read_text()) if seen.exists() else None

    run.path = path
    return run


def make_file(path: Path, content: str = SCRIPT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


# Finding the script

def test_a_path_given_comes_before_the_environment_which_comes_before_an_editable_timm(tmp_path, monkeypatch):
    beside = make_file(tmp_path / 'site-packages' / 'train.py')
    make_file(tmp_path / 'site-packages' / 'pyproject.toml', '')
    assert finder.find_script('train.py') == beside
    environment = make_file(tmp_path / 'environment.py')
    monkeypatch.setenv('TIMM_TRAIN_SCRIPT', str(environment))
    assert finder.find_script('train.py') == environment
    given = make_file(tmp_path / 'given.py')
    assert finder.find_script('train.py', given) == given
    monkeypatch.setenv('TIMM_VALIDATE_SCRIPT', str(given))
    assert finder.find_script('validate.py') == given


def test_an_editable_timm_comes_before_the_cache_which_comes_before_a_download(tmp_path, monkeypatch, releases, server):
    monkeypatch.setattr(timm, '__version__', '1.0.31')
    cached = make_file(finder.cache_dir() / '1.0.27' / 'train.py', releases['1.0.27'].decode())
    assert finder.find_script('train.py') == cached
    beside = make_file(tmp_path / 'site-packages' / 'train.py')
    make_file(tmp_path / 'site-packages' / 'pyproject.toml', '')
    assert finder.find_script('train.py') == beside
    assert server.requests == []


def test_a_train_py_in_site_packages_is_somebody_elses(tmp_path):
    make_file(tmp_path / 'site-packages' / 'train.py')
    with pytest.raises(finder.ScriptNotFoundError):
        finder.find_script('train.py')


@pytest.mark.parametrize('source', ['--timm-script', 'TIMM_TRAIN_SCRIPT'])
def test_a_named_file_that_is_not_there_is_an_error_that_says_who_named_it(source, monkeypatch, tmp_path, capsys):
    missing = str(tmp_path / 'missing.py')
    if source == 'TIMM_TRAIN_SCRIPT':
        monkeypatch.setenv(source, missing)
    assert train.main([source, missing] if source.startswith('--') else []) == 2
    line, = capsys.readouterr().err.splitlines()
    assert source in line and missing in line


@pytest.mark.parametrize(('installed', 'expected'), [
    ('1.0.27', '1.0.27'), ('1.0.28', '1.0.28'), ('1.0.29.dev0', '1.0.28'), ('1.0.31', '1.0.28'), ('1.1.0', '1.0.40')])
def test_the_newest_release_that_the_installed_timm_can_run_is_downloaded_once(
        installed, expected, monkeypatch, releases, server):
    monkeypatch.setattr(timm, '__version__', installed)
    path = finder.find_script('train.py')
    assert path.read_bytes() == releases[expected]
    assert finder.find_script('train.py') == path
    assert server.requests == [f'/v{expected}/train.py']


def test_a_timm_older_than_every_known_script_is_told_to_upgrade(monkeypatch, releases, server):
    monkeypatch.setattr(timm, '__version__', '1.0.20')
    with pytest.raises(finder.ScriptNotFoundError, match=r'timm 1\.0\.20.*timm>=1\.0\.27'):
        finder.find_script('train.py')
    assert server.requests == []


def test_a_file_with_another_checksum_is_neither_run_nor_kept(monkeypatch, releases, server, tmp_path, capsys):
    monkeypatch.setattr(timm, '__version__', '1.0.31')
    evil = tmp_path / 'evil'
    server.answers['/v1.0.28/train.py'] = f'open({str(evil)!r}, "w")'.encode()
    assert train.main(['--dataset', 'digits']) == 2
    line, = capsys.readouterr().err.splitlines()
    assert 'SHA-256' in line and '--timm-script' in line
    assert not evil.exists()
    assert not list(tmp_path.glob('cache/**/*.py'))


def test_a_cached_file_that_was_changed_is_fetched_again(monkeypatch, releases):
    monkeypatch.setattr(timm, '__version__', '1.0.28')
    path = finder.find_script('train.py')
    path.write_bytes(path.read_bytes() + b'\nraise SystemExit(3)')
    assert finder.find_script('train.py').read_bytes() == releases['1.0.28']


@pytest.mark.parametrize('failure', ['missing', 'cut', 'down', 'unwritable'])
def test_a_download_that_fails_is_one_line_and_exit_code_2(
        failure, monkeypatch, releases, server, tmp_path, capsys):
    monkeypatch.setattr(timm, '__version__', '1.0.31')
    if failure == 'missing':
        server.answers.clear()
    elif failure == 'cut':
        server.missing_bytes = 100
        server.answers['/v1.0.28/train.py'] = releases['1.0.28'][:100]
    elif failure == 'down':
        monkeypatch.setenv(finder.URL_VARIABLE, 'http://127.0.0.1:9')
    else:
        (tmp_path / 'cache').write_text('a file where the folder should be')
    assert train.main(['--dataset', 'digits']) == 2
    line, = capsys.readouterr().err.splitlines()
    assert ('XDG_CACHE_HOME' if failure == 'unwritable' else 'clone of timm at tag v1.0.28') in line
    assert not list(tmp_path.glob('cache/**/*.*'))


def test_processes_that_download_at_once_leave_one_whole_file(monkeypatch, releases):
    monkeypatch.setattr(timm, '__version__', '1.0.31')
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: finder.find_script('train.py'), range(16)))
    path, = paths
    assert path.read_bytes() == releases['1.0.28']
    assert list(path.parent.iterdir()) == [path]


def test_the_real_scripts_that_were_downloaded_or_cloned_have_the_checksums_listed(real_scripts):
    for name, path in real_scripts.items():
        known = {scripts[name] for scripts in finder.KNOWN_SHA256.values()}
        if finder.script_release(Path(path)).removeprefix('v') not in finder.KNOWN_SHA256:
            pytest.skip(f'{path} is not of a known release')
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() in known


# What the script is given

def test_the_downloaded_script_runs_in_this_process_with_every_option_unchanged(
        monkeypatch, releases, server, tmp_path):
    monkeypatch.setattr(timm, '__version__', '1.0.31')
    monkeypatch.setenv('SEEN', str(tmp_path / 'seen.json'))
    options = ['--dataset', 'digits', '--model-kwargs', 'a=1', 'b=x/y', '--lr', '0.5']
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
        return (list(sys.argv), timm.data.create_dataset, timm.data.loader.fast_collate, timm.task.ClassificationTask,
                timm.utils.ParseKwargs, timm.utils.accuracy, nn.CrossEntropyLoss)
    before = state()
    script(*options)
    assert state() == before


@pytest.mark.parametrize(('error', 'code', 'lines'), [('ValueError', 2, 1), ('ZeroDivisionError', 1, None)])
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


def test_a_recipe_is_found_by_name_among_the_packaged_ones_unless_a_file_has_that_name(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('imagenet_sgd90.yaml', 'imagenet_sgd90'):
        assert script('-c', name)[1]['model_kwargs'] == {'backbone_pretrained': True, 'freeze_backbone': True}
    make_file(tmp_path / 'imagenet_sgd90.yaml', 'lr: 7.0')
    assert script('-c', 'imagenet_sgd90.yaml')[1]['lr'] == 7.0


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('nowhere.yaml', None, 'imagenet_sgd90.yaml'),
    ('list.yaml', '- 1', 'mapping'),
    ('broken.yaml', 'a: [', 'not a YAML file'),
])
def test_a_recipe_that_cannot_be_read_is_one_line(script, tmp_path, capsys, name, content, message):
    if content is not None:
        make_file(tmp_path / name, content)
    assert script('-c', str(tmp_path / name)) == (2, None)
    line, = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(('options', 'message'), [
    (['--test-pool'], '--test-pool'),
    (['--torchscript'], '--torchscript'),
    (['--clip-grad', '1', '--clip-mode', 'agc'], 'last ones of the stream'),
    (['--mixup', '0.2', '--model-kwargs', 'stream_class_specific=True'], '--mixup'),
    (['--cutmix', '1', '--model-kwargs', 'stream_class_specific=True'], '--cutmix'),
    (['--cutmix-minmax', '0', '1', '--model-kwargs', 'stream_class_specific=True'], '--cutmix'),
    (['--kd-model-name', 'resnet50', '--model-kwargs', 'stream_class_specific=True'], '--kd-model-name'),
])
def test_options_that_would_skip_the_stream_are_refused_for_a_stream_alone(script, capsys, options, message):
    assert script('--model', 'resnet50_castream', *options) == (2, None)
    line, = capsys.readouterr().err.splitlines()
    assert message in line
    assert script('--model', 'resnet50', *options)[0] == 0


@pytest.mark.parametrize(('options', 'message'), [
    (['--data-dir', 'nowhere'], 'no folder nowhere'),
    (['--dataset', ''], '--data-dir'),
    (['--dataset', 'cub200'], '--data-dir'),
    (['--model', 'resnet50_castrem'], 'no model resnet50_castrem'),
    (['--resume', 'nowhere.pth.tar'], 'nowhere.pth.tar, which --resume names'),
    (['--device', 'cuda'], '--device cpu'),
])
def test_what_is_not_there_is_one_line(script, capsys, monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert script(*options) == (2, None)
    line, = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize('name', ['resnet50.tv_in1k', 'resnet50_castream', 'hf-hub:some/one', 'resnet*', 'all'])
def test_every_name_of_a_model_that_timms_scripts_take_is_handed_on(script, name):
    assert script('--model', name)[1]['model'] == name


# The task

@pytest.fixture
def class_specific():
    torch.manual_seed(0)
    return timm.create_model('test_resnet_castream', num_classes=5, stream_class_specific=True)


@pytest.mark.parametrize('compiled', [False, True])
def test_the_task_hands_a_class_specific_stream_its_labels(class_specific, compiled):
    task = CAStreamTask(class_specific, nn.CrossEntropyLoss())
    if compiled:
        task.compile(backend='eager')
    target = torch.tensor([3, 1, 3, 4])
    task(torch.randn(4, 3, 64, 64), target)['loss'].backward()  # at 32 the last map is one location
    touched = class_specific.castream.cls_token.grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == [1, 3, 4]


def test_soft_targets_for_a_class_specific_stream_are_refused(class_specific):
    task = CAStreamTask(class_specific, BinaryCrossEntropy())
    with pytest.raises(ValueError, match='class indices'):
        task(torch.randn(2, 3, 32, 32), torch.rand(2, 5))


def test_the_task_trains_a_network_without_a_stream_as_timms_does():
    model = timm.create_model('test_resnet', num_classes=5)
    images, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    ours = CAStreamTask(model, nn.CrossEntropyLoss())(images, target)
    timms = timm.task.ClassificationTask(model, nn.CrossEntropyLoss())(images, target)
    assert torch.equal(ours['loss'], timms['loss'])
    assert torch.equal(ours['output'], timms['output'])


def test_multi_label_targets_with_a_loss_for_one_label_are_refused():
    task = CAStreamTask(timm.create_model('test_resnet', num_classes=5), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match='--bce-loss'):
        task(torch.randn(2, 3, 32, 32), torch.ones(2, 5))


def test_ignored_labels_leave_no_trace_in_loss_and_gradient():
    torch.manual_seed(0)
    output = torch.randn(3, 4, requires_grad=True)
    target = torch.tensor([[1., 0., VOC_IGNORE, 1.], [VOC_IGNORE, 1., 0., 0.], [0., 0., 0., VOC_IGNORE]])
    loss = BinaryCrossEntropy(smoothing=0.1, sum_classes=True)(*multilabel.leave_out_ignored(output, target))
    loss.backward()

    probability = output.detach().double().sigmoid()
    expected = -sum(
        (p if t == 1 else 1 - p).log() for p, t in zip(probability.flatten(), target.flatten(), strict=True)
        if t != VOC_IGNORE) / 3
    torch.testing.assert_close(loss.double(), expected)
    assert not output.grad[target == VOC_IGNORE].any()
    torch.testing.assert_close(
        output.grad[target != VOC_IGNORE].double(), ((probability - target) / 3)[target != VOC_IGNORE])


def test_the_loss_of_a_validation_is_binary_cross_entropy_for_dense_targets_and_torchs_for_indices():
    torch.manual_seed(0)
    output, target = torch.randn(3, 4), torch.tensor([[1., 0., 0., 1.], [0., 1., 0., 0.], [0., 0., 0., 1.]])
    loss = multilabel.CrossEntropyLoss()
    probability = output.double().sigmoid()
    expected = -torch.where(target > 0, probability, 1 - probability).log().mean()
    torch.testing.assert_close(loss(output, target).double(), expected)
    indices = torch.tensor([3, 1, 3])
    assert torch.equal(loss(output, indices), nn.CrossEntropyLoss()(output, indices))


# Multi-label scores

def devkit_average_precision(score, target):
    """The devkit's definition, one threshold after the other. Needs scores without ties."""
    kept = target != VOC_IGNORE
    score, target = score[kept], target[kept] == 1
    if not target.any():
        return None
    order = np.argsort(-score)
    hits = np.cumsum(target[order])
    precision, recall = hits / np.arange(1, len(order) + 1), hits / target.sum()
    area, reached = 0., 0.
    for i in range(len(order)):
        area += (recall[i] - reached) * precision[i:].max()
        reached = recall[i]
    return area


@pytest.mark.parametrize('scale', [0.1, 1., 100.])
def test_map_is_the_devkits_whatever_the_batches_and_the_scale_of_the_logits(scale):
    rng = np.random.default_rng(0)
    output = rng.normal(size=(61, 4)).astype(np.float32) * np.float32(scale)
    if scale == 0.1:
        output += np.float32(0.5)  # a batch that looks like probabilities
    target = rng.choice([0., 1., VOC_IGNORE], p=[0.6, 0.3, 0.1], size=output.shape).astype(np.float32)
    target[:, 3] = 0.  # a class that never occurs is left out
    expected = [devkit_average_precision(output[:, c].astype(np.float64), target[:, c]) for c in range(4)]

    score = multilabel.MultiLabelScore()

    def validate(size):
        for batch in zip(torch.from_numpy(output).split(size), torch.from_numpy(target).split(size), strict=True):
            score.accuracy(*batch, topk=(1, 5))
        return {'top1': 0.}

    for size in (1, 7, 61):  # the second validation starts from nothing
        results = score.scored(validate)(size)
        assert results['map'] == pytest.approx(100 * np.mean([ap for ap in expected if ap is not None]), abs=1e-4)


def test_the_share_of_hits_among_the_best_is_counted_for_dense_targets_and_is_timms_accuracy_for_indices():
    torch.manual_seed(0)
    output, target = torch.randn(50, 7), torch.randint(7, (50,))
    score = multilabel.MultiLabelScore()
    assert score.accuracy(output, target, (1, 5)) == timm.utils.accuracy(output, target, (1, 5))
    dense = torch.rand(50, 7) < 0.3
    for k, hits in zip((1, 5), score.accuracy(output, dense.float(), (1, 5)), strict=True):
        expected = sum(any(labels[c] for c in logits.argsort(descending=True)[:k]) for logits, labels in
                       zip(output, dense, strict=True))
        assert hits.item() == pytest.approx(100 * expected / 50)


def test_a_validation_of_class_indices_keeps_its_results():
    score = multilabel.MultiLabelScore()
    assert score.scored(lambda: {'top1': 3.})() == {'top1': 3.}


@pytest.mark.parametrize('kind', [np.asarray, torch.tensor, list])
def test_dense_targets_are_collated_as_floats_and_indices_as_timm_does(kind):
    images = [np.full((3, 2, 2), i, dtype=np.uint8) for i in range(3)]
    rows = [[1., 0.], [0., VOC_IGNORE], [1., 1.]]
    batch, target = multilabel.collate([(image, kind(row)) for image, row in zip(images, rows, strict=True)])
    assert target.dtype == torch.float32 and target.tolist() == rows
    assert batch.dtype == torch.uint8 and batch[:, 0, 0, 0].tolist() == [0, 1, 2]
    _, target = multilabel.collate(list(zip(images, [2, 0, 1], strict=True)))
    assert target.dtype == torch.int64 and target.tolist() == [2, 0, 1]


# The real scripts

CLASSES = 3
VOC_CLASSES = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
    'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor')
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
        (3, 64, 64), **{key: model.pretrained_cfg[key] for key in ('mean', 'std', 'crop_pct', 'interpolation')})
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
        real_scripts, images, gap_checkpoint, tmp_path, capsys):
    options = [
        '--timm-script', real_scripts['train.py'], '--data-dir', str(images), *COMMON,
        '--model-kwargs', 'freeze_backbone=True', f'backbone_checkpoint={gap_checkpoint}', '--opt', 'momentum',
        '--lr', '0.1', '--weight-decay', '0.01', '--warmup-epochs', '0', '--smoothing', '0', '--output', str(tmp_path),
        '--experiment', 'run', '--model-ema', '--model-ema-decay', '0.5', '--amp', '--amp-dtype', 'bfloat16',
        '--channels-last', '--grad-accum-steps', '2']
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
    assert validate.main([
        '--timm-script', real_scripts['validate.py'], '--checkpoint', str(last), '--data-dir', str(images), *COMMON,
        '--results-file', str(tmp_path / 'results.json'), '--results-format', 'json']) == 0
    model = timm.create_model('test_resnet_castream', num_classes=CLASSES).eval()
    model.load_state_dict(checkpoint['state_dict'])
    output, target = predictions(model, timm.data.create_dataset('', str(images), 'validation'))
    expected = 100 * (output.argmax(1) == target).float().mean().item()
    assert json.loads((tmp_path / 'results.json').read_text())['top1'] == pytest.approx(expected, abs=1e-3)


def test_the_real_script_runs_without_a_wrapper(real_scripts, images, gap_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [
        'train.py', '--device-modules', 'timm_castream', '--data-dir', str(images), *COMMON,
        '--model-kwargs', 'freeze_backbone=True', f'backbone_checkpoint="{gap_checkpoint}"',
        '--epochs', '1', '--output', str(tmp_path), '--experiment', 'run'])
    runpy.run_path(real_scripts['train.py'], run_name='__main__')
    checkpoint = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=False)
    assert_only_the_stream_was_trained(checkpoint, gap_checkpoint)


def test_two_processes_train_a_class_specific_stream_on_cpus(real_scripts, images, gap_checkpoint, tmp_path):
    run = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
         '-m', 'train_wrappers.train', '--timm-script', real_scripts['train.py'], '--data-dir', str(images), *COMMON,
         '--model-kwargs', 'freeze_backbone=True', 'stream_class_specific=True',
         f'backbone_checkpoint={gap_checkpoint}',
         '--epochs', '1', '--smoothing', '0', '--torchcompile', 'eager', '--output', str(tmp_path),
         '--experiment', 'run'],
        capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert 'trains without labels' not in run.stderr
    checkpoint = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=False)
    assert_only_the_stream_was_trained(checkpoint, gap_checkpoint)


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
    assert train.main(['--timm-script', real_scripts['train.py'], '-c', 'voc2012.yaml', *options, '--epochs', '1',
                       '--model-kwargs', f'backbone_checkpoint={tmp_path / "gap.pth"}']) == 0, capsys.readouterr().err
    last = tmp_path / 'output' / 'train' / 'voc2012_castream' / 'last.pth.tar'
    checkpoint = torch.load(last, weights_only=False)
    assert_only_the_stream_was_trained(checkpoint, tmp_path / 'gap.pth')
    assert 'eval_map' in (last.parent / 'summary.csv').read_text().splitlines()[0]

    assert validate.main([
        '--timm-script', real_scripts['validate.py'], *options, '--dataset', 'voc2012', '--num-classes', '20',
        '--checkpoint', str(last), '--results-file', 'results.json', '--results-format', 'json']) == 0
    model = timm.create_model('test_resnet_castream', num_classes=20).eval()
    model.load_state_dict(checkpoint['state_dict'])
    output = predictions(model, VOC2012(root, 'val'))[0].double().numpy()
    target = np.where(labels['val'] == 0, VOC_IGNORE, labels['val'] == 1)
    each = [devkit_average_precision(output[:, c], target[:, c]) for c in range(20)]
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['map'] == pytest.approx(100 * np.mean([ap for ap in each if ap is not None]), abs=1e-3)
