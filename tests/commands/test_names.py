"""The names that help texts show are those of the tables, and the command line shows them without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from timm_castream.attach import POOLINGS
from timm_castream.attribution.methods import DEFAULT_METHODS, METHODS
from timm_castream.commands import COMMANDS
from timm_castream.commands.names import names, rows
from timm_castream.evaluation.plan import TARGETS
from timm_castream.fitting.settings import LABELS
from timm_castream.inference.engine import ENGINES
from timm_castream.metrics.curves import CURVE_SETTINGS
from timm_castream.metrics.table import METRICS


def test_the_names_are_those_of_the_tables():
    assert rows('attribution/methods', 'Method') == tuple(METHODS)
    assert rows('metrics/table', 'MetricRow') == tuple(METRICS)
    assert names('attach', 'POOLINGS') == POOLINGS
    assert names('evaluation/plan', 'TARGETS') == TARGETS
    assert names('fitting/settings', 'LABELS') == LABELS
    assert names('inference/engine', 'ENGINES') == ENGINES
    assert names('metrics/curves', 'CURVE_SETTINGS') == tuple(CURVE_SETTINGS)


def test_the_default_methods_of_the_command_are_those_of_evaluate():
    import argparse

    from timm_castream.commands import evaluate

    parser = argparse.ArgumentParser()
    evaluate.add_options(parser)
    assert parser.parse_args(['--model', 'resnet18']).default_methods == DEFAULT_METHODS


def test_a_variable_that_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match='NOTHING'):
        names('attach', 'NOTHING')


OWN = [name for name in COMMANDS if name not in ('train', 'validate')]


@pytest.mark.parametrize(
    'words',
    [['--help'], ['--version'], ['evaluate', '--metrics', 'nope', '--model', 'x'], *([name, '--help'] for name in OWN)],
    ids=' '.join,
)
def test_help_and_wrong_options_need_no_torch(words):
    code = (
        'import sys\n'
        'from timm_castream import cli\n'
        'try: cli.main(sys.argv[1:])\n'
        'except SystemExit: pass\n'
        'sys.exit("torch" in sys.modules or "timm" in sys.modules)'
    )
    done = subprocess.run([sys.executable, '-c', code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'castream' in done.stdout + done.stderr
