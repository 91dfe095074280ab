from __future__ import annotations

import csv
import io
import re

import numpy as np
import pytest

from timm_castream import cli
from timm_castream.evaluation import tables
from timm_castream.evaluation.plots import draw_differences
from timm_castream.evaluation.report import ImageValues, Report
from timm_castream.evaluation.tables import cell, compared, figures, to_text

METRICS = ('average_drop', 'average_gain')
COUNT = 200


@pytest.fixture
def report():
    """Four methods: `a` beats the baseline `random` in AD and loses to it in AG, `b` is `a` again, `c` is like `a`."""
    rng = np.random.default_rng(0)
    number = np.arange(COUNT)
    base = {k: rng.uniform(20, 60, COUNT) for k in METRICS}
    drops = {'a': -9, 'b': -9, 'c': -9, 'random': 0}
    pairs = {'image': number}
    for pooling in ('gap', 'ca'):
        pairs |= {f'{pooling}/class': number % 5, f'{pooling}/prob': rng.uniform(size=COUNT)}
        noise = {name: rng.normal(0, 2, (2, COUNT)) for name in drops}
        noise['b'] = noise['a']
        for name, drop in drops.items():
            gain = 6 if name == 'random' else 0
            pairs[f'{pooling}/{name}/average_drop'] = base['average_drop'] + drop + noise[name][0]
            pairs[f'{pooling}/{name}/average_gain'] = base['average_gain'] + gain + noise[name][1]
    images = {'image': number, 'gap/accuracy': np.full(COUNT, 100.0), 'ca/accuracy': np.zeros(COUNT)}
    return Report.from_values(
        'tiny',
        ('gap', 'ca'),
        tuple(drops),
        METRICS,
        ImageValues(images, pairs),
        3,
        {'target': 'truth', 'seed': 3},
        files={i: f'{i}.png' for i in range(COUNT)},
        label_names=list('vwxyz'),
        pooling_names={'gap': 'GAP', 'ca': 'CA'},
    )


def test_methods_are_compared_by_image_with_the_interval_of_the_mean_difference(report):
    compared = report.compare('a', 'random')
    assert set(compared) == {(p, k) for p in ('gap', 'ca') for k in METRICS}
    values = report.values.pairs
    for (pooling, metric), (value, low, high) in compared.items():
        difference = values[f'{pooling}/a/{metric}'] - values[f'{pooling}/random/{metric}']
        reach = 1.96 * difference.std(ddof=1) / COUNT**0.5
        assert value == pytest.approx(difference.mean())
        assert (value - low, high - value) == pytest.approx((reach, reach), rel=0.2)
    with pytest.raises(KeyError, match="'nope'"):
        report.compare('a', 'nope')


def test_the_best_of_a_column_is_marked_where_the_second_is_beyond_its_interval(report):
    assert report.best('gap', 'average_gain') == 'random'
    assert report.best('gap', 'average_drop') is None  # a, b and c cannot be told apart
    marked = [line for line in str(report).splitlines() if line.endswith(' *')]
    assert [line.split()[:2] for line in marked] == [['Random', 'GAP'], ['Random', 'CA']]
    assert re.search(r'\| Random \| GAP \| [^*]+ \| \*\*[^*]+\*\* \|', report.to_markdown())
    assert report.to_latex().count(r'\mathbf') == 2


def test_a_method_that_is_worse_than_a_baseline_and_equal_methods_are_named(report):
    text = ' '.join(str(report).split())
    assert text.count('baseline') == 1  # one sentence for all that the same baseline beats in the same metrics
    assert 'Worse than the baseline Random in AG under GAP and CA: all 3 other methods' in text
    assert 'a and b have the same values under GAP' in text and 'a, b and c' not in text
    assert '24 pairs of methods' in text  # 6 pairs, 2 metrics, 2 poolings


def renamed(report, names):
    """The report with other names of its methods."""
    pairs = {
        re.sub('/(a|b|c|random)/', lambda found: f'/{names[found[1]]}/', name): value
        for name, value in report.values.pairs.items()
    }
    values = ImageValues(report.values.images, pairs)
    return Report.from_values('tiny', report.poolings, tuple(names.values()), METRICS, values, 0, {})


@pytest.mark.parametrize('length', [24, 63, 120])
def test_no_line_is_wider_than_100_columns_whatever_the_names(report, length):
    names = {name: f'captum:A_{i}'.ljust(length - 1, 'x') + str(i) for i, name in enumerate(report.methods)}
    other = renamed(report, names)
    text = to_text(other)
    assert max(map(len, text.splitlines())) <= 100
    assert max(map(len, compared(other, *list(names.values())[:2]).splitlines())) <= 100
    rows = {line.partition('  CA  ')[0] for line in text.splitlines() if '  CA  ' in line}
    assert len(rows) == 4 and all(name in ''.join(text.split()) for name in names.values())
    assert ('AD ↓' in text.splitlines()[6]) and ('AG ↑' in text.splitlines()[6])
    assert max(map(len, str(report).splitlines())) <= 100


def test_names_with_letters_of_latex_and_markdown_stay_text(report):
    other = renamed(report, {'a': '[a]', 'b': '*b|c', 'c': '100 %_^~', 'random': r'<\x>'})
    rows = [line.partition(' & ')[0] for line in other.to_latex().splitlines() if ' & GAP & ' in line]
    assert rows == [
        '{[}a]',
        r'{*}b\textbar{}c',
        r'100 \%\_\textasciicircum{}\textasciitilde{}',
        r'\textless{}\textbackslash{}x\textgreater{}',
    ]
    assert {len(re.split(r'(?<!\\)\|', line)) for line in other.to_markdown().splitlines()} == {6}


def test_methods_that_the_same_baselines_beat_in_the_same_metrics_share_a_sentence(report):
    pairs = dict(report.values.pairs)
    for name in [name for name in pairs if '/random/' in name]:  # `centre` is like `random`, but bad in AG under CA
        pairs[name.replace('random', 'centre')] = pairs[name] - (100 if name.startswith('ca') else 0)
    for metric in METRICS:
        pairs[f'gap/c/{metric}'] = pairs[f'gap/c/{metric}'] + (100 if metric == 'average_drop' else 0)
    methods = (*report.methods, 'centre')
    other = Report.from_values('t', report.poolings, methods, METRICS, ImageValues(report.values.images, pairs), 0, {})
    assert [note for note in tables.baseline_notes(other)] == [
        'Worse than the baselines Random and Centre in AD under GAP: c',
        'Worse than the baselines Random and Centre in AG under GAP: all 3 other methods',
        'Worse than the baseline Centre in AD under CA: all 3 other methods',
        'Worse than the baseline Random in AG under CA: all 3 other methods',
    ]
    one = Report.from_values('t', ('gap',), methods, METRICS, ImageValues(report.values.images, pairs), 0, {})
    assert 'Worse than the baselines Random and Centre in AD: c' in tables.baseline_notes(one)


def of_first(report, count):
    """The report of the first images."""
    images, pairs = (
        {k: v[:count] for k, v in values.items()} for values in (report.values.images, report.values.pairs)
    )
    return Report.from_values(
        't', report.poolings, report.methods, METRICS, ImageValues(images, pairs), 0, {'seed': 0, 'target': 'truth'}
    )


def test_one_image_has_no_interval_and_no_verdict(report, tmp_path):
    """Its resamples are all equal: each difference would look certain."""
    one = of_first(report, 1)
    assert one['gap', 'a', 'average_drop'].value == report.values.pairs['gap/a/average_drop'][0]
    assert np.isnan([estimate[1:] for estimate in (*one.figures.values(), *one.compare('a', 'random').values())]).all()
    text = one.summary() + str(one) + one.to_markdown() + one.to_latex() + compared(one, 'a', 'random')
    assert not re.search(r'nan|better[^,]|worse|Worse| \*$|\*\*|mathbf|scriptsize|\[\d', text)
    assert 'with no intervals' in ' '.join(str(one).split()) and 'One image says nothing about others' in str(one)
    assert str(one['gap', 'a', 'average_drop']) == f'{one["gap", "a", "average_drop"].value:.2f}'
    assert compared(one, 'a', 'random').endswith('one image has no interval')
    one.save(tmp_path)
    assert str(Report.load(tmp_path)) == str(one)
    assert draw_differences(one)


def test_few_images_are_told(report):
    assert '4 images are few: by chance alone an interval of a difference excludes 0 in one case of 8' in str(
        of_first(report, 4)
    )
    assert 'are few' not in str(of_first(report, 6))


def test_methods_whose_hits_agree_are_not_called_equal(report):
    """Values of 0 and 100 alone, as those of Average Increase, say little about the maps."""
    pairs = {**report.values.pairs}
    hits = 100.0 * (np.arange(COUNT) % 2)
    for name in pairs:
        if name.endswith('/average_gain'):
            pairs[name] = hits
    values = ImageValues(report.values.images, pairs)
    other = Report.from_values('tiny', report.poolings, report.methods, ('average_gain',), values, 0, {})
    assert 'have the same values' not in str(other)


def test_methods_that_differ_more_than_images_do_are_not_called_equal(report):
    """Of a network that was not trained, all values are nearly the same: the best was marked and called equal too."""
    pairs = {name: 49.3 + value / 3000 if '/average' in name else value for name, value in report.values.pairs.items()}
    values = ImageValues(report.values.images, pairs)
    other = str(Report.from_values('t', report.poolings, report.methods, METRICS, values, 0, {}))
    assert other.count('have the same values') == 2 and 'a and b have the same values under GAP' in other


def test_a_function_that_is_explained_is_called_by_its_name(report):
    report.settings['target'] = 'package.module.outer.<locals>.similarity 402ffdcc0518b922'
    text = ' '.join(str(report).split())
    assert '200 images, function: similarity; in percent' in text and 'probability: mean of its values' in text
    report.settings['target'] = 'predicted'
    assert '200 images, class: predicted; in percent' in str(report)


@pytest.mark.parametrize(
    ('value', 'text'),
    [(35.44, '35.4'), (5.544, '5.54'), (99.96, '100'), (9.996, '10.0'), (-0.001, '0.00'), (1027.2, '1027')],
)
def test_values_have_three_figures(value, text):
    assert figures(value) == text


def test_a_cell_without_a_value_is_a_dash(report):
    nan = float('nan')
    assert cell(report['gap', 'a', 'average_drop']._replace(value=nan, low=nan, high=nan)) == '-'


def test_latex_has_a_row_a_method_and_pooling_with_the_printed_values(report):
    rows = [line for line in report.to_latex(intervals=False).splitlines() if line.endswith(r'\\')]
    assert len(rows) == 1 + 4 * 3
    value = report['gap', 'a', 'average_drop'].value
    assert rows[1] == rf'a & GAP & ${value:.1f}$ & ${report["gap", "a", "average_gain"].value:.1f}$ \\'
    assert 'scriptsize' in report.to_latex() and 'scriptsize' not in report.to_latex(intervals=False)


def test_the_data_frame_has_the_values_of_the_report(report):
    frame = report.to_dataframe()
    assert frame.loc[('a', 'ca'), ('average_gain', 'low')] == report['ca', 'a', 'average_gain'].low
    assert frame.loc[('a', 'ca-gap'), ('average_gain', 'value')] == report.difference('a', 'average_gain').value


def test_a_saved_report_is_loaded_whole_and_printed_by_the_command(report, tmp_path, capsys):
    report.save(tmp_path)
    loaded = Report.load(tmp_path)
    assert str(loaded) == str(report) and loaded.to_dict() == report.to_dict()
    one, two = io.StringIO(), io.StringIO()
    report.values.write_csv(one, report.files, report.label_names)
    loaded.values.write_csv(two, loaded.files, loaded.label_names)
    assert one.getvalue() == two.getvalue() and next(csv.reader(io.StringIO(one.getvalue())))[1] == 'file'
    for kind, table in (('markdown', report.to_markdown()), ('latex', report.to_latex())):
        assert cli.main(['report', str(tmp_path), '--format', kind, '--plot']) == 0
        printed = capsys.readouterr()
        assert printed.out == table + '\n'  # it may be sent to a file
        assert 'Worse than the baseline Random' in printed.err and 'differences.pdf' in printed.err
    assert cli.main(['report', str(tmp_path), '--compare', 'a', 'random', '--plot']) == 0
    assert 'better' in capsys.readouterr().out
    begins = {path.suffix: path.read_bytes()[:5] for path in tmp_path.glob('differences.*')}
    assert begins == {'.png': b'\x89PNG\r', '.pdf': b'%PDF-', '.svg': b'<?xml'}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda folder: None,
            'no finished evaluation: evaluation.json is missing, which castream evaluate writes at its end.',
        ),
        (lambda folder: (folder / 'settings.json').write_text('{}'), 'and the same castream evaluate resumes the one'),
        (lambda folder: (folder / 'evaluation.json').write_text('{'), 'evaluation.json or values.npz is damaged (JSON'),
    ],
)
def test_a_folder_without_an_evaluation_is_refused(tmp_path, capsys, change, message):
    change(tmp_path)
    assert cli.main(['report', str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error and message in error and error.count('\n') == 1


@pytest.mark.parametrize('kept', [0, 100])
def test_damaged_values_are_refused(report, tmp_path, kept):
    report.save(tmp_path)
    path = tmp_path / 'values.npz'
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r'values\.npz is damaged'):
        Report.load(tmp_path)


def test_a_report_that_has_nothing_to_draw_says_so(report, tmp_path, capsys, caplog):
    values = report.values
    one = Report.from_values('t', ('gap',), report.methods, METRICS, values, 0, {'seed': 0, 'target': 'truth'})
    one.save(tmp_path)
    assert cli.main(['report', str(tmp_path), '--plot']) == 0
    assert 'There is nothing to draw' in caplog.text and 'Written to' not in capsys.readouterr().out


def test_the_labels_of_a_fit_without_labels_are_called_predictions(report):
    report.settings['labels'] = 'predicted'
    assert "class: GAP's prediction" in str(report) and 'the agreement' in str(report)


@pytest.mark.parametrize('names', [['a', 'nope'], ['a', 'a']], ids=' '.join)
def test_the_command_refuses_methods_that_it_cannot_compare(report, tmp_path, capsys, names):
    report.save(tmp_path)
    assert cli.main(['report', str(tmp_path), '--compare', *names]) == 2
    assert repr(names[1]) in capsys.readouterr().err
