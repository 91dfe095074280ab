"""Work that waits until another package is imported."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, run: Callable[[], object]) -> None:
    """Calls a function as soon as a package is imported: now, if it is imported already.

    Args:
        name: Name of a top-level package.
        run: Is called once.
    """
    if name in sys.modules:
        run()
    else:
        sys.meta_path.insert(0, _Finder(name, run))


class _Finder(MetaPathFinder):
    """Finds the package by the finders behind it, and lets its loader call the function too."""

    def __init__(self, name: str, run: Callable[[], object]) -> None:
        self._name = name
        self._run = run

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        loader: Any = spec and spec.loader
        if loader is None:
            return spec
        load = loader.exec_module

        def load_and_run(module: ModuleType) -> None:
            load(module)
            del loader.exec_module  # the method of the class is back
            sys.meta_path.remove(self)
            self._run()

        loader.exec_module = load_and_run
        return spec
