"""MaxBoxAccV2, the localisation metric of weakly supervised object localisation (arXiv 2007.04178), in percent.

S, an (H, W) map, is scaled to [0, 1] by its own minimum and maximum and cut at 256 levels. An image is a hit at a level
if a component of [S > level] has a box with IoU >= threshold. The metric is the best share of hits over all levels,
averaged over the thresholds 0.3, 0.5 and 0.7. Higher is better.

The authors' code resizes maps with a bicubic filter, ours with the bilinear one of all metrics, so that its values are
not exactly these. R maps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

from .components import NUM_LEVELS, component_boxes
from .localization import check_boxes, is_box

__all__ = ['BOX_ACCURACY_IOUS', 'box_accuracy_hits', 'max_box_acc_v2']

BOX_ACCURACY_IOUS = (0.3, 0.5, 0.7)
"""Thresholds on the IoU that MaxBoxAccV2 averages over."""


def box_accuracy_hits(saliency: Tensor, boxes: Tensor) -> Tensor:
    """The levels at which each map has a component whose box fits one of its boxes, for `max_box_acc_v2`.

    As in the code of the metric's authors, boxes cover whole pixels, of which they round the first and the last down;
    and the IoU counts both corners of a component as inside, which lie at its first column and row and at the column
    and row after its last, as far as the map has one. Their contours include the outlines of holes too, which are not
    used here. A constant map has no hits.

    Args, Raises: as `pointing_game`.

    Returns:
        (R, 3, 256) bool: True where a component of [S > level / 255] has an IoU of at least 0.3, 0.5 or 0.7. All are
        False for a map without a box.
    """
    boxes = check_boxes(saliency, boxes)
    hits = torch.zeros(len(saliency), len(BOX_ACCURACY_IOUS), NUM_LEVELS, dtype=torch.bool)
    thresholds = torch.tensor(BOX_ACCURACY_IOUS, dtype=torch.float64)
    height, width = saliency.shape[1:]
    corner = torch.tensor([0, 0, 1, 1], dtype=torch.float64)
    last = torch.tensor([width - 1, height - 1] * 2, dtype=torch.float64)
    for i, values in enumerate(saliency.detach().cpu().double()):
        truth = boxes[i][is_box(boxes[i])].cpu().double()
        # x1 and y1 lie just outside: they already hold the pixel that the authors add to the last one inside.
        truth = torch.cat([truth[:, :2].floor(), (truth[:, 2:] + 0.5).floor()], 1)
        spread = values.max() - values.min()
        if not len(truth) or not spread:
            continue
        min_area = float(thresholds[0] * box_area(truth).min())
        scaled = (values - values.min()) / spread
        levels, components = map(torch.from_numpy, component_boxes(scaled.numpy(), min_area))
        best = box_iou(torch.minimum(components + corner, last) + corner, truth).amax(1)
        fits = best[:, None] >= thresholds
        for row in range(len(thresholds)):
            hits[i, row, levels[fits[:, row]]] = True
    return hits.to(saliency.device)


def max_box_acc_v2(hits: Tensor, weights: Tensor | None = None) -> Tensor:
    """MaxBoxAccV2 of R images under S weightings, in percent.

    Args:
        hits: (R, 3, 256) bool, from `box_accuracy_hits`, of images that have a box.
        weights: (S, R), at least 0: how often each image counts, such as its number of draws in a bootstrap sample.
            None is once each.

    Returns:
        (S,) values, or a scalar without weights; NaN where all weights are 0.

    Raises:
        ValueError: A shape does not fit.
    """
    if hits.ndim != 3 or hits.shape[1:] != (len(BOX_ACCURACY_IOUS), NUM_LEVELS) or hits.dtype != torch.bool:
        raise ValueError(f'hits must be bool of shape (R, 3, 256), got {hits.dtype} of {tuple(hits.shape)}.')
    if weights is None:
        return max_box_acc_v2(hits, torch.ones(1, len(hits), device=hits.device))[0]
    if weights.ndim != 2 or weights.shape[1] != len(hits):
        raise ValueError(f'weights must have shape (S, {len(hits)}), a weight an image, got {tuple(weights.shape)}.')
    dtype = torch.float32 if hits.device.type == 'mps' else torch.float64
    weights = weights.to(dtype)
    return best_levels(weights @ hits.flatten(1).to(dtype) / weights.sum(1, keepdim=True))


def best_levels(shares: Tensor) -> Tensor:
    """MaxBoxAccV2 of shares of hits, in percent: the best level of each IoU threshold, averaged over the thresholds.

    Args:
        shares: (S, 768) means of the hits of 3 thresholds at 256 levels, in [0, 1].

    Returns:
        (S,).
    """
    return 100 * shares.unflatten(1, (len(BOX_ACCURACY_IOUS), NUM_LEVELS)).amax(2).mean(1)
