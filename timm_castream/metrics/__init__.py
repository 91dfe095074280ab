"""Metrics of saliency maps: faithfulness, perturbation curves, ROAD, robustness and localisation.

Functions and torchmetrics classes are found here by name; `table` lists the metrics of an evaluation. Modules are
imported when a name is first used, so that mean average precision needs no torchmetrics.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    'faithfulness': (
        'AverageDrop',
        'AverageGain',
        'AverageIncrease',
        'Deletion',
        'Insertion',
        'area_over_shares',
        'area_under_curve',
        'average_drop',
        'average_gain',
        'average_increase',
    ),
    'curves': ('CURVE_SETTINGS', 'deletion_curve', 'insertion_curve'),
    'localization': ('energy_pointing_game', 'has_box', 'localization_error', 'pointing_game'),
    'max_box_acc': ('BOX_ACCURACY_IOUS', 'box_accuracy_hits', 'max_box_acc_v2'),
    'imputation': ('linear_imputation',),
    'road': ('ROAD_SHARES', 'road_curve'),
    'robustness': ('adcc', 'coherency', 'complexity', 'rank_correlation', 'stability', 'structural_similarity'),
    'table': ('DEFAULT_METRICS', 'METRICS', 'Measurements', 'MetricRow'),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ['mask_image', *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name == 'mask_image':
        from ..inference.images import mask_image

        return mask_image
    if name not in _MODULE_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'.{_MODULE_OF[name]}', __name__), name)
