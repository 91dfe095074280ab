"""Fits of a stream: kept maps, training on them, the choice of settings, the answer, and what a killed fit leaves."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

import timm_castream
from timm_castream import cli
from timm_castream.evaluation.report import Report
from timm_castream.evaluation.values import ImageValues
from timm_castream.fitting import features as features_module
from timm_castream.fitting import run as run_module
from timm_castream.fitting import training
from timm_castream.fitting.answer import MEASURED, METHODS, answer, gain_beyond_random
from timm_castream.fitting.choice import Tried, recipes, take
from timm_castream.fitting.classifier import choose_classifier
from timm_castream.fitting.features import CachedFeatures, LiveFeatures, write_features
from timm_castream.fitting.images import AugmentedImages, ImageFile, split_images
from timm_castream.fitting.network import FrozenNetwork
from timm_castream.fitting.training import Candidate, Recipe, Targets, train_streams
from timm_castream.hub.stream_file import read_safetensors

COLOURS = ('blue', 'green', 'red')
FAST = {'img_size': 32, 'progress': False}


@pytest.fixture(scope='session')
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 noisy images of each of three colours, a folder a colour."""
    root = tmp_path_factory.mktemp('colours')
    rng = np.random.default_rng(0)
    for channel, name in zip((2, 1, 0), COLOURS, strict=True):
        (root / name).mkdir()
        for i in range(20):
            pixels = rng.integers(0, 90, (40, 48, 3))
            pixels[5:30, 5:40, channel] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f'{i}.png')
    return root


def network_of(name: str = 'test_resnet', num_classes: int = 3) -> Any:
    """A small network whose predictions are far from chance."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=num_classes)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.running_mean.uniform_(-0.2, 0.2)
        model.get_classifier().weight.normal_(0, 1)
    return model.eval()


class Noise(torch.utils.data.Dataset):
    """Random images, 32 x 32."""

    def __init__(self, count: int, dtype: torch.dtype = torch.float32, bad: tuple[int, ...] = ()) -> None:
        self.x = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=dtype)
        self.bad = bad

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in self.bad:
            raise OSError('broken file')
        return self.x[index], 0


# Feature maps


def test_kept_maps_and_pooled_vectors_are_those_of_the_network(tmp_path: Path) -> None:
    model, data = network_of(), Noise(70)
    kept = write_features(FrozenNetwork(model), data, tmp_path, facts={})
    with torch.no_grad():
        expected = [model.maxpool(model.act1(model.bn1(model.conv1(data.x))))]
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            expected.append(layer(expected[-1]))
    order = torch.tensor([69, 3, 40])
    ((maps, pooled),) = CachedFeatures(tmp_path).batches([order], 0)
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs[order], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pooled, expected[-1][order].mean((2, 3)), rtol=1e-5, atol=1e-5)
    assert kept.readable.all() and {array.dtype for array in kept.stages} == {np.dtype('float16')}


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext'])
def test_the_head_reads_a_pooled_vector_as_it_reads_the_map(name: str, tmp_path: Path) -> None:
    model: Any = timm.create_model(name, img_size=32) if 'vit' in name else timm.create_model(name)
    network, x = FrozenNetwork(model.eval()), Noise(5).x
    with torch.no_grad():
        logits = network.logits(network.run(x)[1])
        torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-5)


def test_an_image_that_cannot_be_read_is_named_and_marked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = Noise(70, bad=(0, 65))
    kept = write_features(FrozenNetwork(network_of()), data, tmp_path, facts={})
    assert (~kept.readable).nonzero().flatten().tolist() == [0, 65]
    assert 'image 65' in caplog.text and 'broken file' in caplog.text
    split = split_images(kept.readable, 0)
    assert {0, 65}.isdisjoint(torch.cat([split.train, split.selection, split.test]).tolist())


def test_maps_of_other_images_are_refused_and_those_of_fewer_stages_are_made_again(tmp_path: Path) -> None:
    network = FrozenNetwork(network_of())
    first = write_features(network, Noise(3), tmp_path, 4, facts={'files': 'a'})
    assert [stage.shape[1] for stage in first.stages] == [network.stages[4].dim]
    again = write_features(network, Noise(3), tmp_path, 2, facts={'files': 'a'})
    assert len(again.stages) == 3
    with pytest.raises(ValueError, match='files'):
        write_features(network, Noise(3), tmp_path, 2, facts={'files': 'b'})


def test_a_map_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = network_of()
    with torch.no_grad():
        model.bn1.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r'maxpool.*float16'):
        write_features(FrozenNetwork(model), Noise(3), tmp_path, facts={})


# Training


@pytest.mark.parametrize('name, init', [('test_resnet', 'gap'), ('test_resnet', 'paper'), ('test_vit', 'paper')])
def test_streams_train_as_through_the_forward_of_the_model_with_a_frozen_backbone(name: str, init: str) -> None:
    kwargs = {'img_size': 32} if 'vit' in name else {}
    torch.manual_seed(1)
    model: Any = timm.create_model(name, num_classes=4, **kwargs).double().eval()
    data, labels = Noise(10, torch.float64), torch.arange(10) % 4
    recipe = Recipe(1, epochs=2, lr=1e-2, weight_decay=0.1, label_smoothing=0.1)
    network = FrozenNetwork(model)
    candidate = Candidate(network, recipe, {'stream_init': init}, seed=3)
    start = {key: value.clone() for key, value in candidate.stream.state_dict().items()}
    live = LiveFeatures(network, lambda epoch: data)
    train_streams(network, live, torch.arange(10), Targets(labels), [candidate], batch_size=4, seed=5)

    timm_castream.attach(model, stream_start=1, stream_init=init, freeze_backbone=True)
    model.castream.load_state_dict(start)
    optimizer = torch.optim.AdamW(model.castream.parameters(), lr=1e-2, weight_decay=0.1)
    step = 0
    for epoch in range(2):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(5 + epoch))
        for part in order.split(4):
            optimizer.param_groups[0]['lr'] = 1e-2 * (1 + math.cos(math.pi * step / 6)) / 2
            loss = F.cross_entropy(model(data.x[part]), labels[part], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    moved = 0.0
    for key, expected in model.castream.state_dict().items():
        torch.testing.assert_close(candidate.stream.state_dict()[key], expected, rtol=1e-8, atol=1e-10)
        moved = max(moved, float((expected - start[key]).abs().max()))
    assert moved > 1e-2


def test_kept_maps_train_as_live_forwards_do(tmp_path: Path) -> None:
    model, data = network_of(), Noise(70)
    network = FrozenNetwork(model)
    trained = []
    for source in (LiveFeatures(network, lambda epoch: data), write_features(network, data, tmp_path, facts={})):
        candidate = Candidate(network, Recipe(0, 1, 1e-3), {}, seed=0)
        train_streams(network, source, torch.arange(70), Targets(torch.arange(70) % 3), [candidate])
        trained.append(candidate.stream.state_dict())
    for key, live in trained[0].items():
        torch.testing.assert_close(trained[1][key], live, rtol=0, atol=2e-4)


@pytest.mark.parametrize('drop', [0.0, 0.3])
def test_a_stream_does_not_depend_on_the_streams_beside_it(drop: float, tmp_path: Path) -> None:
    network, data = FrozenNetwork(network_of()), Noise(20)
    kept = write_features(network, data, tmp_path, facts={})
    wanted = Recipe(2, 2, 1e-3)
    states = []
    for plan in ([wanted], [Recipe(0, 3, 1e-2), wanted, Recipe(4, 1, 1e-3)]):
        candidates = [Candidate(network, recipe, {'stream_drop': drop}, seed=0) for recipe in plan]
        train_streams(network, kept, torch.arange(20), Targets(torch.arange(20) % 3), candidates, batch_size=8)
        states.append(candidates[plan.index(wanted)].stream.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_targets_are_labels_predictions_or_probabilities() -> None:
    model = network_of()
    network, x = FrozenNetwork(model), Noise(4).x
    with torch.no_grad():
        _, pooled = network.run(x)
        probabilities = model(x).softmax(1)
    indices = torch.tensor([3, 1, 0, 2])
    fixed = Targets(torch.tensor([0, 1, 2, 0]))
    assert fixed(network, indices, pooled)[1].tolist() == [0, 1, 0, 2]
    own = Targets(torch.full((4,), -1))
    assert own(network, indices, pooled)[1].tolist() == probabilities.argmax(1).tolist()
    predicted = torch.eye(3)[probabilities.argmax(1)]
    for share in (1.0, 0.25):
        labels, soft = Targets(torch.tensor([-1, 2, -1, -1]), soft=share)(network, indices, pooled)
        expected = share * probabilities + (1 - share) * predicted
        expected[1] = torch.tensor([0.0, 0.0, 1.0])
        torch.testing.assert_close(soft, expected, rtol=1e-4, atol=1e-6)
        assert labels[1] == 2


def test_the_classifier_reaches_what_logistic_regression_reaches() -> None:
    generator = torch.Generator().manual_seed(0)
    model = network_of()
    centres = torch.randn(3, model.num_features, generator=generator)
    labels = torch.arange(300) % 3
    pooled = 0.6 * centres[labels] + torch.randn(300, model.num_features, generator=generator)
    model.reset_classifier(3)
    tries = choose_classifier(FrozenNetwork(model), (pooled[:200], labels[:200]), (pooled[200:], labels[200:]), seed=0)
    reference = LogisticRegression(max_iter=1000).fit(pooled[:200], labels[:200]).score(pooled[200:], labels[200:])
    best = max(entry.accuracy for entry in tries)
    assert tries[0].epochs == 0 and best > tries[0].accuracy + 20
    assert best == pytest.approx(100 * reference, abs=5)
    with torch.no_grad():
        hits = model.forward_head(pooled[200:, :, None, None]).argmax(1) == labels[200:]
    assert 100 * hits.float().mean().item() == pytest.approx(best)


# The choice and the answer


def test_the_rule_takes_accuracy_first_and_then_the_score() -> None:
    def tried(accuracy: float, gain: float, epochs: int = 1, lr: float = 1e-4) -> Tried:
        return Tried(Recipe(0, epochs, lr), accuracy, gain, 0.0)

    table = [tried(90, 1), tried(89.2, 9), tried(88.9, 30)]
    assert take(table, 89) is table[1]
    assert take(table, 88) is table[2]
    assert take(table, 95) is table[0]
    close = [tried(90, 8.5), tried(89.5, 9.0), tried(90, 8.4, epochs=3)]
    assert take(close, 89) is close[0]


def test_given_settings_alone_are_tried() -> None:
    assert {(r.stream_start, r.epochs, r.lr) for r in recipes(4, 'gap')} == {
        (start, epochs, lr) for start in (0, 4) for epochs in (1, 3) for lr in (3e-5, 1e-4)
    }
    assert recipes(4, 'gap', [2], [1e-3], [1]) == [Recipe(1, 2, 1e-3)]


def report_of(accuracy: float, gain: float, random_gain: float, increase: float, noise: float = 1.0) -> Report:
    """A report of 200 images with these mean differences CA - GAP, in points, and noise of the same size on each."""
    rng = np.random.default_rng(0)
    rows: dict[str, np.ndarray] = {'image': np.arange(200)}
    images: dict[str, np.ndarray] = {'image': np.arange(200)}
    for pooling, sign in (('gap', 0.0), ('ca', 1.0)):
        right = np.arange(200) < 2 * (80 + sign * accuracy)
        images[f'{pooling}/accuracy'] = 100.0 * right
        rows |= {f'{pooling}/class': np.zeros(200), f'{pooling}/prob': np.full(200, 0.5)}
        for method, of_gain in (('grad_cam', gain), ('random', random_gain)):
            for metric, shift in (('average_drop', 0.0), ('average_gain', of_gain), ('average_increase', increase)):
                rows[f'{pooling}/{method}/{metric}'] = 20 + sign * shift + noise * rng.standard_normal(200)
    return Report.from_values(
        'net', ('gap', 'ca'), METHODS, MEASURED, ImageValues(images, rows), 0, {'seed': 0, 'target': 'truth'}
    )


@pytest.mark.parametrize(
    'report, has_labels, problems',
    [
        ((0, 5, 1, 3), True, []),
        ((-10, 5, 1, 3), True, ['accuracy']),
        ((0, -5, -6, 3), True, ['AG of Grad-CAM is not better']),
        ((0, 5, 1, -3), True, ['AI of Grad-CAM is not better']),
        ((0, 5, 6, 3), True, ['random']),
        ((-8, 5, 6, -3), True, ['accuracy', 'AI', 'random']),
        ((11, 5, 1, 3), False, []),  # 91 % of GAP's classes
        ((0, 5, 1, 3), False, ['another class']),  # 80 %
    ],
)
def test_the_stream_helps_where_accuracy_stays_and_the_gain_is_beyond_that_of_random_maps(
    report: tuple[float, ...], has_labels: bool, problems: list[str]
) -> None:
    helps, sentence = answer(report_of(*report), has_labels)
    assert helps == (not problems) and helps == sentence.startswith('The stream helps here')
    assert all(problem in sentence for problem in problems)


def test_one_image_shows_neither_help_nor_a_lower_accuracy() -> None:
    many = report_of(0, 5, 1, 3)
    images, pairs = ({k: v[:1] for k, v in values.items()} for values in (many.values.images, many.values.pairs))
    report = Report.from_values('net', ('gap', 'ca'), METHODS, MEASURED, ImageValues(images, pairs), 0, many.settings)
    helps, sentence = answer(report, True)
    assert not helps and 'AG of Grad-CAM is not better' in sentence
    assert 'the accuracy is lower' not in sentence and 'nan' not in sentence


def test_the_gain_beyond_random_maps_is_a_mean_over_images_with_its_interval() -> None:
    report = report_of(0, 5, 1, 3)
    pairs = report.values.pairs
    each = [
        (pairs['ca/grad_cam/average_gain'][i] - pairs['gap/grad_cam/average_gain'][i])
        - (pairs['ca/random/average_gain'][i] - pairs['gap/random/average_gain'][i])
        for i in range(200)
    ]
    value, low, high = gain_beyond_random(report)
    assert value == pytest.approx(sum(each) / 200)
    half = 1.96 * np.std(each) / 200**0.5
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.1)


# A fit from images to the answer


@pytest.fixture(scope='session')
def fitted(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A whole fit by folders, with its model before."""
    model = network_of(num_classes=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    output = tmp_path_factory.mktemp('fits') / 'fitted'
    return timm_castream.fit(
        model, colours, 'folders', output, epochs=[1, 2], lr=1e-3, stream_start=[0, 4], **FAST
    ), before


def test_a_fit_by_folders_changes_the_classifier_and_nothing_else_of_the_network(fitted: Any) -> None:
    result, before = fitted
    changed = {
        key
        for key, value in result.model.state_dict().items()
        if not key.startswith('castream.') and not (key in before and torch.equal(value, before[key]))
    }
    assert changed == {'fc.weight', 'fc.bias'}
    assert result.model.pretrained_cfg['label_names'] == list(COLOURS)
    assert result.report.accuracy['gap'].value > 80  # three colours are easy
    assert not result.model.training


def test_the_results_open_elsewhere(fitted: Any) -> None:
    result, _ = fitted
    names = {path.name for path in result.folder.iterdir()}
    assert {'stream.safetensors', 'model', 'evaluation', 'pictures', 'report.md', 'fit.json'} <= names
    assert '.unfinished' not in names
    x = Noise(3).x
    with torch.no_grad():
        expected = timm_castream.forward_both(result.model, x)
        loaded = timm.create_model(f'local-dir:{result.folder / "model"}', pretrained=True).eval()
        for pooling, logits in timm_castream.forward_both(loaded, x).items():
            torch.testing.assert_close(logits, expected[pooling])
        with torch.no_grad():
            loaded.castream.cls_token.zero_()
        timm_castream.load_stream(loaded, result.folder / 'stream.safetensors')
        torch.testing.assert_close(loaded(x), expected['ca'])
    text = (result.folder / 'report.md').read_text()
    assert result.sentence in text and 'AG' in result.sentence


def test_every_recipe_is_in_the_facts_and_the_parts_share_no_image(fitted: Any) -> None:
    result, _ = fitted
    facts = json.loads((result.folder / 'fit.json').read_text())
    assert {(t['stream_start'], t['epochs']) for t in facts['tried']} == {(0, 1), (0, 2), (4, 1), (4, 2)}
    assert sum(t['taken'] for t in facts['tried']) == 1
    assert facts['parts'] == {'train': 48, 'selection': 6, 'test': 6}
    split = split_images(torch.ones(60, dtype=torch.bool), 0)
    assert split.test.tolist() == facts['test']
    assert sorted(torch.cat([split.train, split.selection, split.test]).tolist()) == list(range(60))


def test_without_labels_the_class_of_an_image_is_what_the_network_predicts(colours: Path, tmp_path: Path) -> None:
    model = network_of()
    plain = network_of()
    result = timm_castream.fit(model, colours, output=tmp_path / 'out', epochs=1, lr=1e-3, stream_start=4, **FAST)
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config({'img_size': 32}, model=plain), is_training=False
    )
    paths = sorted(colours.rglob('*.png'))
    x = torch.stack([transform(Image.open(paths[i]).convert('RGB')) for i in result.facts['test']])
    with torch.no_grad():
        assert result.facts['test_labels'] == plain(x).argmax(1).tolist()
    assert result.report.accuracy['gap'].value == 100
    assert "GAP's class on" in result.sentence


class Killed(BaseException):
    """Ends a fit where it stands, as a signal would."""


def kill_at(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, call: int) -> None:
    """Raises `Killed` in the given call of a function."""
    original, calls = getattr(place, name), [0]

    def function(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, function)


@pytest.mark.parametrize('keeps', [True, pytest.param(False, marks=pytest.mark.slow)], ids=['cache', 'live'])
def test_a_fit_killed_in_every_step_gives_the_same_stream(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    monkeypatch.setattr(features_module, 'CHUNK', 16)
    monkeypatch.setattr(training, 'SAVE_SECONDS', 0.0)
    settings: Any = {
        'epochs': [1, 2],
        'lr': 1e-2,
        'stream_start': [0, 4],
        'batch_size': 10,
        'cache_size': 20 if keeps else 0,
        **FAST,
    }

    def run(output: Path, **changes: Any) -> Any:
        return timm_castream.fit(network_of(), colours, 'folders', output, **settings | changes)

    whole = run(tmp_path / 'whole')
    places: list[tuple[Any, str, int]] = [
        (features_module, '_values', 3),
        (training.Candidate, 'step', 12),
        (training.Candidate, 'step', 7),
        (run_module, 'evaluate', 2),
        (run_module, 'write_repository', 1),
    ]
    for place in places:
        with monkeypatch.context() as patch:
            kill_at(patch, *place)
            with pytest.raises(Killed):
                run(tmp_path / 'killed')
    # The cache size of the first call holds: other maps would give another stream.
    resumed = run(tmp_path / 'killed', cache_size=20)
    for name in ('stream.safetensors', 'classifier.safetensors'):
        ours, theirs = (read_safetensors(tmp_path / side / name, name) for side in ('killed', 'whole'))
        assert ours[1] == theirs[1] and ours[0].keys() == theirs[0].keys()
        assert all(torch.equal(value, theirs[0][key]) for key, value in ours[0].items()), name
    name = 'evaluation/images.csv'
    assert (tmp_path / 'killed' / name).read_text() == (tmp_path / 'whole' / name).read_text()
    assert resumed.sentence == whole.sentence
    again = run(tmp_path / 'killed')
    assert torch.equal(again.model.castream.cls_token, whole.model.castream.cls_token)
    with pytest.raises(ValueError, match='epochs'):
        run(tmp_path / 'killed', epochs=3)


KILLED = """
import os, signal, sys
from timm_castream import cli
from timm_castream.fitting import training
training.SAVE_SECONDS = 0.0
step, calls = training.Candidate.step, [0]
def counted(*args):
    calls[0] += 1
    if calls[0] == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)
training.Candidate.step = counted
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_killed_command_gives_the_same_stream_when_it_runs_again(colours: Path, tmp_path: Path) -> None:
    weights = tmp_path / 'weights.safetensors'
    save_file(network_of().state_dict(), weights)

    def run(output: str, kill_at_step: int = 0) -> int:
        command = [
            'fit',
            '--model',
            'test_resnet',
            '--num-classes',
            '3',
            '--checkpoint',
            str(weights),
            '--images',
            str(colours),
            '--epochs',
            '3',
            '--lr',
            '1e-2',
            '3e-2',
            '--img-size',
            '32',
            '-b',
            '16',
            '--output',
            output,
        ]
        return subprocess.run([sys.executable, '-c', KILLED, str(kill_at_step), *command], cwd=tmp_path).returncode

    assert run('whole') == 0
    assert run('killed', 20) == -signal.SIGKILL
    assert (tmp_path / 'killed' / '.unfinished' / 'training.safetensors').is_file()
    assert run('killed') == 0
    streams = [read_safetensors(tmp_path / name / 'stream.safetensors', name)[0] for name in ('whole', 'killed')]
    assert all(torch.equal(value, streams[1][key]) for key, value in streams[0].items())


def test_the_cache_takes_what_the_log_says(colours: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level('INFO')
    cache = tmp_path / 'maps'
    timm_castream.fit(
        network_of(), colours, output=tmp_path / 'out', epochs=1, lr=1e-3, stream_start=0, cache=cache, **FAST
    )
    size = sum(path.stat().st_size for path in cache.glob('*.npy')) / 1e9
    said = next(record.args for record in caplog.records if str(record.msg).startswith('Cache'))
    gigabytes = float(said[0].split('take ')[1].split()[0])
    assert gigabytes == pytest.approx(size, abs=0.006)


def test_maps_that_do_not_fit_are_made_anew(colours: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level('INFO')
    streams = []
    for size in (20.0, 0.0):
        output = tmp_path / str(size)
        timm_castream.fit(
            network_of(), colours, output=output, epochs=1, lr=1e-3, stream_start=0, cache_size=size, **FAST
        )
        streams.append(timm.models.load_state_dict(output / 'stream.safetensors'))
    assert 'No cache' in caplog.text
    for key, value in streams[0].items():
        torch.testing.assert_close(streams[1][key], value, rtol=0, atol=2e-4)


def test_an_augmented_image_depends_on_seed_epoch_and_index_alone(colours: Path) -> None:
    paths = [ImageFile(path, '') for path in sorted(colours.rglob('*.png'))[:2]]
    transform = timm.data.create_transform((3, 32, 32), is_training=True)

    def view(seed: int, epoch: int, index: int) -> torch.Tensor:
        return AugmentedImages(paths, torch.zeros(2), transform, 'RGB', seed=seed, epoch=epoch)[index][0]

    first = view(0, 0, 0)
    torch.rand(3)
    assert torch.equal(view(0, 0, 0), first)
    assert not torch.equal(view(0, 1, 0), first) and not torch.equal(view(1, 0, 0), first)


def test_an_augmented_fit_keeps_no_maps_and_labels_what_is_left(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = Targets.__call__

    def call(self: Targets, network: Any, indices: torch.Tensor, pooled: torch.Tensor) -> Any:
        labels, targets = original(self, network, indices, pooled)
        with torch.no_grad():
            seen.append((labels, network.model.forward_head(pooled[:, :, None, None]).argmax(1)))
        return labels, targets

    monkeypatch.setattr(Targets, '__call__', call)
    timm_castream.fit(
        network_of(), colours, output=tmp_path / 'out', epochs=2, lr=1e-3, stream_start=4, augment=True, **FAST
    )
    assert len(seen) == 2 and all(torch.equal(ours, theirs) for ours, theirs in seen)


def test_a_share_of_the_labels_is_true(colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network_of()
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': ['red', 'blue', 'green']}
    drawn: list[Targets] = []
    monkeypatch.setattr(run_module, 'train_streams', lambda *args, **kwargs: drawn.append(args[3]))
    result = timm_castream.fit(
        model, colours, output=tmp_path / 'out', epochs=1, lr=1e-3, stream_start=4, true_share=0.5, distill=True, **FAST
    )
    labels = drawn[0].labels
    paths = sorted(colours.rglob('*.png'))
    truth = torch.tensor([['red', 'blue', 'green'].index(path.parent.name) for path in paths])
    fixed = labels >= 0
    assert int(fixed.sum()) == 24 and torch.equal(labels[fixed], truth[fixed]) and drawn[0].soft
    assert result.facts['labels_of_test'] == 'folders'
    assert result.facts['test_labels'] == truth[result.facts['test']].tolist()


def test_a_model_with_a_stream_keeps_the_arguments_of_its_stream(colours: Path, tmp_path: Path) -> None:
    model = timm_castream.attach(network_of(), stream_start=3, stream_block='proj_ca', stream_class_specific=True)
    result = timm_castream.fit(model, colours, output=tmp_path / 'out', epochs=1, lr=1e-3, **FAST)
    assert result.model is model
    assert model.castream_config['stream_block'] == 'proj_ca' and model.castream_config['stream_start'] == 3
    assert model.castream.cls_token.shape[0] == 3


# What is refused


@pytest.mark.parametrize(
    'change, message',
    [
        ({'labels': 'true'}, "'true'"),
        ({'epochs': 0}, 'epochs.*0'),
        ({'epochs': 1.5}, r'epochs.*1\.5'),
        ({'lr': -1.0}, r'lr.*-1\.0'),
        ({'stream_start': 9}, 'stream_start 9'),
        ({'num_images': 61}, 'num_images 61.*60'),
        ({'num_images': 20}, '20 images'),
        ({'seed': -1}, 'seed.*-1'),
        ({'true_share': 2.0}, r'true_share.*2\.0'),
        ({'true_share': 0.5}, r'true_share 0\.5'),
        ({'labels': 'folders', 'distill': True}, 'distill'),
        ({'distill': 1.5}, r'distill .*1\.5'),
        ({'cache_size': -1}, 'cache_size.*-1'),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    colours: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        timm_castream.fit(network_of(), colours, **{'output': tmp_path / 'out', **FAST, **change})
    assert not (tmp_path / 'out').exists()


def test_folders_without_images_and_folders_inside_one_another_are_refused(colours: Path, tmp_path: Path) -> None:
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match=r'empty.*no images'):
        timm_castream.fit(network_of(), tmp_path / 'empty', output=tmp_path / 'out')
    with pytest.raises(ValueError, match='no folder'):
        timm_castream.fit(network_of(), tmp_path / 'missing', output=tmp_path / 'out')
    copy = shutil.copytree(colours, tmp_path / 'out' / 'images')
    with pytest.raises(ValueError, match='inside the output'):
        timm_castream.fit(network_of(), copy, output=tmp_path / 'out')
    with pytest.raises(ValueError, match='inside the folder of images'):
        timm_castream.fit(network_of(), copy, output=copy / 'fitted')


def test_a_network_without_a_trained_classifier_is_refused(colours: Path, tmp_path: Path) -> None:
    for name in ('test_resnet', 'test_vit', 'test_convnext', 'tf_efficientnet_lite0'):
        torch.manual_seed(0)
        with pytest.raises(ValueError, match='not trained'):
            size = None if 'vit' in name else 64
            timm_castream.fit(timm.create_model(name), colours, output=tmp_path / name, img_size=size, progress=False)
    with pytest.raises(ValueError, match='num_classes is 0'):
        timm_castream.fit(timm.create_model('test_resnet', num_classes=0), colours, output=tmp_path / 'none', **FAST)


def test_a_network_of_one_logit_is_refused_where_it_should_predict_the_labels(colours: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'answers by one number .*two classes or more.*labels='):
        timm_castream.fit(network_of(num_classes=1), colours, output=tmp_path / 'out', **FAST)
    assert not (tmp_path / 'out').exists()


def test_few_images_are_warned_about(colours: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    timm_castream.fit(network_of(), colours, output=tmp_path / 'out', epochs=1, lr=1e-3, stream_start=4, **FAST)
    assert '60 images are few' in caplog.text


def test_class_folders_are_needed_where_they_name_the_labels(colours: Path, tmp_path: Path) -> None:
    one = shutil.copytree(colours, tmp_path / 'images' / 'only').parent
    with pytest.raises(ValueError, match="'only' alone"):
        timm_castream.fit(network_of(), one, 'folders', tmp_path / 'out', **FAST)
    shutil.copy(colours / 'red' / '0.png', one / 'flat.png')
    with pytest.raises(ValueError, match=r'flat\.png lies in none'):
        timm_castream.fit(network_of(), one, 'folders', tmp_path / 'out', **FAST)


def test_the_size_and_the_normalisation_are_those_asked_for(colours: Path, tmp_path: Path) -> None:
    settings = {'input_size': (3, 64, 32), 'mean': (0.1, 0.2, 0.3), 'std': (0.5, 0.6, 0.7), 'crop_mode': 'squash'}
    model = network_of()
    fitted = timm_castream.fit(
        model, colours, output=tmp_path, epochs=1, lr=1e-3, stream_start=4, crop_pct=1.0, progress=False, **settings
    )
    for name, value in settings.items():
        assert tuple(model.pretrained_cfg[name]) == tuple(value)
    recorded = fitted.report.settings
    assert recorded['mean'] == [0.1, 0.2, 0.3] and recorded['std'] == [0.5, 0.6, 0.7]
    assert recorded['input_size'] == [3, 64, 32]
    # The pixels that the network got: an image squeezed to 64 x 32, scaled by hand.
    name = fitted.report.files[0]
    image = Image.open(colours / name).convert('RGB').resize((32, 64), Image.Resampling.BILINEAR)
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
    x = (x - torch.tensor(settings['mean']).view(3, 1, 1)) / torch.tensor(settings['std']).view(3, 1, 1)
    with torch.no_grad(), timm_castream.pooling(model, 'gap'):
        expected = model(x).softmax(1).max().item()
    assert fitted.report.values.pairs['gap/prob'][0] == pytest.approx(expected, abs=5e-3)


def test_a_mean_and_a_std_of_any_kind_are_kept_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        'timm_castream.fitting.run.run', lambda model, images, output, settings, *rest: given.append(settings)
    )
    timm_castream.fit(network_of(), tmp_path, mean=0.5, std=np.full(3, 0.25))
    kept = given[0].image_settings
    assert (kept['mean'], kept['std']) == ([0.5], [0.25, 0.25, 0.25])
    with pytest.raises(ValueError, match=r"^std must hold numbers, got 'grey'"):
        timm_castream.fit(network_of(), tmp_path, std='grey')


def test_the_command_needs_trained_weights(colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ['fit', '--model', 'test_resnet', '--images', str(colours), '--output', str(tmp_path / 'out')]
    assert cli.main(command) == cli.USER_ERROR
    assert '--pretrained' in capsys.readouterr().err


def test_the_command_fits_and_answers(colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / 'weights.safetensors'
    save_file(network_of().state_dict(), weights)
    output = tmp_path / 'out'
    code = cli.main(
        [
            'fit',
            '--model',
            'test_resnet',
            '--num-classes',
            '3',
            '--checkpoint',
            str(weights),
            '--images',
            str(colours),
            '--epochs',
            '1',
            '--lr',
            '1e-3',
            '--stream-start',
            '4',
            '--img-size',
            '32',
            '-j',
            '0',
            '--output',
            str(output),
        ]
    )
    printed = capsys.readouterr().out
    assert code == 0 and 'Random' in printed and json.loads((output / 'fit.json').read_text())['sentence'] in printed


def test_an_interrupted_command_says_how_to_resume(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, output = tmp_path / 'weights.safetensors', tmp_path / 'out'
    save_file(network_of().state_dict(), weights)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Candidate, 'step', interrupt)
    command = ['fit', '--model', 'test_resnet', '--num-classes', '3', '--checkpoint', str(weights), '-j', '0']
    assert (
        cli.main([*command, '--images', str(colours), '--img-size', '32', '--output', str(output)]) == cli.INTERRUPTED
    )
    assert f'resumes the fit in {output}' in capsys.readouterr().err
