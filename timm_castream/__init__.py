"""CA-Stream attention pooling and saliency for timm models, https://arxiv.org/abs/2404.14996.

Importing it registers the models: `timm.create_model('resnet50_castream')`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._utils.imports import after_import
from .version import __version__

if TYPE_CHECKING:
    from .attach import attach, attention_maps, class_labels, detach, forward_both, freeze_backbone, pooling
    from .fit import fit
    from .hub import load_stream, push_to_hub, save_stream
    from .stream import CAStream

__all__ = [
    'CAStream',
    '__version__',
    'attach',
    'attention_maps',
    'class_labels',
    'detach',
    'fit',
    'forward_both',
    'freeze_backbone',
    'load_stream',
    'pooling',
    'push_to_hub',
    'save_stream',
]

# A module is imported when a name of it is first used, so that `castream --help` needs no torch.
_MODULES_OF_NAMES = {
    'attach': ('attach', 'attention_maps', 'class_labels', 'detach', 'forward_both', 'freeze_backbone', 'pooling'),
    'fit': ('fit',),
    'hub': ('load_stream', 'push_to_hub', 'save_stream'),
    'stream': ('CAStream',),
}
_MODULE_OF = {name: module for module, names in _MODULES_OF_NAMES.items() for name in names}
_MODULES = ('app', 'attribution', 'datasets', 'demo', 'evaluate', 'hub', 'metrics', 'models', 'stream', 'visualize')


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f'.{_MODULE_OF[name]}', __name__), name)
    if name in _MODULES:
        return importlib.import_module(f'.{name}', __name__)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


class _Package(ModuleType):
    """The package: `timm_castream.attach` is the function, although Python sets it to the submodule of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _MODULE_OF:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
after_import('timm', lambda: importlib.import_module('.models', __name__))
