"""Names in the tables of methods and metrics, for help texts and choices.

The modules of the tables import torch, which takes seconds. Their names are therefore read from their source.
"""

from __future__ import annotations

import ast
import functools
import threading
from pathlib import Path
from typing import Any

_parsing = threading.Lock()  # Python 3.11 raises SystemError where two threads make trees at the same time


@functools.cache
def _tree(module: str) -> ast.Module:
    path = Path(__file__).parent.parent / f'{module}.py'
    with _parsing:
        return ast.parse(path.read_text(encoding='utf-8'))


def rows(module: str, row: str) -> tuple[str, ...]:
    """The first arguments of the calls `row('name', ...)` in a module, in order.

    Args:
        module: Path inside the package, such as `'metrics/table'`.
        row: Name of the class of the rows.
    """
    calls = (node for node in ast.walk(_tree(module)) if isinstance(node, ast.Call) and node.args)
    named = (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == row)
    constants = (call.args[0] for call in sorted(named, key=lambda call: call.lineno))
    return tuple(node.value for node in constants if isinstance(node, ast.Constant) and isinstance(node.value, str))


def names(module: str, variable: str) -> tuple[str, ...]:
    """The strings in a tuple, or the keys of a dictionary, that a module assigns to a variable.

    Args:
        module: Path inside the package.
        variable: Name of a variable of the module.
    """
    for node in _tree(module).body:
        targets: list[Any] = getattr(node, 'targets', [getattr(node, 'target', None)])
        value = getattr(node, 'value', None)
        if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
            elements: Any = value.keys if isinstance(value, ast.Dict) else getattr(value, 'elts', [])
            return tuple(map(ast.literal_eval, elements))
    raise AttributeError(f'{module} has no {variable}')
