from __future__ import annotations

import csv
import gzip
import statistics as python_statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks.evidence import __main__ as program
from benchmarks.evidence import pieces
from benchmarks.evidence.choice import take
from benchmarks.evidence.page import MARKS, render, wrap
from benchmarks.evidence.results import Difference, Results, Table, compare
from benchmarks.evidence.setup import Setup, ranks_in_class
from timm_castream.evaluation.bootstrap import Estimate

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / 'benchmarks' / 'evidence_results'
SETTINGS = ROOT / 'benchmarks' / 'evidence' / 'settings.yaml'
PAGE = ROOT / 'docs' / 'evidence.md'
MASKED = {'AD ↓': 'average_drop', 'AG ↑': 'average_gain', 'AI ↑': 'average_increase'}
CURVES = {'I ↑': 'insertion', 'D ↓': 'deletion'}


def test_a_difference_is_paired_by_image_and_its_interval_is_that_of_the_mean_difference():
    rng = np.random.default_rng(1)
    gap = rng.uniform(0, 100, 400)
    ca = gap + rng.normal(2, 5, 400)  # unpaired, the spread of the images would hide the difference
    table = Table({'accuracy': gap}, {'gap_start': {0: {'accuracy': ca}, 1: {'accuracy': ca + 1}}})
    first, second = table.difference('accuracy').seeds
    assert (first.value, second.value) == pytest.approx(((ca - gap).mean(), (ca - gap).mean() + 1))
    error = (ca - gap).std(ddof=1) / 20
    assert first.low == pytest.approx((ca - gap).mean() - 1.96 * error, abs=0.1 * error * 1.96)
    assert first.high == pytest.approx((ca - gap).mean() + 1.96 * error, abs=0.1 * error * 1.96)
    total = table.difference('accuracy').total
    assert total == pytest.approx(((ca - gap).mean() + 0.5, first.low, second.high))


def test_images_without_a_value_are_left_out_of_a_difference():
    difference = compare([np.array([1.0, np.nan, np.nan, 1.0])])
    assert difference.total == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ('intervals', 'higher_is_better', 'verdict'),
    [
        (((1.0, 2.0), (0.5, 2.0)), True, 'better'),
        (((1.0, 2.0), (0.5, 2.0)), False, 'worse'),
        (((-2.0, -1.0), (-2.0, -0.1)), False, 'better'),
        (((-2.0, -1.0), (-2.0, -0.1)), True, 'worse'),
        (((1.0, 2.0), (-0.1, 2.0)), True, 'no difference seen'),  # one seed's interval has 0
        (((-2.0, -1.0), (1.0, 2.0)), True, 'no difference seen'),  # the seeds are on two sides
        (((1.0, 2.0), (1.0, 2.0)), None, 'higher'),
        (((-2.0, -1.0), (-2.0, -1.0)), None, 'lower'),
    ],
)
def test_a_claim_needs_the_interval_of_every_seed_on_one_side_of_zero(intervals, higher_is_better, verdict):
    seeds = tuple(Estimate((low + high) / 2, low, high) for low, high in intervals)
    assert Difference(seeds, higher_is_better).verdict == verdict


def test_the_setting_with_the_best_saliency_among_the_accurate_ones_is_taken():
    tried = [
        {'recipe': {'epochs': 4, 'lr': 1}, 'accuracy': 65.0, 'AD': 10.0, 'AG': 5.0, 'AI': 20.0},
        {'recipe': {'epochs': 8, 'lr': 2}, 'accuracy': 64.0, 'AD': 9.0, 'AG': 6.0, 'AI': 21.0},
        {'recipe': {'epochs': 2, 'lr': 3}, 'accuracy': 50.0, 'AD': 1.0, 'AG': 50.0, 'AI': 90.0},
    ]

    def rate(least_accuracy: float, score_margin: float) -> int:
        return take(tried, least_accuracy, score_margin)['lr']

    assert rate(63.5, 2.9) == 2
    assert rate(63.5, 3.1) == 1  # the scores 15 and 18 count as equal, so fewer epochs win
    assert rate(64.5, 0.0) == 1
    assert rate(66.0, 0.0) == 1  # none is accurate enough


def test_no_line_of_a_paragraph_begins_a_list():
    text = wrap('CA - GAP ' * 40, 30)
    assert ' '.join(text.split()) == ' '.join(['CA - GAP'] * 40)
    assert all(line.startswith('CA - GAP') and len(line) <= 30 for line in text.splitlines())


def test_the_gain_of_a_baseline_map_is_taken_off_image_by_image():
    def values(column, *numbers):
        return {'image': np.arange(len(numbers)), column: np.array(numbers)}

    cam, baseline = 'grad_cam/average_gain', 'random/average_gain'
    runs = {0: values(cam, 5.0, 7.0, 9.0), 4: values(cam, 0.0, 0.0, 0.0)}
    main = Table(values(cam, 1.0, 2.0, 9.0), {'gap_start': runs})
    attention = Table(values(baseline, 1.0, 1.0), {'gap_start': {0: values(baseline, 2.0, 4.0)}})
    (left,) = main.excess(attention, 'random', 'average_gain').seeds
    assert left.value == ((5 - 1) - (2 - 1) + (7 - 2) - (4 - 1)) / 2


def test_images_are_numbered_in_their_class():
    assert ranks_in_class(torch.tensor([2, 0, 2, 2, 0])).tolist() == [0, 0, 1, 2, 1]


def test_the_parts_of_a_folder_of_classes_share_no_image(tmp_path):
    for split in ('train', 'val'):
        for name in ('b', 'a'):
            for i in (10, 9, 8):
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                Image.new('RGB', (8, 8)).save(tmp_path / split / name / f'{i}.png')
    settings = {'train_per_class': 1, 'select_per_class': 1, 'val_images': 4}
    setup = Setup(settings, tmp_path, tmp_path / 'work', tmp_path / 'results')
    assert setup.classes == ['a', 'b']
    files = {
        part: [setup.datasets['val' if part == 'val' else 'train'].filename(i) for i in setup.indices(part).tolist()]
        for part in ('train', 'selection', 'val')
    }
    assert files == {
        'train': ['a/8.png', 'b/8.png'],
        'selection': ['a/9.png', 'b/9.png'],
        'val': ['a/8.png', 'a/9.png', 'a/10.png', 'b/8.png'],
    }
    assert setup.labels('selection').tolist() == [0, 1]


def test_a_folder_without_splits_is_refused(tmp_path):
    with pytest.raises(SystemExit, match='no folders train and val'):
        program.main(['--data-dir', str(tmp_path)])


@pytest.mark.slow
def test_a_quick_run_that_is_killed_ends_with_the_values_of_one_that_is_not(tmp_path, monkeypatch):
    program.main(['--quick', '--work-dir', str(tmp_path / 'whole')])
    page = (tmp_path / 'whole' / 'evidence.md').read_text(encoding='utf-8')
    assert 'Not run' not in page and '| not run |' not in page
    for picture in ('evidence_differences.png', 'evidence_growth.png', 'evidence_strip.jpg'):
        assert Image.open(tmp_path / 'whole' / picture).width > 300

    batches = []
    evaluate = pieces.evaluate

    def killed(*args, **kwargs):
        if len(batches) == 4:
            raise KeyboardInterrupt
        batches.append(args)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(pieces, 'evaluate', killed)
        program.main(['--quick', '--work-dir', str(tmp_path / 'killed')])
    program.main(['--quick', '--work-dir', str(tmp_path / 'killed')])
    names = sorted(path.name for path in (tmp_path / 'whole' / 'results' / 'pieces').iterdir())
    assert names == sorted(path.name for path in (tmp_path / 'killed' / 'results' / 'pieces').iterdir())
    for name in names:
        if name.endswith('.csv.gz'):
            one, other = ((tmp_path / run / 'results' / 'pieces' / name).read_bytes() for run in ('whole', 'killed'))
            assert one == other, name


@pytest.fixture(scope='module')
def results():
    return Results(RESULTS, yaml.safe_load(SETTINGS.read_text(encoding='utf-8')))


def test_the_page_is_made_from_the_committed_values(results):
    assert PAGE.read_text(encoding='utf-8') == render('page.md.j2', results) + '\n'


def test_the_readme_shows_the_figures_of_the_page(results):
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    if MARKS[0] in text:
        table = text.partition(MARKS[0])[2].partition(MARKS[1])[0].strip()
        assert table == render('readme.md.j2', results)


def test_the_opening_of_the_readme_has_the_figures_of_its_table():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    opening = ' '.join(text.partition('**Why a stream?**')[2].partition('\n\n')[0].split())
    shown = {cells[1].strip(): cells[4].split()[0] for line in text.splitlines() if len(cells := line.split('|')) == 9}
    for figure, sentence in (
        ('Grad-CAM, AG ↑', "Grad-CAM's Average Gain rises by {} points"),
        ('accuracy ↑', '{} points of accuracy there'),
        ('Grad-CAM, D ↓', 'a Deletion worse by {} points'),
    ):
        assert sentence.format(shown[figure].lstrip('+-')) in opening


def column(piece: str, name: str) -> list[float]:
    """The committed values of every image, read without the program."""
    with gzip.open(RESULTS / 'pieces' / f'{piece}.csv.gz', 'rt') as file:
        rows = {int(row['image']): float(row[name]) for row in csv.DictReader(file)}
    return [rows[image] for image in sorted(rows)]


def rows_of(section: str) -> list[list[str]]:
    """The cells of every line of the tables under a title of the page."""
    text = PAGE.read_text(encoding='utf-8').partition(f'## {section}')[2].partition('\n## ')[0]
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith('| ')]


def check_difference(cell: str, gap: list[float], runs: list[list[float]]) -> None:
    """A cell `+7.1 [6.0, 8.2]` against the mean of paired differences and the normal intervals of the seeds."""
    value, low, high = map(float, cell.strip('*').replace('[', '').replace(']', '').replace(',', '').split())
    seeds = [[after - before for before, after in zip(gap, run, strict=True)] for run in runs]
    means = [python_statistics.fmean(seed) for seed in seeds]
    reaches = [1.96 * python_statistics.stdev(seed) / len(seed) ** 0.5 for seed in seeds]
    assert value == pytest.approx(python_statistics.fmean(means), abs=0.051)
    # The page's intervals are bootstrapped; those of a mean of many images are nearly normal.
    tolerance = max(0.1, 2 / len(gap) ** 0.5) * max(reaches) + 0.06
    assert low == pytest.approx(min(m - r for m, r in zip(means, reaches, strict=True)), abs=tolerance)
    assert high == pytest.approx(max(m + r for m, r in zip(means, reaches, strict=True)), abs=tolerance)


def pieces_of(table: str, stream: str = 'gap_start') -> list[str]:
    """Names of a stream's committed pieces, one a seed."""
    paths = (RESULTS / 'pieces').glob(f'{table}-{stream}-*.csv.gz')
    return sorted(path.name.removesuffix('.csv.gz') for path in paths)


@pytest.mark.parametrize('table', ['main', 'curves', 'score_cam'])
def test_the_main_table_has_the_differences_of_the_committed_values(table):
    methods = (
        {'Grad-CAM': 'grad_cam', 'Grad-CAM++': 'grad_cam_pp'} if table != 'score_cam' else {'Score-CAM': 'score_cam'}
    )
    metrics = {'main': MASKED, 'curves': CURVES, 'score_cam': MASKED | CURVES}[table]
    rows = [row for row in rows_of('Main table') if row[0] in methods and row[1] in metrics]
    assert len(rows) == len(methods) * len(metrics)
    for row in rows:
        name = f'{methods[row[0]]}/{metrics[row[1]]}'
        gap, runs = column(f'{table}-gap', name), [column(piece, name) for piece in pieces_of(table)]
        assert float(row[2]) == pytest.approx(python_statistics.fmean(gap), abs=0.051)
        assert float(row[3]) == pytest.approx(python_statistics.fmean(map(python_statistics.fmean, runs)), abs=0.051)
        check_difference(row[4], gap, runs)
        assert [int(cell) for cell in row[6:8]] == [len(runs), len(gap)]


@pytest.mark.parametrize(
    ('section', 'table', 'title', 'stream'),
    [
        ('How the stream starts', 'initialisation', "S_0 - S_4, `'paper'` start", 'paper_start'),
        *[("The paper's tables", 'placement', f'S_{i} - S_4', f's{i}') for i in range(1, 5)],
        ("The paper's tables", 'block', 'PROJ -> CA', 'proj_ca'),
        ("The paper's tables", 'class_specific', 'class specific', 'class_specific'),
        ("The product's own way", 'product', '`castream train -c own_data.yaml`', 'gap_start'),
    ],
)
def test_tables_of_other_streams_have_the_differences_of_the_committed_values(section, table, title, stream):
    (row,) = [row for row in rows_of(section) if row[0] == title and '[' in row[2]]
    names = ['accuracy', *(f'grad_cam/{metric}' for metric in MASKED.values())]
    for cell, name in zip(row[2:6], names, strict=True):
        check_difference(cell, column('main-gap', name), [column(piece, name) for piece in pieces_of(table, stream)])
    assert int(row[6]) == len(pieces_of(table, stream))


def test_temperatures_and_baselines_have_the_differences_of_the_committed_values():
    fitted = {row[1]: row for row in rows_of('With fitted temperatures') if row[0] == 'Grad-CAM'}
    baselines = {row[0]: row[1:] for row in rows_of('The maps, or the network?')}
    for i, (title, metric) in enumerate(MASKED.items()):
        name = f'grad_cam/{metric}'
        check_difference(
            fitted[title][4], column('temperatures-gap', name), [column(p, name) for p in pieces_of('temperatures')]
        )
        for other in ('random', 'centre'):
            gap = column('attention-gap', f'{other}/{metric}')
            runs = [column(piece, f'{other}/{metric}') for piece in pieces_of('attention')]
            check_difference(baselines[f'{other}, CA - GAP'][i], gap, runs)
            mains = [column(piece, name) for piece in pieces_of('main')]
            check_difference(
                baselines[f"Grad-CAM's CA - GAP minus that of {other}"][i],
                [a - b for a, b in zip(column('main-gap', name), gap, strict=True)],
                [[a - b for a, b in zip(main, run, strict=True)] for main, run in zip(mains, runs, strict=True)],
            )


def test_probabilities_and_metrics_of_the_committed_values_agree():
    for path in (RESULTS / 'pieces').glob('*.csv.gz'):
        with gzip.open(path, 'rt') as file:
            for row in csv.DictReader(file):
                assert 0 <= float(row['prob']) <= 1
                if 'grad_cam/average_drop' in row:
                    drop, gain, increase = (float(row[f'grad_cam/average_{m}']) for m in ('drop', 'gain', 'increase'))
                    assert min(drop, gain) == 0
                    assert (increase == 100) == (gain > 0)


def test_the_committed_results_take_at_most_five_megabytes():
    assert sum(path.stat().st_size for path in RESULTS.rglob('*') if path.is_file()) < 5_000_000
