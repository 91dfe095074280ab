"""The table of metrics: what each needs to be measured, and its values. R maps.

A new metric is a function in one of the modules of this folder, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .faithfulness import area_under_curve, average_drop, average_gain, average_increase
from .localization import energy_pointing_game, has_box, localization_error, pointing_game
from .max_box_acc import best_levels, box_accuracy_hits, pack_hits, unpack_hits

__all__ = ['DEFAULT_METRICS', 'METRICS', 'Measurements', 'MetricRow']

_EMPTY = torch.empty(0)


@dataclass(frozen=True)
class Measurements:
    """Measured quantities of R saliency maps. Quantities that no chosen metric needs are empty.

    Attributes:
        prob: (R,) probability of the class on the image.
        masked_prob: (R,) probability of the class on the image masked by the map.
        insertion_curve: (R, n + 1).
        deletion_curve: (R, n + 1).
        saliency: (R, H, W) maps of the size of the image, in [0, 1].
        boxes: (R, J, 4) boxes of the class in pixels, NaN where an image has fewer than J.
    """

    prob: Tensor
    masked_prob: Tensor = _EMPTY
    insertion_curve: Tensor = _EMPTY
    deletion_curve: Tensor = _EMPTY
    saliency: Tensor = _EMPTY
    boxes: Tensor = _EMPTY


def _single(values: np.ndarray) -> np.ndarray:
    return values


def _first(means: np.ndarray) -> np.ndarray:
    return means[:, 0]


@dataclass(frozen=True)
class MetricRow:
    """A row of the table of metrics.

    Attributes:
        name: Key in Python, on the command line and in files.
        title: Full name.
        symbol: Short name in tables.
        higher_is_better: The direction.
        needs: Fields of `Measurements` that the metric reads besides `prob`.
        values: Values of R maps, (R,) or (R, columns). NaN where the metric is undefined for a map.
        columns: Number of values of a map.
        expand: From (R, columns) values to the (R, m) numbers that are averaged over maps.
        figure: From (S, m) averages to (S,) values in percent.
        in_default: Whether an evaluation measures it unless told otherwise: the five metrics of the paper.
    """

    name: str
    title: str
    symbol: str
    higher_is_better: bool
    needs: frozenset[str]
    values: Callable[[Measurements], Tensor]
    columns: int = 1
    expand: Callable[[np.ndarray], np.ndarray] = _single
    figure: Callable[[np.ndarray], np.ndarray] = _first
    in_default: bool = False

    @property
    def heading(self) -> str:
        """The symbol with an arrow towards better values."""
        return f'{self.symbol} {"↑" if self.higher_is_better else "↓"}'


_MASKED, _BOXES = frozenset({'masked_prob'}), frozenset({'saliency', 'boxes'})

METRICS: dict[str, MetricRow] = {
    row.name: row
    for row in (
        MetricRow(
            'average_drop',
            'Average Drop',
            'AD',
            False,
            _MASKED,
            lambda m: average_drop(m.prob, m.masked_prob),
            in_default=True,
        ),
        MetricRow(
            'average_gain',
            'Average Gain',
            'AG',
            True,
            _MASKED,
            lambda m: average_gain(m.prob, m.masked_prob),
            in_default=True,
        ),
        MetricRow(
            'average_increase',
            'Average Increase',
            'AI',
            True,
            _MASKED,
            lambda m: average_increase(m.prob, m.masked_prob),
            in_default=True,
        ),
        MetricRow(
            'insertion',
            'Insertion',
            'I',
            True,
            frozenset({'insertion_curve'}),
            lambda m: area_under_curve(m.insertion_curve),
            in_default=True,
        ),
        MetricRow(
            'deletion',
            'Deletion',
            'D',
            False,
            frozenset({'deletion_curve'}),
            lambda m: area_under_curve(m.deletion_curve),
            in_default=True,
        ),
        MetricRow('pointing_game', 'Pointing Game', 'SP', True, _BOXES, lambda m: pointing_game(m.saliency, m.boxes)),
        MetricRow(
            'energy_pointing_game',
            'Energy Pointing Game',
            'EP',
            True,
            _BOXES,
            lambda m: energy_pointing_game(m.saliency, m.boxes),
        ),
        MetricRow(
            'localization_error',
            'Localisation Error',
            'LE',
            False,
            _BOXES,
            lambda m: localization_error(m.saliency, m.boxes),
        ),
        MetricRow(
            'max_box_acc_v2',
            'MaxBoxAccV2',
            'MBA',
            True,
            _BOXES,
            lambda m: pack_hits(box_accuracy_hits(m.saliency, m.boxes), has_box(m.boxes)),
            columns=16,
            expand=unpack_hits,
            figure=lambda means: best_levels(torch.from_numpy(means)).numpy(),
        ),
    )
}
DEFAULT_METRICS = tuple(metric.name for metric in METRICS.values() if metric.in_default)
