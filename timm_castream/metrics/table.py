"""The table of metrics: what each needs to be measured, and its values. T maps.

A new metric is a function in one of the modules of this folder, and a row here. If it needs a quantity that no metric
has measured yet, `measurements` says how that is added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from . import road  # noqa: F401 its measurements
from .faithfulness import area_over_shares, area_under_curve, average_drop, average_gain, average_increase
from .localization import energy_pointing_game, localization_error, pointing_game
from .max_box_acc import best_levels, box_accuracy_hits
from .robustness import adcc, coherency, complexity, rank_correlation, structural_similarity

__all__ = ['DEFAULT_METRICS', 'METRICS', 'Measurements', 'MetricRow']


class Measurements(SimpleNamespace):
    """Measured quantities of T saliency maps, by the names of `measurements.MEASUREMENTS`.

    It has `prob`, (T,), the probability of the class on the image, and what the metrics need.
    """

    prob: Tensor

    def __getattr__(self, name: str) -> Tensor:
        raise AttributeError(f'{name} was not measured: a row of METRICS that reads it names it in needs.')


Values = Callable[[Measurements], Tensor]


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
        needs: Names of the measurements that the metric reads besides `prob`. One that needs `'boxes'` has a value for
            maps with a box alone.
        values: Values of T maps, (T,), or (T, m) bool for a metric that counts hits. NaN where a map has no value.
        from_means: From (S, m) means over maps to (S,) values in percent.
        in_default: Whether an evaluation measures it unless told otherwise: the five metrics of the paper.
        curve: The measurement that is its curve, for pictures.
    """

    name: str
    title: str
    symbol: str
    higher_is_better: bool
    needs: frozenset[str]
    values: Values
    from_means: Callable[[np.ndarray], np.ndarray] = _first
    in_default: bool = False
    curve: str = ''

    @property
    def heading(self) -> str:
        """The symbol with an arrow towards better values."""
        return f'{self.symbol} {"↑" if self.higher_is_better else "↓"}'


def _of_top_half(value: Callable[[Tensor, Tensor], Tensor]) -> Values:
    return lambda m: value(m.prob, m.top_half_prob)


def _over_shares(curve: str) -> tuple[frozenset[str], Values]:
    """The needs and the values of a curve over the share of the pixels."""
    return frozenset({curve, 'pixel_shares'}), lambda m: area_over_shares(getattr(m, curve), m.pixel_shares)


def _with_randomised(compare: Callable[[Tensor, Tensor], Tensor]) -> Values:
    return lambda m: torch.stack([compare(m.saliency, other) for other in m.maps_of_randomised.unbind(1)]).mean(0)


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
            curve='insertion_curve',
        ),
        MetricRow(
            'deletion',
            'Deletion',
            'D',
            False,
            frozenset({'deletion_curve'}),
            lambda m: area_under_curve(m.deletion_curve),
            in_default=True,
            curve='deletion_curve',
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
            lambda m: box_accuracy_hits(m.saliency, m.boxes).flatten(1),
            lambda means: best_levels(torch.from_numpy(means)).numpy(),
        ),
        MetricRow(
            'average_drop_top50',
            'Average Drop, top 50 % of the pixels',
            'AD50',
            False,
            frozenset({'top_half_prob'}),
            _of_top_half(average_drop),
        ),
        MetricRow(
            'average_gain_top50',
            'Average Gain, top 50 % of the pixels',
            'AG50',
            True,
            frozenset({'top_half_prob'}),
            _of_top_half(average_gain),
        ),
        MetricRow(
            'average_increase_top50',
            'Average Increase, top 50 % of the pixels',
            'AI50',
            True,
            frozenset({'top_half_prob'}),
            _of_top_half(average_increase),
        ),
        MetricRow(
            'insertion_share', 'Insertion over the true share', 'I share', True, *_over_shares('insertion_curve')
        ),
        MetricRow('deletion_share', 'Deletion over the true share', 'D share', False, *_over_shares('deletion_curve')),
        MetricRow(
            'insertion_black',
            'Insertion into black',
            'I black',
            True,
            *_over_shares('insertion_black_curve'),
            curve='insertion_black_curve',
        ),
        MetricRow(
            'insertion_mean',
            'Insertion into the mean colour',
            'I mean',
            True,
            *_over_shares('insertion_mean_curve'),
            curve='insertion_mean_curve',
        ),
        MetricRow(
            'deletion_black',
            'Deletion to black',
            'D black',
            False,
            *_over_shares('deletion_black_curve'),
            curve='deletion_black_curve',
        ),
        MetricRow(
            'deletion_blur',
            'Deletion to the blurred image',
            'D blur',
            False,
            *_over_shares('deletion_blur_curve'),
            curve='deletion_blur_curve',
        ),
        MetricRow(
            'insertion_value',
            'Insertion into the given value',
            'I value',
            True,
            *_over_shares('insertion_value_curve'),
            curve='insertion_value_curve',
        ),
        MetricRow(
            'deletion_value',
            'Deletion to the given value',
            'D value',
            False,
            *_over_shares('deletion_value_curve'),
            curve='deletion_value_curve',
        ),
        MetricRow(
            'road_morf',
            'ROAD, most relevant first',
            'ROAD MoRF',
            False,
            frozenset({'road_morf_prob'}),
            lambda m: 100 * m.road_morf_prob.mean(1),
        ),
        MetricRow(
            'road_lerf',
            'ROAD, least relevant first',
            'ROAD LeRF',
            True,
            frozenset({'road_lerf_prob'}),
            lambda m: 100 * m.road_lerf_prob.mean(1),
        ),
        MetricRow(
            'coherency',
            'Coherency',
            'Coh',
            True,
            frozenset({'saliency', 'map_of_masked'}),
            lambda m: coherency(m.saliency, m.map_of_masked),
        ),
        MetricRow('complexity', 'Complexity', 'Com', False, frozenset({'saliency'}), lambda m: complexity(m.saliency)),
        MetricRow(
            'adcc',
            'Average DCC',
            'ADCC',
            True,
            _MASKED | {'saliency', 'map_of_masked'},
            lambda m: adcc(
                coherency(m.saliency, m.map_of_masked), complexity(m.saliency), average_drop(m.prob, m.masked_prob)
            ),
        ),
        MetricRow(
            'randomisation',
            'Rank correlation under randomised weights',
            'Rand',
            False,
            frozenset({'saliency', 'maps_of_randomised'}),
            _with_randomised(rank_correlation),
        ),
        MetricRow(
            'randomisation_ssim',
            'SSIM under randomised weights',
            'Rand SSIM',
            False,
            frozenset({'saliency', 'maps_of_randomised'}),
            _with_randomised(structural_similarity),
        ),
        MetricRow(
            'stability',
            'Relative change under noise',
            'Stab',
            False,
            frozenset({'map_stability'}),
            lambda m: m.map_stability,
        ),
    )
}
DEFAULT_METRICS = tuple(metric.name for metric in METRICS.values() if metric.in_default)
