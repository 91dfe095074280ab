"""CA-Stream attention pooling and saliency for timm models, https://arxiv.org/abs/2404.14996.

Importing it registers the models: `timm.create_model('resnet50_castream')`.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import models as models
from .attach import attach, attention_maps, class_labels, detach, forward_both, freeze_backbone, pooling
from .fit import fit
from .hub import load_stream, push_to_hub, save_stream
from .stream import CAStream
from .version import __version__

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

_LAZY = ('app', 'attribution', 'datasets', 'demo', 'evaluate', 'metrics', 'visualize')


def __getattr__(name: str) -> Any:
    if name in _LAZY:  # they import torchmetrics, matplotlib or scikit-learn
        return importlib.import_module(f'.{name}', __name__)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
