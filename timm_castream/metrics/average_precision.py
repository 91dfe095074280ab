"""Average precision of multi-label predictions, as the Pascal VOC devkit defines it since 2010.

N images, C classes, S samples of the images with a weight for each image.
"""

from __future__ import annotations

import numpy as np


def average_precision(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision of one class.

    The sum of (recall_n - recall_{n-1}) precision_n over the distinct scores, where precision_n is the best precision
    at that recall or more.

    Args:
        labels: (N,) 1, 0, or negative where the image does not count.
        scores: (N,).
        weights: (S, N) how often each image counts, in each of S samples.

    Returns:
        (S,) in [0, 1], NaN where a sample has no positive.
    """
    order = np.argsort(-scores, kind='stable')
    order = order[labels[order] >= 0]
    if not len(order):
        return np.full(len(weights), np.nan)
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # images of equal score come in together
    weights = weights[:, order]
    hits = np.cumsum(weights * (labels[order] > 0), axis=1)[:, ends]
    found = np.cumsum(weights, axis=1)[:, ends]
    with np.errstate(invalid='ignore'):
        precision = np.maximum.accumulate((hits / np.maximum(found, 1))[:, ::-1], axis=1)[:, ::-1]
        return (np.diff(hits, prepend=0, axis=1) * precision).sum(1) / hits[:, -1]


def mean_average_precision(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Average precision, averaged over the classes that have a positive.

    Args:
        labels: (N, C) 1, 0, or negative where the image does not count for the class.
        scores: (N, C).
        weights: (S, N) how often each image counts, in each of S samples. None: each image once, in one sample.

    Returns:
        (S,) in percent, NaN where a sample has no positive of any class.
    """
    weights = np.ones((1, len(labels))) if weights is None else weights
    precisions = np.stack([average_precision(*pair, weights) for pair in zip(labels.T, scores.T, strict=True)])
    defined = ~np.isnan(precisions)
    counts = defined.sum(0)
    totals = np.where(defined, precisions, 0).sum(0)
    result = np.full(len(weights), np.nan)
    result[counts > 0] = 100 * totals[counts > 0] / counts[counts > 0]
    return result
