"""Averages, intervals and files of a report, from values made up here."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import numpy as np
import pytest

from timm_castream.evaluation.report import Estimate, ImageValues, Report
from timm_castream.metrics import DEFAULT_METRICS as METRICS


def make_report(
    metrics: np.ndarray, accuracy: np.ndarray, image_of_pair: np.ndarray | None = None, seed: int = 0
) -> Report:
    """Of (R, 5) metrics and (N,) accuracies; pair i is of image i where nothing else is said."""
    numbers = np.arange(len(accuracy)) * 10
    image = numbers if image_of_pair is None else numbers[image_of_pair]
    values = ImageValues(
        {'image': numbers, 'ca/accuracy': accuracy},
        {
            'image': image,
            'ca/class': np.full(len(image), 7),
            'ca/prob': np.full(len(image), 0.5),
            **{f'ca/grad_cam/{name}': column for name, column in zip(METRICS, metrics.T, strict=True)},
        },
    )
    return Report.from_values('tiny', ('ca',), ('grad_cam',), METRICS, values, seed, {'target': 'truth', 'seed': seed})


def test_figures_are_means_over_rows() -> None:
    rng = np.random.default_rng(0)
    metrics, accuracy = rng.uniform(0, 100, (12, 5)), rng.choice([0.0, 100.0], 12)
    report = make_report(metrics, accuracy)
    assert report.num_images == 12
    assert [report['ca', 'grad_cam', k].value for k in METRICS] == pytest.approx(metrics.mean(0))
    assert report.accuracy['ca'].value == pytest.approx(accuracy.mean())


def test_intervals_are_those_of_scipys_percentile_bootstrap() -> None:
    stats = pytest.importorskip('scipy.stats')
    rng = np.random.default_rng(1)
    metrics = rng.exponential(10, (150, 5)).clip(max=100)
    report = make_report(metrics, rng.choice([0.0, 100.0], 150))
    for column, k in zip(metrics.T, METRICS, strict=True):
        expected = stats.bootstrap((column,), np.mean, n_resamples=20000, method='percentile', rng=rng)
        low, high = expected.confidence_interval
        assert report['ca', 'grad_cam', k][1:] == pytest.approx((low, high), abs=0.15 * (high - low))


def test_intervals_repeat_with_their_seed() -> None:
    metrics, accuracy = np.random.default_rng(2).uniform(0, 100, (30, 5)), np.zeros(30)
    assert make_report(metrics, accuracy).figures == make_report(metrics, accuracy).figures
    assert make_report(metrics, accuracy).figures != make_report(metrics, accuracy, seed=1).figures


def test_the_labels_of_an_image_are_resampled_together() -> None:
    metrics = np.random.default_rng(3).uniform(0, 100, (40, 5))
    once = make_report(metrics, np.zeros(40))
    each_four_times = make_report(metrics.repeat(4, axis=0), np.zeros(40), np.arange(40).repeat(4))
    for key, estimate in once.figures.items():
        assert each_four_times[key] == pytest.approx(estimate)


def test_an_image_without_a_label_weighs_nothing_in_the_metrics() -> None:
    metrics = np.random.default_rng(4).uniform(0, 100, (4, 5))
    report = make_report(metrics, np.array([0, 100, 100.0, 100]), np.array([0, 0, 2, 3]))
    assert [report['ca', 'grad_cam', k].value for k in METRICS] == pytest.approx(metrics.mean(0))
    assert report.accuracy['ca'].value == 75


def test_the_printed_table_is_laid_out_as_the_papers() -> None:
    report = make_report(np.tile([[12.544, 22.668, 48.561, 75.529, 13.496]], (3, 1)), np.full(3, 74.7))
    lines = str(report).splitlines()
    assert lines[0] == 'tiny'
    assert lines[1].split() == ['POOLING', 'accuracy', '↑', 'probability']
    assert lines[2].split() == ['CA', '74.7', '[74.7,', '74.7]', '50.0', '[50.0,', '50.0]']
    assert lines[4].split() == ['METHOD', 'POOLING', 'AD', '↓', 'AG', '↑', 'AI', '↑', 'I', '↑']
    assert lines[5] == 'Grad-CAM  CA       12.5 [12.5, 12.5]  22.7 [22.7, 22.7]  48.6 [48.6, 48.6]  75.5 [75.5, 75.5]'
    assert lines[7].split() == ['METHOD', 'POOLING', 'D', '↓']
    assert lines[10].startswith('3 images')
    assert max(map(len, lines)) <= 100


def test_saved_files_hold_the_figures_the_settings_and_the_values_of_every_image(tmp_path) -> None:
    metrics = np.random.default_rng(6).uniform(0, 100, (3, 5))
    report = make_report(metrics, np.array([0.0, 100, 0, 100]), np.array([0, 0, 3]))
    report.save(tmp_path / 'new')
    assert sorted(path.name for path in (tmp_path / 'new').iterdir()) == [
        'evaluation.json',
        'images.csv',
        'table.csv',
        'values.npz',
    ]

    saved = json.loads((tmp_path / 'new' / 'evaluation.json').read_text())
    with open(tmp_path / 'new' / 'table.csv', newline='') as file:
        table = list(csv.DictReader(file))
    assert saved['settings'] == {'target': 'truth', 'seed': 0}
    assert saved['num_images'] == 4
    assert saved['accuracy'] == {'ca': 50}
    for row in (saved['rows'][0], table[0]):
        assert (row['network'], row['method'], row['pooling']) == ('tiny', 'grad_cam', 'ca')
        for k in METRICS:
            estimate = Estimate(*(float(row[f'{k}{end}']) for end in ('', '_low', '_high')))
            assert estimate == report['ca', 'grad_cam', k]

    lines = list(csv.reader(io.StringIO((tmp_path / 'new' / 'images.csv').read_text())))
    assert lines[0] == ['image', 'ca/accuracy', 'ca/class', 'ca/prob', *(f'ca/grad_cam/{k}' for k in METRICS)]
    assert [line[0] for line in lines[1:]] == ['0', '0', '10', '20', '30']
    assert [len(line) for line in lines[1:]] == [9, 9, 2, 2, 9]
    assert [float(value) for value in lines[5][4:]] == pytest.approx(metrics[2])


def make_pair(rng: np.random.Generator, num_images: int = 60) -> tuple[Report, dict[str, np.ndarray]]:
    """Both poolings, CA better by about 5 on one metric, with noise that the images share."""
    shared = rng.uniform(20, 80, num_images)
    gap = shared + rng.normal(0, 1, num_images)
    ca = shared + rng.normal(5, 1, num_images)
    number = np.arange(num_images)
    images, pairs = {'image': number}, {'image': number}
    for p, values in (('gap', gap), ('ca', ca)):
        images[f'{p}/accuracy'] = np.full(num_images, 100.0)
        pairs |= {f'{p}/class': 0 * number, f'{p}/prob': values / 100}
        pairs |= {f'{p}/grad_cam/{name}': values for name in ('average_gain', 'average_drop')}
    report = Report.from_values(
        'tiny',
        ('gap', 'ca'),
        ('grad_cam',),
        ('average_gain', 'average_drop'),
        ImageValues(images, pairs),
        0,
        {'target': 'truth'},
    )
    return report, {'gap': gap, 'ca': ca}


def test_a_difference_is_paired_by_image() -> None:
    stats = pytest.importorskip('scipy.stats')
    rng = np.random.default_rng(7)
    report, of = make_pair(rng)
    estimate = report.difference('grad_cam', 'average_gain')
    assert estimate.value == pytest.approx((of['ca'] - of['gap']).mean())
    low, high = stats.bootstrap(
        (of['ca'] - of['gap'],), np.mean, n_resamples=20000, method='percentile', rng=rng
    ).confidence_interval
    assert estimate[1:] == pytest.approx((low, high), abs=0.15 * (high - low))
    marginal = report['ca', 'grad_cam', 'average_gain']
    assert high - low < (marginal.high - marginal.low) / 5, 'the images share most of their spread'
    assert report.differences['confidence',].value == pytest.approx((of['ca'] - of['gap']).mean())
    assert report.confidence['ca'].value == pytest.approx(of['ca'].mean())


def test_the_verdict_follows_the_direction_of_the_metric_and_the_interval() -> None:
    report, _ = make_pair(np.random.default_rng(8))
    assert report.verdict('grad_cam', 'average_gain') == 'better'
    assert report.verdict('grad_cam', 'average_drop') == 'worse'
    assert report.summary() == 'CA against GAP, Grad-CAM: AG better, AD worse'
    same = dataclasses.replace(report, differences={('grad_cam', k): Estimate(1.0, -1.0, 3.0) for k in report.metrics})
    assert same.verdict('grad_cam', 'average_gain') == 'no difference seen'
    one = make_report(np.zeros((3, 5)), np.zeros(3))
    assert one.summary() == '' and not one.differences


def test_an_unknown_figure_is_refused_with_those_that_there_are() -> None:
    report, _ = make_pair(np.random.default_rng(8))
    contents = "poolings: 'gap', 'ca'; methods: 'grad_cam'; metrics: 'average_gain', 'average_drop'"
    with pytest.raises(KeyError) as error:
        report['gap', 'grad_cam', 'insertion']
    assert error.value.args == (f"there is no value ('gap', 'grad_cam', 'insertion'); {contents}",)
    with pytest.raises(KeyError) as error:
        report.difference('centre', 'average_drop')
    assert error.value.args == (f"there is no difference ('centre', 'average_drop'); {contents}",)
    with pytest.raises(KeyError, match='which needs both poolings'):
        make_report(np.zeros((3, 5)), np.zeros(3)).difference('grad_cam', 'insertion')


def test_differences_are_printed_and_saved(tmp_path) -> None:
    report, of = make_pair(np.random.default_rng(9))
    line = next(line for line in str(report).splitlines() if 'CA - GAP' in line and 'Grad-CAM' in line)
    assert '{:+.2f} [{:.2f}, {:.2f}]'.format(*report.difference('grad_cam', 'average_gain')) in line
    report.save(tmp_path)
    with open(tmp_path / 'table.csv', newline='') as file:
        rows = {row['pooling']: row for row in csv.DictReader(file)}
    assert float(rows['ca-gap']['average_gain']) == pytest.approx((of['ca'] - of['gap']).mean())
    assert float(rows['ca']['confidence']) == pytest.approx(of['ca'].mean())
    saved = json.loads((tmp_path / 'evaluation.json').read_text())
    assert saved['confidence']['gap'] == pytest.approx(of['gap'].mean())
    assert [row['pooling'] for row in saved['rows']] == ['gap', 'ca', 'ca-gap']


def test_unreadable_images_are_counted_in_print_and_json(tmp_path) -> None:
    report = dataclasses.replace(
        make_report(np.zeros((3, 5)), np.zeros(3)), unreadable={f'{i}.png': 'truncated' for i in range(5)}
    )
    assert str(report).splitlines()[-1] == ('5 images could not be read and are left out: 0.png, 1.png, 2.png, ...')
    assert report.to_dict()['unreadable'] == {f'{i}.png': 'truncated' for i in range(5)}


def test_box_metrics_leave_out_maps_without_a_box() -> None:
    number = np.arange(3)
    values = ImageValues(
        {'image': number, 'gap/accuracy': np.zeros(3)},
        {
            'image': number,
            'gap/class': 0 * number,
            'gap/prob': np.full(3, 0.5),
            'gap/has_box': np.array([True, False, True]),
            'gap/a/pointing_game': np.array([100, np.nan, 0]),
            'gap/a/energy_pointing_game': np.array([3, np.nan, 5]),
        },
    )
    report = Report.from_values(
        'tiny', ('gap',), ('a',), ('pointing_game', 'energy_pointing_game'), values, 0, {'target': 'truth'}
    )
    assert report['gap', 'a', 'pointing_game'].value == 50
    assert report['gap', 'a', 'energy_pointing_game'].value == 4


def test_box_metrics_of_both_poolings_have_the_same_images() -> None:
    """GAP and CA explain their own predictions, and only images 0 and 3 have boxes of both."""
    nan = np.nan
    gap, ca = np.array([10.0, 20, nan, 40, nan]), np.array([15.0, nan, 35, 55, nan])
    number = np.arange(5)
    images, pairs = {'image': number}, {'image': number}
    for p, energy in (('gap', gap), ('ca', ca)):
        images[f'{p}/accuracy'] = np.full(5, 100.0)
        pairs |= {f'{p}/class': 0 * number, f'{p}/prob': np.full(5, 0.5), f'{p}/has_box': ~np.isnan(energy)}
        pairs |= {f'{p}/a/energy_pointing_game': energy, f'{p}/a/average_gain': np.arange(5.0)}
    values = ImageValues(images, pairs)
    metrics = ('energy_pointing_game', 'average_gain')
    report = Report.from_values('tiny', ('gap', 'ca'), ('a',), metrics, values, 0, {'target': 'predicted'})
    assert report['gap', 'a', 'energy_pointing_game'].value == (10 + 40) / 2
    assert report['ca', 'a', 'energy_pointing_game'].value == (15 + 55) / 2
    value, low, high = report.difference('a', 'energy_pointing_game')
    assert value == (5 + 15) / 2 and 5 <= low <= high <= 15
    assert report['ca', 'a', 'average_gain'].value == 2
    assert report.num_boxed == 2
    assert 'Localisation: 2 of 5 maps have a box under both poolings' in str(report)


def hits_of(num_pairs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((num_pairs, 768)) < 0.3


def test_hits_are_kept_in_a_file_of_their_own_and_give_the_metric(tmp_path) -> None:
    hits, has_box = hits_of(4), np.array([True, True, False, True])
    number = np.arange(4)
    values = ImageValues(
        {'image': number, 'gap/accuracy': np.zeros(4)},
        {
            'image': number,
            'gap/class': number,
            'gap/prob': np.full(4, 0.5),
            'gap/has_box': has_box,
            'gap/a/max_box_acc_v2': hits,
        },
    )
    report = Report.from_values('tiny', ('gap',), ('a',), ('max_box_acc_v2',), values, 0, {'target': 'truth'})
    shares = hits[has_box].mean(0).reshape(3, 256)
    assert report['gap', 'a', 'max_box_acc_v2'].value == pytest.approx(100 * shares.max(1).mean())
    report.save(tmp_path)
    assert (tmp_path / 'images.csv').read_text().splitlines()[0] == 'image,gap/accuracy,gap/class,gap/prob'
    with np.load(tmp_path / 'values.npz') as saved:
        np.testing.assert_array_equal(saved['pairs/gap/a/max_box_acc_v2'], hits)
        np.testing.assert_array_equal(saved['pairs/gap/has_box'], has_box)
