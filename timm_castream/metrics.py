"""Interpretability metrics: Average Drop, Average Gain, Average Increase, Insertion and Deletion, all in percent.

With p the probability of a class on an image and o the same on the image masked by its saliency map:

* Average Drop     AD = mean max(0, p - o) / p          lower is better   (Grad-CAM++, arXiv 1710.11063)
* Average Gain     AG = mean max(0, o - p) / (1 - p)    higher is better  (Opti-CAM, arXiv 2301.07002)
* Average Increase AI = mean [o > p]                    higher is better  (Grad-CAM++)
* Insertion, Deletion: area under the curve of p as pixels, most salient first, are put into a blurred image
  (higher is better) or taken out of the image (lower is better)          (RISE, arXiv 1806.07421)

Plain functions hold the arithmetic of each image. The torchmetrics classes average it over images and processes. The
table `METRICS` has these five and the localisation metrics of `localization`. B images, R maps.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import check_unit_range
from .curves import CURVE_SETTINGS, deletion_curve, insertion_curve
from .images import mask_image
from .localization import (
    best_levels,
    box_accuracy_hits,
    energy_pointing_game,
    has_box,
    localization_error,
    pointing_game,
)

try:
    from torchmetrics import Metric
except ModuleNotFoundError as error:
    raise ImportError("The metrics need torchmetrics: pip install 'timm_castream[eval]'.") from error

__all__ = [
    'CURVE_SETTINGS',
    'DEFAULT_METRICS',
    'METRICS',
    'AverageDrop',
    'AverageGain',
    'AverageIncrease',
    'Deletion',
    'Insertion',
    'Measurements',
    'MetricRow',
    'area_under_curve',
    'average_drop',
    'average_gain',
    'average_increase',
    'deletion_curve',
    'insertion_curve',
    'mask_image',
]


def average_drop(prob: Tensor, masked_prob: Tensor) -> Tensor:
    """The drop max(0, p - o) / p of each image, in percent; 0 where p is 0.

    Args:
        prob: p, (B,) probabilities of the class on the images.
        masked_prob: o, (B,) probabilities of the same class on the masked images.

    Returns:
        (B,) values in [0, 100], whose mean is AD.

    Raises:
        ValueError: If the shapes differ from (B,), or a value is NaN, outside [0, 1] or in half precision.
    """
    _check_pair(prob, masked_prob)
    # The numerator is 0 where p is 0. An epsilon instead of this case would show: p = 1e-6, o = 0 is a drop of 100 %.
    return 100 * (prob - masked_prob).clamp(min=0) / torch.where(prob > 0, prob, 1.)


def average_gain(prob: Tensor, masked_prob: Tensor) -> Tensor:
    """The gain max(0, o - p) / (1 - p) of each image, in percent; 0 where p is 1.

    Args, Raises: as `average_drop`.

    Returns:
        (B,) values in [0, 100], whose mean is AG.
    """
    _check_pair(prob, masked_prob)
    return 100 * (masked_prob - prob).clamp(min=0) / torch.where(prob < 1, 1 - prob, 1.)


def average_increase(prob: Tensor, masked_prob: Tensor) -> Tensor:
    """100 for each image with o > p, else 0.

    Args, Raises: as `average_drop`.

    Returns:
        (B,) values, 0 or 100, whose mean is AI.
    """
    _check_pair(prob, masked_prob)
    return 100 * (masked_prob > prob).to(prob.dtype)


def area_under_curve(curve: Tensor) -> Tensor:
    """Area under each curve over [0, 1], in percent: trapezoids of equal width, also where the last step is smaller.

    Args:
        curve: (B, n + 1) probabilities, before the first step and after each of n.

    Returns:
        (B,) values in [0, 100], whose mean is Insertion or Deletion.

    Raises:
        ValueError: If the shape is another, or a value is NaN, outside [0, 1] or in half precision.
    """
    if not isinstance(curve, Tensor):
        raise ValueError(f'curve must be a tensor of shape (B, n + 1), got {type(curve).__name__}.')
    if curve.ndim != 2 or curve.shape[1] < 2:
        raise ValueError(f'curve must have shape (B, n + 1) with n of at least 1, got {tuple(curve.shape)}.')
    _check_probabilities('curve', curve)
    return 100 * torch.trapezoid(curve, dim=1) / (curve.shape[1] - 1)


class _ImageMean(Metric):
    """Mean over images of a value in percent. The sums are in float64: exact for any batches of a large data set.

    A device without float64 (MPS) takes the metric after `metric.set_dtype(torch.float32)`.
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.
    plot_upper_bound = 100.

    num_images: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # MetricCollection merges metrics for good whose states have the same names and, after one batch, the same
        # values: a first batch without gain would turn AI into AG. So each class names its own sum.
        self._sum_name = f'{type(self).__name__}_sum'
        self.add_state(self._sum_name, torch.zeros((), dtype=torch.float64), dist_reduce_fx='sum')
        self.add_state('num_images', torch.zeros((), dtype=torch.int64), dist_reduce_fx='sum')

    def _add(self, values: Tensor) -> None:
        total = getattr(self, self._sum_name)
        setattr(self, self._sum_name, total + values.sum(dtype=total.dtype))
        self.num_images += values.numel()

    def compute(self) -> Tensor:
        """The mean over all images so far, in percent; a scalar."""
        return getattr(self, self._sum_name) / self.num_images


class AverageDrop(_ImageMean):
    """AD, `average_drop` averaged over images. Lower is better.

    >>> metric = AverageDrop()
    >>> metric.update(torch.tensor([0.8, 0.5]), torch.tensor([0.6, 0.9]))
    >>> round(metric.compute().item(), 4)
    12.5
    """

    higher_is_better = False

    def update(self, prob: Tensor, masked_prob: Tensor) -> None:
        """Adds B images; the arguments are those of `average_drop`."""
        self._add(average_drop(prob, masked_prob))


class AverageGain(_ImageMean):
    """AG, `average_gain` averaged over images. Higher is better."""

    higher_is_better = True

    def update(self, prob: Tensor, masked_prob: Tensor) -> None:
        """Adds B images; the arguments are those of `average_gain`."""
        self._add(average_gain(prob, masked_prob))


class AverageIncrease(_ImageMean):
    """AI, the share of images with `average_increase`. Higher is better."""

    higher_is_better = True

    def update(self, prob: Tensor, masked_prob: Tensor) -> None:
        """Adds B images; the arguments are those of `average_increase`."""
        self._add(average_increase(prob, masked_prob))


class Insertion(_ImageMean):
    """I, the area under `insertion_curve` averaged over images. Higher is better."""

    higher_is_better = True

    def update(self, curve: Tensor) -> None:
        """Adds B images by their curves, (B, n + 1) probabilities."""
        self._add(area_under_curve(curve))


class Deletion(_ImageMean):
    """D, the area under `deletion_curve` averaged over images. Lower is better."""

    higher_is_better = False

    def update(self, curve: Tensor) -> None:
        """Adds B images by their curves, (B, n + 1) probabilities."""
        self._add(area_under_curve(curve))


_EMPTY = torch.empty(0)
_BITS = 48  # results in one number: float64 holds integers up to 2 ** 53


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


def pack_hits(hits: Tensor, defined: Tensor) -> Tensor:
    """The results of `localization.box_accuracy_hits` as few numbers, for files.

    Args:
        hits: (R, 3, 256) bool.
        defined: (R,) bool, False for a map without a box.

    Returns:
        (R, 16) in float64: 48 results a number, exact, and NaN for a map without a box.
    """
    powers = 2 ** torch.arange(_BITS, device=hits.device)
    packed = (hits.flatten(1).unflatten(1, (-1, _BITS)) * powers).sum(2).double()
    return packed.where(defined[:, None], torch.nan)


def unpack_hits(values: np.ndarray) -> np.ndarray:
    """The inverse of `pack_hits`: (R, 768) of 0 and 1, NaN where a map has no box."""
    defined = ~np.isnan(values[:, :1])
    bits = (np.where(defined, values, 0).astype(np.int64)[..., None] >> np.arange(_BITS)) & 1
    return np.where(defined, bits.reshape(len(values), -1).astype(float), np.nan)


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
        figure: From (S, m) averages to (S,) figures in percent.
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

    @property
    def heading(self) -> str:
        """The symbol with an arrow towards better values."""
        return f'{self.symbol} {"↑" if self.higher_is_better else "↓"}'


_MASKED, _BOXES = frozenset({'masked_prob'}), frozenset({'saliency', 'boxes'})

METRICS: dict[str, MetricRow] = {row.name: row for row in (
    MetricRow('average_drop', 'Average Drop', 'AD', False, _MASKED, lambda m: average_drop(m.prob, m.masked_prob)),
    MetricRow('average_gain', 'Average Gain', 'AG', True, _MASKED, lambda m: average_gain(m.prob, m.masked_prob)),
    MetricRow('average_increase', 'Average Increase', 'AI', True, _MASKED,
              lambda m: average_increase(m.prob, m.masked_prob)),
    MetricRow('insertion', 'Insertion', 'I', True, frozenset({'insertion_curve'}),
              lambda m: area_under_curve(m.insertion_curve)),
    MetricRow('deletion', 'Deletion', 'D', False, frozenset({'deletion_curve'}),
              lambda m: area_under_curve(m.deletion_curve)),
    MetricRow('pointing_game', 'Pointing Game', 'SP', True, _BOXES, lambda m: pointing_game(m.saliency, m.boxes)),
    MetricRow('energy_pointing_game', 'Energy Pointing Game', 'EP', True, _BOXES,
              lambda m: energy_pointing_game(m.saliency, m.boxes)),
    MetricRow('localization_error', 'Localisation Error', 'LE', False, _BOXES,
              lambda m: localization_error(m.saliency, m.boxes)),
    MetricRow('max_box_acc_v2', 'MaxBoxAccV2', 'MBA', True, _BOXES,
              lambda m: pack_hits(box_accuracy_hits(m.saliency, m.boxes), has_box(m.boxes)),
              columns=16, expand=unpack_hits, figure=lambda means: best_levels(torch.from_numpy(means)).numpy()),
)}
# The five metrics of the paper: those that need no boxes.
DEFAULT_METRICS = tuple(row.name for row in METRICS.values() if 'boxes' not in row.needs)


def _check_pair(prob: Tensor, masked_prob: Tensor) -> None:
    if not isinstance(prob, Tensor) or not isinstance(masked_prob, Tensor):
        raise ValueError('prob and masked_prob must both be tensors of shape (B,), '
                         f'got {type(prob).__name__} and {type(masked_prob).__name__}.')
    # (B, 1) against (B,) would broadcast to B x B without a word.
    if prob.ndim != 1 or prob.shape != masked_prob.shape:
        raise ValueError(
            'prob and masked_prob must both have shape (B,), '
            f'got {tuple(prob.shape)} and {tuple(masked_prob.shape)}.')
    _check_probabilities('prob', prob)
    _check_probabilities('masked_prob', masked_prob)


def _check_probabilities(name: str, value: Tensor) -> None:
    if value.dtype not in (torch.float32, torch.float64):
        raise ValueError(f'{name} must be float32 or float64, got {value.dtype}: take the softmax in float32.')
    check_unit_range(name, value)
