"""Average precision, against the devkit's definition one threshold at a time."""

from __future__ import annotations

import numpy as np
import pytest
from references import devkit_average_precision

from timm_castream.metrics.average_precision import average_precision, mean_average_precision


def test_average_precision_is_the_devkits_with_ties_and_weights() -> None:
    rng = np.random.default_rng(5)
    labels, scores = rng.integers(0, 2, 60), rng.integers(0, 20, 60) / 20
    weights = rng.integers(0, 4, (5, 60)).astype(float)
    repeats = weights.astype(int)
    expected = [devkit_average_precision(labels.repeat(n), scores.repeat(n)) for n in repeats]
    assert average_precision(labels, scores, weights) == pytest.approx(expected)


def test_average_precision_leaves_out_negative_labels_and_is_undefined_without_positives() -> None:
    labels, scores = np.array([1, -1, 0, 1, -1]), np.array([0.3, 0.9, 0.6, 0.8, 0.1])
    assert average_precision(labels, scores, np.ones((1, 5)))[0] == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(average_precision(np.zeros(3), np.arange(3.0), np.ones((1, 3)))).all()
    assert np.isnan(average_precision(-np.ones(3), np.arange(3.0), np.ones((2, 3)))).all()


def test_the_mean_leaves_out_classes_without_a_positive_and_is_undefined_without_any() -> None:
    rng = np.random.default_rng(6)
    labels, scores = rng.integers(-1, 2, (40, 3)), rng.normal(size=(40, 3))
    labels[:, 1] = np.minimum(labels[:, 1], 0)
    kept = labels >= 0
    expected = np.mean([devkit_average_precision(labels[kept[:, c], c], scores[kept[:, c], c]) for c in (0, 2)])
    assert mean_average_precision(labels, scores) == pytest.approx([100 * expected])
    assert np.isnan(mean_average_precision(np.minimum(labels, 0), scores)).all()
