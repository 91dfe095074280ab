"""Components of a map above all levels at once, against scipy's labels of every level."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from timm_castream.metrics.components import component_boxes


def scaled(values):
    return (values - values.min()) / (values.max() - values.min())


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ridge():
    """A line of falling height that winds through the map: one component whose box grows at every level."""
    values = torch.zeros(17, 33, dtype=torch.float64)
    path = [(row, column) for row in range(0, 17, 4) for column in (range(33) if row % 8 == 0 else range(32, -1, -1))]
    for i, (row, column) in enumerate(path):
        values[row, column] = 1 - i / (2 * len(path))
    for row, column in ((1, 32), (2, 32), (3, 32), (5, 0), (6, 0), (7, 0), (9, 32), (10, 32), (11, 32), (13, 0)):
        values[row, column] = 0.2
    return values


MAPS = {
    'resized': F.interpolate(random(1, 1, 7, 7), (50, 64), mode='bilinear')[0, 0],
    'rectified': F.interpolate((random(1, 1, 9, 9) - 0.6).clamp(min=0), (45, 45), mode='bilinear')[0, 0],
    'noise': random(40, 30),
    'plateaus': (random(30, 30) * 4).floor(),
    'two values': (random(20, 20) > 0.6).double(),
    'sparse noise': random(60, 60) ** 8,
    'row': random(1, 50),
    'column': random(50, 1),
    'ridge': ridge(),
    'one pixel': F.pad(torch.ones(1, 1, dtype=torch.float64), (3, 5, 2, 4)),
}


def labelled(values):
    """(k, x0, y0, x1, y1) of every component and how often each occurs."""
    levels = np.floor(255 * values.numpy())
    found = Counter()
    for k in range(256):
        labels, _ = ndimage.label(levels > k, structure=np.ones((3, 3)))
        for rows, columns in ndimage.find_objects(labels):
            found[k, columns.start, rows.start, columns.stop - 1, rows.stop - 1] += 1
    return found


@pytest.mark.parametrize('values', MAPS.values(), ids=MAPS)
def test_components_are_those_of_every_level(values):
    values = scaled(values)
    ks, boxes = component_boxes(values.numpy())
    assert Counter((k, *box) for k, box in zip(ks.tolist(), boxes.tolist(), strict=True)) == labelled(values)


@pytest.mark.parametrize('values', MAPS.values(), ids=MAPS)
def test_a_minimum_leaves_out_smaller_components_alone(values):
    values = scaled(values)
    for min_area in (9.0, 60.5, 10_000.0):
        ks, boxes = component_boxes(values.numpy(), min_area)
        found = Counter((k, *box) for k, box in zip(ks.tolist(), boxes.tolist(), strict=True))
        expected = labelled(values)
        assert found <= expected
        for left_out in expected - found:
            _, x0, y0, x1, y1 = left_out
            assert (x1 - x0 + 2) * (y1 - y0 + 2) < min_area
