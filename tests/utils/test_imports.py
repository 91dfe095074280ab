"""Importing the package: what waits for timm, what needs no torch, and the function that shares a submodule's name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from timm_castream._utils.imports import after_import


def in_a_fresh_process(code: str) -> str:
    """Runs code in another process; returns its output."""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def package(tmp_path, monkeypatch) -> str:
    """Name of a package that no process has imported."""
    (tmp_path / 'imported_late').mkdir()
    (tmp_path / 'imported_late' / '__init__.py').write_text('VALUE = 1')
    monkeypatch.syspath_prepend(str(tmp_path))
    yield 'imported_late'
    sys.modules.pop('imported_late', None)


def test_the_function_runs_once_right_after_the_import_and_leaves_no_trace(package):
    finders, values = list(sys.meta_path), []
    after_import(package, lambda: values.append(sys.modules[package].VALUE))
    assert values == []
    module = __import__(package)
    assert values == [1]
    assert sys.meta_path == finders
    assert 'exec_module' not in vars(module.__loader__)


def test_the_function_runs_at_once_where_the_package_is_imported(package):
    __import__(package)
    values = []
    after_import(package, lambda: values.append(1))
    assert values == [1]


def test_a_package_that_is_missing_stays_missing():
    after_import('no_such_package', lambda: None)
    try:
        with pytest.raises(ModuleNotFoundError, match='no_such_package'):
            __import__('no_such_package')
    finally:
        sys.meta_path.pop(0)


@pytest.mark.parametrize('order', ['timm_castream, timm', 'timm, timm_castream'])
def test_the_models_are_registered_in_either_order_of_imports(order):
    assert in_a_fresh_process(f'import {order}; print(timm.is_model("resnet50_castream"))') == 'True\n'


def test_the_package_needs_no_torch_before_timm_or_a_function_is_asked_for():
    code = (
        'import sys, timm_castream; print("torch" in sys.modules); timm_castream.attach; print("torch" in sys.modules)'
    )
    assert in_a_fresh_process(code) == 'False\nTrue\n'


def test_attach_is_the_function_whatever_was_imported_before():
    code = 'import timm_castream.attach, timm_castream as c; print(callable(c.attach), c.attach.__name__, c.pooling)'
    assert in_a_fresh_process(code).startswith('True attach <function pooling')
