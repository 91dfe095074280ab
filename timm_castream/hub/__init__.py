"""Publish models and streams on the Hugging Face Hub, and load them.

A module is imported when a name of it is first used: the registry of timm needs `configs` alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .load import load_stream, save_stream
    from .push import push_to_hub

__all__ = ['load_stream', 'push_to_hub', 'save_stream']

_MODULE_OF = {'load_stream': 'load', 'push_to_hub': 'push', 'save_stream': 'load'}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'.{_MODULE_OF[name]}', __name__), name)
