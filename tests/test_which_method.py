"""The statistics behind docs/which-method.md, and the page itself."""

from __future__ import annotations

import gzip
import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import stats

from benchmarks.which_method import __main__ as program
from benchmarks.which_method import networks
from benchmarks.which_method.answer import Place, answer
from benchmarks.which_method.comparisons import Comparisons, p_values, sign_flip_tests, taus
from benchmarks.which_method.page import render
from benchmarks.which_method.values import Result

ROOT = Path(__file__).parent.parent
METRICS = {'average_drop': False, 'insertion': True, 'deletion': False, 'pointing_game': True}


def committed(folder: Path, values: dict[str, list[float]], slow: tuple[str, ...] = ()) -> Result:
    """Results as `collect` writes them, of the values of a column of GAP by 'method/metric'."""
    columns = {f'gap/{name}': column for name, column in values.items()}
    lines = ['image,' + ','.join(columns)]
    for i, row in enumerate(zip(*columns.values(), strict=True)):
        lines.append(','.join([str(i), *('' if value is None else str(value) for value in row)]))
    (folder / 'net.csv.gz').write_bytes(gzip.compress('\n'.join(lines).encode()))
    methods = list(dict.fromkeys(name.split('/')[0] for name in values))
    facts = {
        'heading': 'Net',
        'poolings': ['gap'],
        'methods': methods,
        'equal': {'captum:LayerGradCam': 'grad_cam'},
        'metrics': {name: {'higher': higher} for name, higher in METRICS.items()},
        'seconds': dict.fromkeys(methods, 0.1),
        'forward_seconds': 0.1,
        'slow': list(slow),
    }
    (folder / 'net.json').write_text(json.dumps(facts))
    return Result(folder, 'net')


def test_a_test_is_that_of_all_flips_of_the_signs():
    rng = np.random.default_rng(3)
    differences = rng.normal(0.8, 1, (9, 30))
    flips = np.array(list(product((-1, 1), repeat=9)))
    found = np.abs(stats.ttest_1samp(differences, 0).statistic)
    flipped = np.abs([stats.ttest_1samp(differences * flip[:, None], 0).statistic for flip in flips])
    p = (flipped >= found - 1e-9).mean(0)
    verdicts = sign_flip_tests(differences).verdicts
    clear = np.abs(p - 0.05) > 0.01  # 10,000 random flips
    assert clear.sum() > 20
    assert ((verdicts != 0) == (p < 0.05))[clear].all()
    together = (np.max(flipped, 1)[:, None] >= found - 1e-9).mean(0)
    clear = np.abs(together - 0.05) > 0.01
    assert ((np.abs(verdicts) == 2) == (together < 0.05))[clear].all()


@pytest.mark.parametrize('count', [1, 2, 7, 9, 12])
def test_p_is_the_share_of_all_flips(count):
    rng = np.random.default_rng(count)
    differences = rng.normal(0.5, 1, (count, 20))
    differences[:, 0] = rng.integers(-1, 2, count)  # ties
    differences[:, 1] = 0
    flips = np.array(list(product((-1, 1), repeat=count)))
    sums = np.abs(flips @ differences)
    expected = (sums >= np.abs(differences.sum(0)) - 1e-9).mean(0)
    np.testing.assert_allclose(p_values(differences), expected)


def test_p_of_many_photographs_is_that_of_drawn_flips():
    rng = np.random.default_rng(0)
    differences = np.full((60, 3), np.nan)
    differences[:, 0] = rng.normal(0.25, 1, 60)
    differences[:40, 1] = rng.normal(0.3, 1, 40)
    differences[:, 2] = rng.normal(0, 1, 60)
    found = p_values(differences)
    for k, values in enumerate(differences.T):
        values = values[~np.isnan(values)]
        expected = 2 * stats.norm.sf(np.abs(values.sum()) / np.sqrt((values**2).sum()))  # for many photographs
        assert found[k] == pytest.approx(expected, abs=0.01)


def test_among_equal_methods_all_tests_together_decide_one_in_twenty_times():
    rng = np.random.default_rng(0)
    alone, together = [], []
    for _ in range(40):
        verdicts = sign_flip_tests(rng.normal(size=(20, 1)) + rng.standard_t(3, size=(20, 50))).verdicts
        alone.append((verdicts != 0).mean())
        together.append((np.abs(verdicts) == 2).any())
    assert 0.01 < np.mean(alone) < 0.1
    assert np.mean(together) < 0.15


def test_a_column_with_few_photographs_is_tested_on_these():
    differences = np.full((40, 2), np.nan)
    differences[:, 0] = np.random.default_rng(1).normal(size=40)
    differences[:5, 1] = [1.0, 1.1, 0.9, 1.2, 0.8]
    tests = sign_flip_tests(differences)
    assert tests.verdicts.tolist() == [0, 0]  # 2 of the 32 flips of 5 signs are as clear
    differences[5, 1] = 1.0
    assert sign_flip_tests(differences).verdicts[1] > 0  # 2 of 64
    low, high = stats.t.interval(0.95, 4, 1, stats.sem(differences[:5, 1]))
    assert tests.seen[1] == pytest.approx((high - low) / 2)


def test_equal_values_are_not_told_apart():
    assert sign_flip_tests(np.zeros((10, 3))).verdicts.tolist() == [0, 0, 0]


def test_a_method_is_better_in_the_direction_of_the_metric(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.uniform(20, 60, (4, 30))
    result = committed(
        tmp_path,
        {f'grad_cam/{name}': base[i].tolist() for i, name in enumerate(METRICS)}
        | {f'hires_cam/{name}': (base[i] + rng.uniform(1, 3, 30)).tolist() for i, name in enumerate(METRICS)},
    )
    assert Comparisons(result).verdicts('gap', 'hires_cam', list(METRICS)) == [-2, 2, -2, 2]


def test_methods_with_equal_values_are_one_and_take_their_names_along(tmp_path):
    values = [10.0, 20.0, 30.0]
    result = committed(
        tmp_path,
        {
            'grad_cam/average_drop': values,
            'xgrad_cam/average_drop': [10.01, 20.0, None],
            'layer_cam/average_drop': [10.2, 20.0, 30.0],
        },
    )
    assert result.own_maps('gap') == ['grad_cam', 'layer_cam']
    assert result.names_of_one_map('gap') == {'grad_cam': ['captum:LayerGradCam', 'xgrad_cam']}


def test_tau_is_of_the_photographs_that_all_methods_have(tmp_path):
    drops = {'grad_cam': [1, 2, 90], 'layer_cam': [3, 4, 1], 'hires_cam': [5, 6, None], 'attention': [7, 9, 2]}
    insertions = {'grad_cam': [9, 9, 9], 'layer_cam': [5, 5, 5], 'hires_cam': [7, 7, 7], 'attention': [3, 3, 3]}
    result = committed(
        tmp_path,
        {f'{m}/average_drop': v for m, v in drops.items()} | {f'{m}/insertion': v for m, v in insertions.items()},
    )
    expected = stats.kendalltau([-1.5, -3.5, -5.5, -8], [9, 5, 7, 3]).statistic  # either photograph is a half
    assert Comparisons(result).tau('gap', 'average_drop', 'insertion') == pytest.approx(expected)
    assert Comparisons(result).tau('gap', 'insertion', 'insertion') == pytest.approx(1)


def test_taus_are_those_of_scipy_with_ties():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 5, (2, 30, 8))
    expected = [stats.kendalltau(a, b).statistic for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(taus(one.astype(float), other.astype(float)), expected)


def test_tau_is_between_two_halves_of_the_photographs(tmp_path):
    # The order of the methods is turned round in the second photograph, so that two halves never agree.
    drops = {'grad_cam': [1, 4], 'layer_cam': [2, 3], 'hires_cam': [3, 2], 'attention': [4, 1]}
    result = committed(
        tmp_path, {f'{m}/average_drop': v for m, v in drops.items()} | {f'{m}/deletion': v for m, v in drops.items()}
    )
    assert Comparisons(result).tau('gap', 'average_drop', 'average_drop') == pytest.approx(-1)
    assert Comparisons(result).tau('gap', 'average_drop', 'deletion') == pytest.approx(-1)


def test_slow_methods_are_tested_apart_and_are_not_among_the_ordered(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.uniform(20, 60, 40)
    columns = {'grad_cam/average_drop': base.tolist(), 'random/average_drop': (base + 5).tolist()}
    columns['score_cam/average_drop'] = [*(base[:10] - 1).tolist(), *[None] * 30]
    result = committed(tmp_path, columns, slow=('score_cam',))
    assert result.own_maps('gap', slow=True) == ['score_cam']
    assert Comparisons(result).ordered_methods('gap') == ['grad_cam']
    assert result.photographs('gap', ['score_cam'], 'average_drop').sum() == 10


@pytest.mark.parametrize(
    ('change', 'taken'), [(-5.0, '**Take `hires_cam`.**'), (5.0, '**Start with Grad-CAM on Net.**')]
)
def test_the_first_sentence_follows_the_values(tmp_path, change, taken):
    rng = np.random.default_rng(0)
    base = rng.uniform(40, 60, 30)
    near = base + rng.normal(0, 0.1, 30)
    columns = {'grad_cam': base, 'hires_cam': near + change, 'random': near + 20, 'centre': near + 30}
    result = committed(tmp_path, {f'{name}/average_drop': column.tolist() for name, column in columns.items()})
    text = ' '.join(answer([Place(result, Comparisons(result), 'gap')]))
    assert text.startswith(taken)
    assert 'Grad-CAM is better than both baselines, each by its own test, in 1 of 1 questions on Net' in text


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The folder of unfinished runs; what is collected lies beside it."""
    monkeypatch.setattr(program, 'RESULTS', tmp_path / 'results')
    folder = tmp_path / 'work' / 'lite0'
    folder.mkdir(parents=True)
    facts = {'poolings': ['gap'], 'methods': ['grad_cam'], 'slow': [], 'equal': {}, 'seconds': {'grad_cam': 0.1}}
    (folder / 'facts.json').write_text(json.dumps({**facts, 'forward_seconds': 0.1}))
    return folder.parent


def finished(work: Path, name: str, start: int, metrics: str, values: dict[str, list[float]]) -> None:
    """A run of two photographs that is finished. The network is right on every second photograph."""
    folder = work / 'lite0' / name
    folder.mkdir()
    command = f'run lite0 --images {start} STOP --metrics {metrics}'
    (folder / 'run.json').write_text(json.dumps({'command': command, 'start': start}))
    record = {
        'images': {'image': [0, 1], 'gap/accuracy': [100.0 * (start % 2 == i) for i in (0, 1)], 'gap/prob': [0.5, 0.5]},
        'pairs': {'image': [0, 1], **values},
    }
    (folder / 'finished.0.jsonl').write_text(json.dumps(record) + '\n')


def collected(work: Path, *arguments: str) -> Result:
    program.main(['collect', 'lite0', '--work', str(work), *arguments])
    return Result(work.parent / 'results', 'lite0')


def test_a_method_that_beats_the_baselines_and_loses_to_grad_cam_elsewhere_is_no_advice(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.uniform(40, 60, 30)
    columns = {}
    for metric, sign in (('average_drop', -1), ('insertion', 1), ('deletion', -1)):
        gains = {'grad_cam': 0, 'hires_cam': 5, 'random': 0, 'centre': 0}
        if metric == 'deletion':
            gains = {'grad_cam': 0, 'hires_cam': -5, 'random': -9, 'centre': -9}
        for method, gain in gains.items():
            columns[f'{method}/{metric}'] = (base + sign * gain + rng.normal(0, 0.1, 30)).tolist()
    # Grad-CAM: above the baselines in deletion alone, and below one in both others
    for metric, sign in (('average_drop', -1), ('insertion', 1)):
        columns[f'centre/{metric}'] = (np.array(columns[f'grad_cam/{metric}']) + sign * 1).tolist()
    result = committed(tmp_path, columns)
    text = ' '.join(answer([Place(result, Comparisons(result), 'gap')]))
    assert text.startswith(
        '**On Net no method is recommended.** Grad-CAM beats both baselines there in 1 of 3 questions.'
    )
    assert 'Methods that win there more often than they lose: `hires_cam`.' in text


def test_a_method_that_does_not_read_the_class_is_no_advice(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.uniform(40, 60, 30)
    drops = {'grad_cam': base, 'grad-cam:EigenCAM': base - 9, 'random': base, 'centre': base - 1}
    drops = {name: column + rng.normal(0, 0.1, 30) for name, column in drops.items()}
    result = committed(tmp_path, {f'{name}/average_drop': column.tolist() for name, column in drops.items()})
    text = next(iter(answer([Place(result, Comparisons(result), 'gap')])))
    assert text.startswith(
        '**On Net no method is recommended.** Grad-CAM beats both baselines there in 0 of 1 questions.'
    )
    assert '`grad-cam:EigenCAM` does in 1 of 1, but its map is the same for every class.' in text


def test_collected_are_the_finished_batches_of_all_runs_and_the_commands_that_measure_them(work):
    finished(work, 'first', 0, 'masked', {'gap/grad_cam/average_drop': [10.004, 20.0]})
    finished(work, 'second', 1, 'curves', {'gap/grad_cam/insertion': [float('nan'), 40.0]})
    result = collected(work)
    assert result.values('gap', 'grad_cam', 'average_drop').tolist()[:2] == [10, 20]
    assert np.isnan(result.values('gap', 'grad_cam', 'average_drop')[2])
    assert result.values('gap', 'grad_cam', 'insertion')[2] == 40
    assert [command.split('lite0 ')[1] for command in result.facts['commands']] == [
        '--images 0 2 --metrics masked',
        '--images 1 3 --metrics curves',
    ]


def test_collected_are_added_to_the_committed_values(work, capsys):
    finished(work, 'first', 0, 'masked', {'gap/grad_cam/average_drop': [10.0, 20.0]})
    collected(work)
    shutil.rmtree(work / 'lite0' / 'first')
    finished(work, 'second', 1, 'masked', {'gap/grad_cam/average_drop': [20.5, 30.0]})
    finished(work, 'third', 4, 'masked', {'gap/grad_cam/average_drop': [50.0, 60.0]})
    result = collected(work)
    assert result.images == [0, 1, 2, 4, 5]
    assert result.values('gap', 'grad_cam', 'average_drop').tolist() == [10, 20.5, 30, 50, 60]
    assert result.facts['accuracy'] == {'gap': 60.0}
    assert 'gap/grad_cam/average_drop of photograph 1 differs most, by 0.500' in capsys.readouterr().out
    assert [command.split('lite0 ')[1] for command in result.facts['commands']] == [
        '--images 0 3 --metrics masked',
        '--images 4 6 --metrics masked',
    ]
    assert collected(work, '--afresh').images == [1, 2, 4, 5]


def test_the_commands_are_those_that_measure_all_methods():
    run = 'run vit --images {} {} --metrics masked{}'.format
    commands = [run(0, 4, ' --leave-out score_cam captum:Occlusion'), run(4, 9, ''), run(0, 9, ' --methods layer_cam')]
    commands += [run(0, 3, ' --methods slow'), run(20, 30, '')]
    assert program.joined_commands(commands) == [run(0, 9, ''), run(20, 30, ''), run(0, 3, ' --methods slow')]


def test_values_of_another_network_are_not_added(work):
    finished(work, 'first', 0, 'masked', {'gap/grad_cam/average_drop': [10.0, 20.0]})
    before = collected(work)
    shutil.rmtree(work / 'lite0' / 'first')
    finished(work, 'second', 0, 'masked', {'gap/grad_cam/average_drop': [15.0, 20.0]})
    with pytest.raises(ValueError, match='the network is another one'):
        collected(work)
    assert Result(work.parent / 'results', 'lite0').facts == before.facts


def test_a_training_that_is_interrupted_ends_with_the_weights_of_one_that_is_not(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for i in range(6):
        path = tmp_path / 'train' / f'class{i % 2}' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    monkeypatch.setattr(networks, 'GROWTH', ((32, 1), (40, 1)))

    def train(name: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)  # the classifier keeps the weights that it is made with
        model = timm.create_model('test_resnet', num_classes=2)
        networks.train(model, tmp_path / 'train', tmp_path / f'{name}.safetensors')
        return load_file(tmp_path / f'{name}.safetensors')

    whole = train('whole')
    save, saved = torch.save, []

    def save_and_stop(*args: object) -> None:
        save(*args)
        saved.append(args)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train('stopped')
    stopped = train('stopped')
    assert len(saved) == 2
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_the_page_is_that_of_the_committed_values():
    page = (ROOT / 'docs' / 'which-method.md').read_text(encoding='utf-8')
    assert page == '\n'.join(render(program.committed())).rstrip() + '\n'


def test_boxes_are_a_section_and_ask_no_question(tmp_path):
    rng = np.random.default_rng(0)
    drops = rng.uniform(40, 60, 30)
    (tmp_path / 'asked').mkdir()
    (tmp_path / 'boxed').mkdir()
    methods = ('grad_cam', 'layer_cam', 'random', 'centre')
    asked = committed(tmp_path / 'asked', {f'{m}/average_drop': (drops + i).tolist() for i, m in enumerate(methods)})
    hits = {
        'grad_cam': [100.0] * 12 + [0.0] * 8,
        'layer_cam': [100.0] * 20,
        'random': [0.0] * 20,
        'centre': [100.0] * 20,
    }
    boxed = committed(tmp_path / 'boxed', {f'{m}/pointing_game': values for m, values in hits.items()})
    places = [Place(r, Comparisons(r), 'gap') for r in (asked, boxed)]
    assert [place.asked for place in places] == [['average_drop'], []]
    first, *_, last = answer(places[:1], places[1:])
    assert 'in the box of the object on 60 % of the photographs; the middle of the image does on 100 %' in first
    assert 'hits the box on 60 % of 20 photographs, `random` on 0 %, the middle of the image on 100 %' in last
    assert 'Better than Grad-CAM, each by its own test: `layer_cam` in Pointing Game' in last
    assert 'Better than the middle: none in Pointing Game, none in Energy Pointing Game.' in last


def test_every_network_has_its_baselines_and_its_accuracy():
    for result in program.committed():
        for pooling in result.poolings:
            assert {'random', 'centre', 'grad_cam'} <= set(result.own_maps(pooling))
            assert 0 < result.facts['accuracy'][pooling] <= 100
            assert f'{result.facts["accuracy"][pooling]:.1f} % ({pooling.upper()})' in (
                ROOT / 'docs' / 'which-method.md'
            ).read_text(encoding='utf-8')
