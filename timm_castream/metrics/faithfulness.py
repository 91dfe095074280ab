"""Faithfulness metrics: Average Drop, Average Gain, Average Increase, Insertion and Deletion, all in percent.

With p the probability of a class on an image and o the same on the image masked by its saliency map:

* Average Drop     AD = mean max(0, p - o) / p          lower is better   (Grad-CAM++, arXiv 1710.11063)
* Average Gain     AG = mean max(0, o - p) / (1 - p)    higher is better  (Opti-CAM, arXiv 2301.07002)
* Average Increase AI = mean [o > p]                    higher is better  (Grad-CAM++)
* Insertion, Deletion: area under the curve of p as pixels, most salient first, are put into a blurred image
  (higher is better) or taken out of the image (lower is better)          (RISE, arXiv 1806.07421)

Plain functions hold the arithmetic of each image. The torchmetrics classes average it over images and processes.
B images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._utils.checks import check_unit_range

try:
    from torchmetrics import Metric
except ModuleNotFoundError as error:
    raise ImportError("The metrics need torchmetrics: pip install 'timm_castream[eval]'.") from error

__all__ = [
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
    return 100 * (prob - masked_prob).clamp(min=0) / torch.where(prob > 0, prob, 1.0)


def average_gain(prob: Tensor, masked_prob: Tensor) -> Tensor:
    """The gain max(0, o - p) / (1 - p) of each image, in percent; 0 where p is 1.

    Args, Raises: as `average_drop`.

    Returns:
        (B,) values in [0, 100], whose mean is AG.
    """
    _check_pair(prob, masked_prob)
    return 100 * (masked_prob - prob).clamp(min=0) / torch.where(prob < 1, 1 - prob, 1.0)


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


def area_over_shares(curve: Tensor, shares: Tensor) -> Tensor:
    """Area under each curve over the true share of the pixels, in percent: the last step may be smaller.

    Args:
        curve: (B, n + 1) probabilities.
        shares: (B, n + 1) shares of the pixels changed, from 0 to 1.

    Returns:
        (B,) values in [0, 100].

    Raises:
        ValueError: As `area_under_curve`.
    """
    area_under_curve(curve)  # checks the curve
    return 100 * torch.trapezoid(curve, shares.to(curve), dim=1)


class _ImageMean(Metric):
    """Mean over images of a value in percent. The sums are in float64: exact for any batches of a large data set.

    A device without float64 (MPS) takes the metric after `metric.set_dtype(torch.float32)`.
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 100.0

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


def _check_pair(prob: Tensor, masked_prob: Tensor) -> None:
    if not isinstance(prob, Tensor) or not isinstance(masked_prob, Tensor):
        raise ValueError(
            'prob and masked_prob must both be tensors of shape (B,), '
            f'got {type(prob).__name__} and {type(masked_prob).__name__}.'
        )
    # (B, 1) against (B,) would broadcast to B x B without a word.
    if prob.ndim != 1 or prob.shape != masked_prob.shape:
        raise ValueError(
            f'prob and masked_prob must both have shape (B,), got {tuple(prob.shape)} and {tuple(masked_prob.shape)}.'
        )
    _check_probabilities('prob', prob)
    _check_probabilities('masked_prob', masked_prob)


def _check_probabilities(name: str, value: Tensor) -> None:
    if value.dtype not in (torch.float32, torch.float64):
        raise ValueError(f'{name} must be float32 or float64, got {value.dtype}: take the softmax in float32.')
    check_unit_range(name, value)
