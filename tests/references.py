"""Calculations of others, written from their definitions, to hold the project's against."""
from __future__ import annotations

import numpy as np


def devkit_average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """As the VOC devkit since 2010, one threshold at a time: the area under precision made to fall with recall."""
    points = []
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        hits = int((labels[chosen] == 1).sum())
        points.append((hits / int((labels == 1).sum()), hits / int(chosen.sum())))
    area, before = 0., 0.
    for recall, _ in points:
        area += (recall - before) * max(p for r, p in points if r >= recall)
        before = recall
    return area
