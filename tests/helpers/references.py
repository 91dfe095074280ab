"""Calculations and names of others, written from their definitions, to hold the project's against."""

from __future__ import annotations

import numpy as np
from torch import Tensor

# The 20 classes of Pascal VOC in the order of the devkit.
VOC_CLASSES = [
    'aeroplane',
    'bicycle',
    'bird',
    'boat',
    'bottle',
    'bus',
    'car',
    'cat',
    'chair',
    'cow',
    'diningtable',
    'dog',
    'horse',
    'motorbike',
    'person',
    'pottedplant',
    'sheep',
    'sofa',
    'train',
    'tvmonitor',
]


def devkit_average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """As the VOC devkit since 2010, one threshold at a time: the area under precision made to fall with recall."""
    points = []
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        hits = int((labels[chosen] == 1).sum())
        points.append((hits / int((labels == 1).sum()), hits / int(chosen.sum())))
    area, before = 0.0, 0.0
    for recall, _ in points:
        area += (recall - before) * max(p for r, p in points if r >= recall)
        before = recall
    return area


def devkit_mean_average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """In percent, over the classes with a positive; (N, C) labels are 1, 0 or, where an image does not count, -1."""
    columns = [(label[label >= 0], score[label >= 0]) for label, score in zip(labels.T, scores.T, strict=True)]
    return 100 * float(np.mean([devkit_average_precision(*column) for column in columns if (column[0] == 1).any()]))


def resized_bilinearly(saliency: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, half-pixel centres, clamped at the edges: align_corners=False."""
    h, w = saliency.shape
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y = max((i + 0.5) * h / height - 0.5, 0.0)
            x = max((j + 0.5) * w / width - 0.5, 0.0)
            y0, x0 = min(int(y), h - 1), min(int(x), w - 1)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            top = saliency[y0, x0] * (1 - (x - x0)) + saliency[y0, x1] * (x - x0)
            low = saliency[y1, x0] * (1 - (x - x0)) + saliency[y1, x1] * (x - x0)
            out[i, j] = top * (1 - (y - y0)) + low * (y - y0)
    return out


def count_masks(maps: Tensor) -> int:
    """The number of different Score-CAM masks of (B, D, h, w) maps: constant channels give none, equal ones give one."""
    masks = set()
    for image, channels in enumerate(maps.detach().cpu().numpy()):
        for channel in channels:
            low, high = channel.min(), channel.max()
            if high > low:
                masks.add((image, *((channel - low) / (high - low)).ravel().tolist()))
    return len(masks)
