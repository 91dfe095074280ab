"""Places where timm's scripts are found."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import timm.data
import timm.task
import timm.utils
from states import make_file

from timm_castream.timm_scripts import finder
from train_wrappers import train

pytest_plugins = ('stand_in_scripts',)
pytestmark = pytest.mark.usefixtures('no_script_of_this_machine')


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
    (line,) = capsys.readouterr().err.splitlines()
    assert source in line and missing in line


@pytest.mark.parametrize(
    ('installed', 'expected'),
    [('1.0.27', '1.0.27'), ('1.0.28', '1.0.28'), ('1.0.29.dev0', '1.0.28'), ('1.0.31', '1.0.28'), ('1.1.0', '1.0.40')],
)
def test_the_newest_release_that_the_installed_timm_can_run_is_downloaded_once(
    installed, expected, monkeypatch, releases, server
):
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
    (line,) = capsys.readouterr().err.splitlines()
    assert 'SHA-256' in line and '--timm-script' in line
    assert not evil.exists()
    assert not list(tmp_path.glob('cache/**/*.py'))


def test_a_cached_file_that_was_changed_is_fetched_again(monkeypatch, releases):
    monkeypatch.setattr(timm, '__version__', '1.0.28')
    path = finder.find_script('train.py')
    path.write_bytes(path.read_bytes() + b'\nraise SystemExit(3)')
    assert finder.find_script('train.py').read_bytes() == releases['1.0.28']


@pytest.mark.parametrize('failure', ['missing', 'cut', 'down', 'unwritable'])
def test_a_download_that_fails_is_one_line_and_exit_code_2(failure, monkeypatch, releases, server, tmp_path, capsys):
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
    (line,) = capsys.readouterr().err.splitlines()
    assert ('XDG_CACHE_HOME' if failure == 'unwritable' else 'clone of timm at tag v1.0.28') in line
    assert not list(tmp_path.glob('cache/**/*.*'))


def test_processes_that_download_at_once_leave_one_whole_file(monkeypatch, releases):
    monkeypatch.setattr(timm, '__version__', '1.0.31')
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: finder.find_script('train.py'), range(16)))
    (path,) = paths
    assert path.read_bytes() == releases['1.0.28']
    assert list(path.parent.iterdir()) == [path]


def test_the_real_scripts_that_were_downloaded_or_cloned_have_the_checksums_listed(real_scripts):
    for name, path in real_scripts.items():
        known = {scripts[name] for scripts in finder.KNOWN_SHA256.values()}
        if finder.script_release(Path(path)).removeprefix('v') not in finder.KNOWN_SHA256:
            pytest.skip(f'{path} is not of a known release')
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() in known
