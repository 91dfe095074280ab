"""Localisation metrics: how well a saliency map finds the boxes of an object, in percent.

With S a map over the H x W pixels of the network's input, and B_j the boxes of the class explained:

* Pointing game        SP = mean [a maximum of S lies in a box]           higher is better
* Energy pointing game EP = mean sum of S in the boxes / sum of S         higher is better (Score-CAM, arXiv 1910.01279)
* Localisation error   LE = 1 - mean max_j [IoU(B_p, B_j) > 0.5]          lower is better
  B_p is the tight box of the largest 4-connected component of [S > mean(S)].

The maps are those of the other metrics: `images.resize_saliency` resizes them, bilinearly.

Boxes are (R, J, 4) tensors for R maps: x0, y0, x1, y1 in pixels of the input, where x1 and y1 lie just outside. Rows of
NaN fill up to J. A pixel lies in a box if its centre does.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from .._utils.checks import check_unit_range

__all__ = ['energy_pointing_game', 'has_box', 'localization_error', 'pointing_game']


def has_box(boxes: Tensor) -> Tensor:
    """(R,) bool: True for each map that has a box with an area.

    The metrics have no value for the other maps: leave these out.

    Args:
        boxes: (R, J, 4).
    """
    return is_box(boxes).any(1)


def pointing_game(saliency: Tensor, boxes: Tensor) -> Tensor:
    """100 for each map with a maximum in one of its boxes, else 0.

    One of several equal maxima suffices. A constant map has no maximum and gets 0.

    Args:
        saliency: (R, H, W) in [0, 1].
        boxes: (R, J, 4).

    Returns:
        (R,) values, whose mean is SP; NaN for a map without a box.

    Raises:
        ValueError: A shape or a value does not fit.
    """
    boxes = check_boxes(saliency, boxes)
    flat = saliency.flatten(1)
    highest = flat.amax(1, keepdim=True)
    is_maximum = (flat == highest) & (highest > flat.amin(1, keepdim=True))
    hit = (is_maximum & _inside(boxes, saliency).flatten(1)).any(1)
    return _or_nan(100 * hit.to(saliency.dtype), boxes)


def energy_pointing_game(saliency: Tensor, boxes: Tensor) -> Tensor:
    """The share of each map's sum that lies in the union of its boxes, in percent. A map of zeros gets 0.

    Args, Raises: as `pointing_game`.

    Returns:
        (R,) values in [0, 100], whose mean is EP; NaN for a map without a box.
    """
    boxes = check_boxes(saliency, boxes)
    exact = saliency if saliency.device.type == 'mps' else saliency.double()  # MPS has no float64
    inside = (exact * _inside(boxes, saliency)).sum((1, 2))
    total = exact.sum((1, 2))
    return _or_nan((100 * inside / torch.where(total > 0, total, 1.0)).to(saliency.dtype), boxes)


def localization_error(saliency: Tensor, boxes: Tensor) -> Tensor:
    """100 for each map whose predicted box has an IoU of at most 0.5 with each of its boxes, else 0.

    The predicted box is the tight box of the largest 4-connected component of the pixels above the map's mean. Where
    several are largest, the first in reading order counts. A constant map predicts no box and gets 100.

    Args, Raises: as `pointing_game`.

    Returns:
        (R,) values, whose mean is LE; NaN for a map without a box.
    """
    from scipy import ndimage

    boxes = check_boxes(saliency, boxes)
    maps = saliency.detach().cpu().double().numpy()
    # The mean of a constant map may be rounded down below its values.
    means = np.maximum(maps.mean((1, 2)), maps.min((1, 2)))
    missed = torch.ones(len(maps), dtype=torch.bool)
    for i, (values, mean) in enumerate(zip(maps, means, strict=True)):
        labels, num_components = ndimage.label(values > mean)
        if num_components:
            largest = np.bincount(labels.ravel())[1:].argmax()
            rows, columns = ndimage.find_objects(labels)[largest]
            predicted = torch.tensor([[columns.start, rows.start, columns.stop, rows.stop]], dtype=torch.float64)
            missed[i] = not (box_iou(predicted, boxes[i].cpu().double()) > 0.5).any()
    return _or_nan(100 * missed.to(saliency), boxes)


def is_box(boxes: Tensor) -> Tensor:
    """(..., 4) boxes -> (...) bool: True where a box has an area. NaN gives False."""
    return (boxes[..., 2:] > boxes[..., :2]).all(-1)


def _inside(boxes: Tensor, saliency: Tensor) -> Tensor:
    """(R, H, W) bool: True at pixels whose centres lie in one of the boxes."""
    y, x = (torch.arange(size, device=saliency.device) + 0.5 for size in saliency.shape[1:])
    inside = torch.zeros_like(saliency, dtype=torch.bool)
    for box in boxes.unbind(1):
        x0, y0, x1, y1 = box[:, :, None].unbind(1)
        inside |= ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None]
    return inside


def _or_nan(values: Tensor, boxes: Tensor) -> Tensor:
    return values.masked_fill(~has_box(boxes), torch.nan)


def check_boxes(saliency: Tensor, boxes: Tensor) -> Tensor:
    """The boxes on the maps' device. Raises ValueError unless there are boxes for each map, (R, J, 4), or NaN."""
    if saliency.ndim != 3:
        raise ValueError(f'saliency must have shape (R, H, W), the size of the input, got {tuple(saliency.shape)}.')
    check_unit_range('saliency', saliency)
    if boxes.ndim != 3 or len(boxes) != len(saliency) or boxes.shape[2] != 4 or not boxes.is_floating_point():
        raise ValueError(
            f'boxes must be floating point of shape ({len(saliency)}, J, 4), got {boxes.dtype} of {tuple(boxes.shape)}.'
        )
    known = boxes[~boxes.isnan().all(-1)]
    wrong = known[~(known.isfinite().all(-1) & (known[:, 2:] >= known[:, :2]).all(-1))]
    if len(wrong):
        raise ValueError(f'boxes must be x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, got {wrong[0].tolist()}.')
    return boxes.to(saliency.device)
