"""Text that identifies a method of the user or the architecture of a network, for the settings of an evaluation.

An evaluation goes on from its finished batches only where these texts are equal.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import PurePath
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn

_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    type(...),
    Enum,
    PurePath,
    np.generic,
    np.dtype,
    torch.dtype,
    torch.device,
)
_ITERABLE = (tuple, list, set, frozenset)
# Modules and attributes that change nothing in evaluation mode.
_PASSING_ON = (nn.Identity, nn.modules.dropout._DropoutNd, DropPath)
_WITHOUT_EFFECT = ('training', 'grad_checkpointing', 'init')  # init: how a stream was drawn

Seen = dict[int, tuple[int, Any]]  # by id: the position of an object that was met before, and the object, kept alive


def identity(value: Any) -> str:
    """Text that differs where two methods of the user differ.

    It depends on:

    * a function's code with its nested functions, default arguments, closure variables, and those global variables,
      functions and classes of its own module that it names;
    * the function and the arguments of a `functools.partial`; the function and the object of a bound method;
    * the class and the attributes of a callable object;
    * of values: numbers, strings, paths and enums, lists, tuples, sets and mappings of values, arrays and tensors by
      their bytes, torch modules by their weights and plain attributes.

    Every other object counts by the name of its type: a change inside it does not show. Objects in the attributes of a
    callable object are such others. A tensor with a graph is the result of a computation and does not count.

    Args:
        value: A name, a callable, or an array or a mapping of arrays.
    """
    if isinstance(value, str):
        return value
    return f'{_name(value)} {hashlib.sha256(_text(value, {}).encode()).hexdigest()[:16]}'


def architecture(model: nn.Module) -> str:
    """SHA-256 of the settings of a network that its weights do not show, such as strides, heads and window sizes.

    It depends on the class and the plain attributes of every module. Dropout and initialisation play no part.
    """
    return hashlib.sha256(repr(list(_modules(model))).encode()).hexdigest()


def _modules(model: nn.Module) -> Iterator[tuple[str, str, list[tuple[str, Any]]]]:
    for name, module in model.named_modules():
        if not isinstance(module, _PASSING_ON):
            plain = [
                (key, value)
                for key, value in sorted(vars(module).items())
                if not key.startswith('_') and 'drop' not in key and key not in _WITHOUT_EFFECT and _is_plain(value)
            ]
            yield name, _name(type(module)), plain


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, (tuple, list)) and all(map(_is_plain, value)))


def _name(value: Any) -> str:
    named = value if isinstance(getattr(value, '__qualname__', None), str) else type(value)
    return f'{named.__module__}.{named.__qualname__}'


def _text(value: Any, seen: Seen) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (Tensor, np.ndarray)):
        return _array_text(value)
    if not isinstance(value, (tuple, frozenset)):  # Python may share equal ones in one process and not in another
        if id(value) in seen:
            return f'item {seen[id(value)][0]}'
        seen[id(value)] = len(seen), value
    parts = [_text(part, seen) for part in _parts(value)]
    if isinstance(value, (set, frozenset, Mapping)):
        parts.sort()
    return f'{_name(value)}({", ".join(parts)})'


def _array_text(array: Tensor | np.ndarray) -> str:
    given = f'{_name(type(array))} {array.dtype} {tuple(array.shape)}'
    if isinstance(array, np.ndarray):
        data = repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array).tobytes()
    elif array.grad_fn is not None or array.layout != torch.strided or array.is_quantized or array.is_meta:
        return given
    else:
        data = array.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f'{given} {hashlib.sha256(data).hexdigest()}'


def _parts(value: Any) -> list[Any]:
    """What tells a value from others of its type."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, _ITERABLE):
        return list(value)
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, value.co_consts]
    if isinstance(value, FunctionType):
        cells = [_contents(cell) for cell in value.__closure__ or ()]
        return [value.__code__, value.__defaults__, value.__kwdefaults__, cells, _globals(value)]
    if isinstance(value, MethodType):
        return [value.__func__, *_object_parts(value.__self__)]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, nn.Module):
        return [value.state_dict(), architecture(value)]
    if isinstance(value, ModuleType):
        return [value.__name__]
    if isinstance(value, type):
        return _class_parts(value)
    return _object_parts(value) if callable(value) else []


def _object_parts(value: Any) -> list[Any]:
    """The class and the attributes of a callable object."""
    if isinstance(value, type):
        return [value]
    if isinstance(value, nn.Module):
        return [type(value), *_parts(value)]
    kept = (*_PLAIN, *_ITERABLE, Mapping, Tensor, np.ndarray, FunctionType, MethodType, functools.partial, nn.Module)
    attributes = {k: v for k, v in getattr(value, '__dict__', {}).items() if getattr(v, 'grad_fn', None) is None}
    return [type(value), {k: v if isinstance(v, kept) else _name(v) for k, v in attributes.items()}]


def _class_parts(value: type) -> list[Any]:
    """The functions and plain attributes of a class and of its bases in the same module."""
    parts: list[Any] = []
    for base in value.__mro__:
        if base.__module__ != value.__module__:
            continue
        for name, attribute in vars(base).items():
            function = getattr(attribute, 'fget', None) or getattr(attribute, '__func__', attribute)
            if isinstance(function, FunctionType) or (_is_plain(attribute) and not name.startswith('__')):
                parts.append((name, function))
    return parts


def _globals(function: FunctionType) -> dict[str, Any]:
    """The global variables that a function names. Functions and classes of other modules count by their names."""
    found = {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}
    return {
        name: _name(value)
        if isinstance(value, (FunctionType, type)) and value.__module__ != function.__module__
        else value
        for name, value in found.items()
    }


def _names(code: CodeType) -> list[str]:
    nested = [name for const in code.co_consts if isinstance(const, CodeType) for name in _names(const)]
    return [*code.co_names, *nested]


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return None
