"""The files around the package agree with each other: workflows, Makefile, versions, changelog."""

from __future__ import annotations

import configparser
import re
import subprocess
from fnmatch import fnmatch
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

import timm_castream

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / '.github' / 'workflows').glob('*.yml'))
MAKEFILE = (ROOT / 'Makefile').read_text()
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / 'setup.cfg')


def steps(workflow: Path) -> list[dict[str, object]]:
    jobs = yaml.safe_load(workflow.read_text())['jobs']
    return [step for job in jobs.values() for step in job['steps']]


def tracked_files() -> list[Path]:
    listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('the tests run outside a git checkout')
    return [ROOT / name for name in listed.stdout.splitlines()]


def targets() -> set[str]:
    return set(re.findall(r'^([a-z][a-z-]*):', MAKEFILE, re.MULTILINE))


def lower_bounds(text: str) -> dict[str, str]:
    return dict(re.findall(r'^([\w.-]+)>=([\d.]+)', text, re.MULTILINE))


@pytest.mark.parametrize(
    'name', ['.ci/run', 'README.md', 'CONTRIBUTING.md', 'benchmarks/README.md', '.pre-commit-config.yaml']
)
def test_make_targets_named_elsewhere_exist(name):
    named = re.findall(r'(?:^|`|entry: )make ([a-z-]+)', (ROOT / name).read_text(), re.MULTILINE)
    assert set(named) <= targets()
    assert set(re.findall(r'^\.PHONY: (.*)$', MAKEFILE, re.MULTILINE)[0].split()) == targets()


def test_make_targets_that_the_workflows_run_exist():
    commands = [str(step.get('run', '')) for path in WORKFLOWS for step in steps(path)]
    used = {target for command in commands for target in re.findall(r'^make ([a-z-]+)', command, re.MULTILINE)}
    assert used and used <= targets()


def test_ci_runs_every_check_that_the_workflow_of_a_pull_request_runs():
    in_workflow = {str(step['run']).strip() for step in steps(ROOT / '.github/workflows/ci.yml') if 'run' in step}
    in_ci = set(re.findall(r'^make [a-z-]+', (ROOT / '.ci/run').read_text(), re.MULTILINE))
    assert in_workflow <= in_ci


def test_actions_are_pinned_by_commit():
    for path in WORKFLOWS:
        for step in steps(path):
            if 'uses' in step:
                assert re.fullmatch(r'[\w./-]+@[0-9a-f]{40}', str(step['uses'])), step


def test_extras_that_the_makefile_installs_exist():
    extras = set(re.findall(r'\$\(VENV\)/(\w+)\.installed', MAKEFILE))
    assert extras and extras <= set(SETUP['options.extras_require'])


def test_the_oldest_constraints_are_the_lower_bounds_of_setup_cfg():
    bounds = lower_bounds(SETUP['options']['install_requires'])
    for extra in ('eval', 'demo'):
        bounds |= lower_bounds(SETUP['options.extras_require'][extra])
    pins = dict(re.findall(r'^([\w-]+)==([\d.]+)', (ROOT / '.github/constraints/oldest.txt').read_text(), re.MULTILINE))

    def numbers(version: str) -> list[int]:
        return [int(part) for part in (version + '.0.0').split('.')[:3]]

    assert bounds
    for name, bound in bounds.items():
        assert numbers(pins[name]) == numbers(bound), name


def test_every_file_of_a_package_is_in_the_wheel():
    data = SETUP['options.package_data']
    for path in tracked_files():
        package, *inside = path.relative_to(ROOT).parts
        if package in ('timm_castream', 'train_wrappers', 'hf_configs') and path.suffix != '.py':
            patterns = data[package].replace(',', ' ').split()
            assert any(fnmatch('/'.join(inside), pattern) for pattern in patterns), path


def test_tested_pythons_are_those_of_the_classifiers_and_start_at_the_required_one():
    matrix = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text())['jobs']['test']['strategy']['matrix']
    classifiers = re.findall(r'Python :: (3\.\d+)$', SETUP['metadata']['classifiers'], re.MULTILINE)
    assert matrix['python'] == classifiers
    assert SETUP['options']['python_requires'] == f'>={classifiers[0]}'
    oldest = [row['python'] for row in matrix['include'] if row['versions'] == 'oldest']
    assert oldest == [classifiers[0]]


def test_the_version_has_one_home_and_a_section_in_the_changelog():
    assert SETUP['metadata']['version'] == 'attr: timm_castream.version.__version__'
    sections = re.findall(r'^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)
    assert sections[0] == ('Unreleased', '')
    assert sections[1][0] == timm_castream.__version__
    assert all(date for _, date in sections[1:])
    dates = [date for _, date in sections[1:]]
    assert dates == sorted(dates, reverse=True)


def test_the_console_script_is_the_function_that_setup_cfg_names():
    (script,) = entry_points(group='console_scripts', name='castream')
    assert f'{script.name} = {script.value}' in SETUP['options.entry_points']['console_scripts']
    assert callable(script.load())


def test_yaml_files_around_the_package_are_well_formed():
    files = [
        *WORKFLOWS,
        *(ROOT / '.github/ISSUE_TEMPLATE').glob('*.yml'),
        ROOT / '.github/dependabot.yml',
        ROOT / '.pre-commit-config.yaml',
        ROOT / 'CITATION.cff',
    ]
    for path in files:
        assert isinstance(yaml.safe_load(path.read_text()), dict), path
    for form in (ROOT / '.github/ISSUE_TEMPLATE').glob('*.yml'):
        content = yaml.safe_load(form.read_text())
        if form.name != 'config.yml':
            assert {'name', 'description', 'body'} <= set(content)
            assert len({field['id'] for field in content['body']}) == len(content['body'])
