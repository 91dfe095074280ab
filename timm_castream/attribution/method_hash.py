"""Text that identifies a method of the user or the architecture of a network, for the settings of an evaluation.

An evaluation resumes from its finished batches only if these texts are equal.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath
from torch import nn

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
# Modules and attributes that change nothing in evaluation mode.
_PASSING_ON = (nn.Identity, nn.modules.dropout._DropoutNd, DropPath)
_WITHOUT_EFFECT = ('training', 'grad_checkpointing', 'init')  # init: how a stream was drawn


def method_hash(source: Any) -> str:
    """Text that differs if two methods of the user differ in their names, their source text or their saved maps.

    The values that a function reads from elsewhere do not count: in one folder, a label means the same function.

    Args:
        source: A name, a callable, or a mapping from poolings to arrays.
    """
    if isinstance(source, str):
        return source
    if isinstance(source, Mapping):
        arrays = sorted((str(pooling), np.ascontiguousarray(array)) for pooling, array in source.items())
        return f'maps {_short_hash(*((f"{name} {a.dtype} {a.shape}").encode() + a.tobytes() for name, a in arrays))}'
    while isinstance(source, functools.partial):
        source = source.func
    named = source if isinstance(getattr(source, '__qualname__', None), str) else type(source)
    try:
        text = inspect.getsource(named)
    except (OSError, TypeError):  # written in C, or typed into an interpreter
        text = ''
    return f'{named.__module__}.{named.__qualname__} {_short_hash(text.encode())}'


def architecture(model: nn.Module) -> str:
    """SHA-256 of the settings of a network that its weights do not show, such as strides, heads and window sizes.

    It depends on the class and the plain attributes of every module. Dropout and initialisation are ignored.
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
            yield name, f'{type(module).__module__}.{type(module).__qualname__}', plain


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, (tuple, list)) and all(map(_is_plain, value)))


def _short_hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
