"""Localisation metrics, against their definitions written as float64 loops over pixels."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from timm_castream.metrics.localization import energy_pointing_game, has_box, localization_error, pointing_game
from timm_castream.metrics.max_box_acc import box_accuracy_hits, max_box_acc_v2

NAN_BOX = [math.nan] * 4
METRICS = (pointing_game, energy_pointing_game, localization_error, box_accuracy_hits)
# Cut at 0, .2, .4, .6 and .8 of 255, this map gives these boxes in the tests of MaxBoxAccV2's authors.
WSOL_MAP = torch.tensor([[0, 0, 0, 0, 0], [0, 0.4, 0.4, 0.4, 0.6], [0, 0.4, 1, 0.8, 0.6], [0, 0.4, 0.4, 0.4, 0.6]])
WSOL_BOXES = {0: [1, 1, 4, 3], 51: [1, 1, 4, 3], 102: [2, 1, 4, 3], 153: [2, 2, 4, 3], 204: [2, 2, 3, 3]}


def resized(h, w, height, width, seed):
    """A map as the protocol makes it: a coarse one, resized, with ties along the edges."""
    coarse = torch.rand(1, 1, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.interpolate(coarse, (height, width), mode='bilinear').float()[0, 0]


MAPS = {
    '7x7': resized(7, 7, 56, 56, 0),
    'wide': resized(3, 5, 24, 40, 1),
    'noise': torch.rand(24, 31, generator=torch.Generator().manual_seed(2)),
    'three values': (torch.rand(25, 25, generator=torch.Generator().manual_seed(3)) * 3).floor() / 2,
    'rectified': (resized(9, 9, 36, 36, 4) - 0.5).clamp(min=0),
}


def boxes_for(saliency, seed=0):
    """Two boxes with fractional corners, and a row of padding."""
    rng = np.random.default_rng(seed)
    height, width = saliency.shape
    x = np.sort(rng.uniform(0, width, (2, 2)))
    y = np.sort(rng.uniform(0, height, (2, 2)))
    return [[x[i, 0], y[i, 0], x[i, 1], y[i, 1]] for i in range(2)] + [NAN_BOX]


def iou(a, b, inclusive):
    """Of two boxes x0, y0, x1, y1."""
    extra = 1 if inclusive else 0
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]) + extra)
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]) + extra)
    areas = [(box[2] - box[0] + extra) * (box[3] - box[1] + extra) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def whole_pixels(box):
    """First and last pixels inside of a box whose x1 and y1 lie just outside, as files of boxes have them."""
    return [math.floor(box[0]), math.floor(box[1]), math.floor(box[2] + 0.5) - 1, math.floor(box[3] + 0.5) - 1]


def outside(box):
    """x1 and y1 just outside, from the last pixels inside."""
    return [box[0], box[1], box[2] + 1, box[3] + 1]


def flood(mask, neighbours):
    """The components of a mask, each a list of (row, column), in reading order of their first pixels."""
    seen, components = np.zeros_like(mask), []
    for start in zip(*np.nonzero(mask), strict=True):
        if seen[start]:
            continue
        seen[start] = True
        component, queue = [], [start]
        while queue:
            row, column = queue.pop()
            component.append((row, column))
            for i, j in neighbours:
                place = (row + i, column + j)
                inside = 0 <= place[0] < mask.shape[0] and 0 <= place[1] < mask.shape[1]
                if inside and mask[place] and not seen[place]:
                    seen[place] = True
                    queue.append(place)
        components.append(component)
    return components


FOUR = ((0, 1), (0, -1), (1, 0), (-1, 0))


def pixels_in(box, saliency):
    """The (row, column) whose centres lie in a box."""
    return {
        (row, column)
        for row, column in itertools.product(*map(range, saliency.shape))
        if box[0] <= column + 0.5 < box[2] and box[1] <= row + 0.5 < box[3]
    }


def as_batch(saliency, boxes):
    return saliency[None], torch.tensor([boxes], dtype=torch.float64)


@pytest.mark.parametrize('saliency', MAPS.values(), ids=MAPS)
class TestAgainstLoops:
    def test_pointing_game_asks_whether_a_maximum_is_in_a_box(self, saliency):
        maxima = set(zip(*np.nonzero((saliency == saliency.max()).numpy()), strict=True))
        for seed in range(10):
            boxes = boxes_for(saliency, seed)
            expected = any(maxima & pixels_in(box, saliency) for box in boxes[:2])
            assert pointing_game(*as_batch(saliency, boxes)).tolist() == [100.0 * expected]
        for flat, expected in ((int(saliency.argmax()), 100.0), (int(saliency.argmin()), 0.0)):
            row, column = divmod(flat, saliency.shape[1])
            assert pointing_game(*as_batch(saliency, [[column, row, column + 1, row + 1]])).tolist() == [expected]

    def test_energy_is_the_share_in_the_union_of_the_boxes(self, saliency):
        for seed in range(3):
            boxes = boxes_for(saliency, seed)
            union = pixels_in(boxes[0], saliency) | pixels_in(boxes[1], saliency)
            expected = 100 * sum(float(saliency[i]) for i in union) / float(saliency.double().sum())
            assert energy_pointing_game(*as_batch(saliency, boxes)).item() == pytest.approx(expected, rel=1e-6)

    def test_localization_error_compares_the_largest_4_connected_component_above_the_mean(self, saliency):
        above = (saliency.double() > saliency.double().mean()).numpy()
        rows, columns = zip(*max(flood(above, FOUR), key=len), strict=True)
        predicted = [min(columns), min(rows), max(columns) + 1, max(rows) + 1]
        around = [predicted[0] - 0.4, predicted[1], predicted[2], predicted[3] + 0.3]
        halved = [predicted[0], predicted[1], (predicted[0] + predicted[2]) / 2, predicted[3]]  # IoU of exactly 0.5
        for boxes, expected in (([around], 0.0), ([halved], 100.0), ([halved, NAN_BOX, around], 0.0)):
            assert localization_error(*as_batch(saliency, boxes)).tolist() == [expected]
        for seed in range(10):
            boxes = boxes_for(saliency, seed)
            hit = max(iou(predicted, box, inclusive=False) for box in boxes[:2]) > 0.5
            assert localization_error(*as_batch(saliency, boxes)).tolist() == [100.0 * (not hit)]

    def test_box_accuracy_hits_are_those_of_every_8_connected_component_at_every_level(self, saliency):
        scaled = saliency.double().numpy()
        scaled = (scaled - scaled.min()) / (scaled.max() - scaled.min())
        levels = np.floor(255 * scaled)
        height, width = levels.shape
        for seed in range(3):
            boxes = boxes_for(saliency, seed)
            expected = np.zeros((3, 256), dtype=bool)
            for level in range(256):
                labels, _ = ndimage.label(levels > level, structure=np.ones((3, 3)))
                for rows, columns in ndimage.find_objects(labels):
                    found = [columns.start, rows.start, min(columns.stop, width - 1), min(rows.stop, height - 1)]
                    best = max(iou(found, whole_pixels(box), inclusive=True) for box in boxes[:2])
                    expected[:, level] |= [best >= threshold for threshold in (0.3, 0.5, 0.7)]
            hits = box_accuracy_hits(*as_batch(saliency, boxes))[0]
            assert np.array_equal(hits.numpy(), expected)


class TestBoxAccuracy:
    def test_the_known_map_gives_the_boxes_of_the_metrics_authors(self):
        """Each of their boxes fits itself perfectly; IoU([1, 2, 5, 6], [3, 1, 4, 5]) is 8 / 27."""
        assert iou([1, 2, 5, 6], [3, 1, 4, 5], inclusive=True) == 8 / 27
        for level, box in WSOL_BOXES.items():
            hits = box_accuracy_hits(*as_batch(WSOL_MAP, [outside(box)]))[0]
            assert hits[:, level].all()
            misfits = [k for k, other in WSOL_BOXES.items() if iou(other, box, inclusive=True) < 0.7]
            assert not hits[2, misfits].any()

    def test_an_iou_of_8_in_27_misses_the_lowest_threshold_and_9_in_27_hits_it(self):
        saliency = torch.zeros(9, 9)
        saliency[2:6, 1:5] = 1.0  # found as [1, 2, 5, 6]
        assert not box_accuracy_hits(*as_batch(saliency, [outside([3, 1, 4, 5])])).any()
        hits = box_accuracy_hits(*as_batch(saliency, [outside([3, 2, 4, 6])]))  # 10 of 25
        assert hits[0, 0, :255].all() and not hits[0, 1:].any() and not hits[0, 0, 255]

    def test_a_box_that_ends_with_the_map_is_not_a_pixel_larger_than_the_map(self):
        """A component of the whole map has an IoU of 1 with the box of the whole map, and one of 24 / 49 with 24 pixels."""
        saliency = torch.ones(7, 7)
        saliency[0, 0] = 0.0  # level 0 leaves a component around it, of the whole map
        hits = box_accuracy_hits(*as_batch(saliency, [outside([0, 0, 6, 6])]))[0]
        assert hits[:, 0].all()
        hits = box_accuracy_hits(*as_batch(saliency, [outside([0, 0, 5, 3])]))[0]
        assert hits[:, 0].tolist() == [True, False, False]  # 24 / 49 lies below 0.5; 35 / 56 of a larger box would not

    def test_any_component_suffices_not_only_the_largest(self):
        saliency = torch.zeros(20, 20)
        saliency[1:9, 1:9], saliency[12:15, 12:15] = 0.5, 1.0
        small, large = (as_batch(saliency, [outside(box)]) for box in ([12, 12, 15, 15], [1, 1, 9, 9]))
        assert box_accuracy_hits(*small)[0, 2, :255].all()
        assert box_accuracy_hits(*large)[0, 2].tolist() == [level < 127 for level in range(256)]

    def test_diagonal_pixels_are_one_component(self):
        hits = box_accuracy_hits(*as_batch(torch.eye(12), [[0, 0, 12, 12]]))
        assert hits[0, :, :255].all()
        assert localization_error(*as_batch(torch.eye(12), [[0, 0, 12, 12]])).item() == 100  # 4-connected: one pixel

    def test_the_metric_is_the_mean_over_thresholds_of_the_best_level_under_each_weighting(self):
        rng = np.random.default_rng(0)
        hits, weights = rng.random((7, 3, 256)) < 0.3, rng.integers(0, 4, (5, 7))
        expected = []
        for weighting in weights:
            best = [
                max(
                    sum(w * h for w, h in zip(weighting, hits[:, t, level], strict=True)) / weighting.sum()
                    for level in range(256)
                )
                for t in range(3)
            ]
            expected.append(100 * sum(best) / 3)
        found = max_box_acc_v2(torch.from_numpy(hits), torch.from_numpy(weights))
        assert found.tolist() == pytest.approx(expected)
        plain = max_box_acc_v2(torch.from_numpy(hits))
        assert plain.shape == () and plain == max_box_acc_v2(torch.from_numpy(hits), torch.ones(1, 7))[0]

    def test_weights_of_nothing_give_nan_and_wrong_shapes_are_refused(self):
        hits = torch.zeros(2, 3, 256, dtype=torch.bool)
        assert max_box_acc_v2(hits, torch.zeros(1, 2)).isnan().all()
        with pytest.raises(ValueError, match=r'weights must have shape \(S, 2\), a weight an image, got \(2,\)'):
            max_box_acc_v2(hits, torch.ones(2))
        with pytest.raises(ValueError, match=r'hits must be bool of shape \(R, 3, 256\), got torch.float32'):
            max_box_acc_v2(hits.float())


class TestTiesAndConstants:
    def test_one_of_several_maxima_in_a_box_suffices(self):
        saliency = torch.zeros(8, 8)
        saliency[1, 1] = saliency[6, 6] = 1.0
        assert pointing_game(*as_batch(saliency, [[6, 6, 7, 7]])).item() == 100

    @pytest.mark.parametrize('value', [0.0, 0.1, 1 / 3, 1.0])
    def test_a_constant_map_locates_nothing_whatever_its_value(self, value):
        batch = as_batch(torch.full((31, 29), value), [[0, 0, 29, 31]])
        assert pointing_game(*batch).item() == 0 and localization_error(*batch).item() == 100
        assert not box_accuracy_hits(*batch).any()
        assert energy_pointing_game(*batch).item() == (100 if value else 0)

    def test_the_first_of_equally_large_components_is_the_prediction(self):
        saliency = torch.zeros(10, 10)
        saliency[1:3, 5:8] = saliency[6:9, 1:3] = 1.0
        assert localization_error(*as_batch(saliency, [[5, 1, 8, 3]])).item() == 0
        assert localization_error(*as_batch(saliency, [[1, 6, 3, 9]])).item() == 100

    def test_overlapping_boxes_count_their_pixels_once(self):
        saliency = torch.full((4, 4), 0.5)
        assert energy_pointing_game(*as_batch(saliency, [[0, 0, 2, 4], [0, 0, 3, 4]])).item() == 75


class TestBoxes:
    def test_a_map_without_a_box_has_no_value(self):
        saliency = torch.stack((WSOL_MAP, WSOL_MAP, WSOL_MAP))
        boxes = torch.tensor([[NAN_BOX, NAN_BOX], [NAN_BOX, [0, 0, 4, 4]], [[2, 2, 2, 4], NAN_BOX]])
        assert has_box(boxes).tolist() == [False, True, False]  # the last one has no area
        for metric in (pointing_game, energy_pointing_game, localization_error):
            assert metric(saliency, boxes).isnan().tolist() == [True, False, True]
        assert box_accuracy_hits(saliency, boxes).flatten(1).any(1).tolist() == [False, True, False]

    def test_no_columns_of_boxes_are_no_boxes(self):
        empty = torch.empty(1, 0, 4)
        assert not has_box(empty).any() and pointing_game(WSOL_MAP[None], empty).isnan().all()
        assert not box_accuracy_hits(WSOL_MAP[None], empty).any()

    def test_maps_of_a_batch_do_not_influence_each_other(self):
        maps = torch.stack([resized(7, 7, 30, 30, seed) for seed in range(4)])
        boxes = torch.tensor([boxes_for(maps[0], seed) for seed in range(4)])
        for metric in METRICS:
            alone = torch.cat([metric(maps[i : i + 1], boxes[i : i + 1]) for i in range(4)])
            assert torch.equal(metric(maps, boxes), alone)

    @pytest.mark.parametrize('metric', METRICS)
    @pytest.mark.parametrize(
        'saliency, boxes, message',
        [
            (torch.zeros(2, 5), torch.zeros(2, 1, 4), r'saliency must have shape \(R, H, W\), .* got \(2, 5\)'),
            (torch.full((1, 5, 5), 2.0), torch.zeros(1, 1, 4), r'saliency must lie in \[0, 1\], got 2'),
            (torch.full((1, 5, 5), math.nan), torch.zeros(1, 1, 4), r'saliency must lie in \[0, 1\], got nan'),
            (torch.zeros(2, 5, 5), torch.zeros(3, 1, 4), r'boxes must be .* \(2, J, 4\), .*\(3, 1, 4\)'),
            (
                torch.zeros(1, 5, 5),
                torch.zeros(1, 1, 4, dtype=torch.int64),
                'boxes must be floating point .* torch.int64',
            ),
            (
                torch.zeros(1, 5, 5),
                torch.tensor([[[3.0, 0, 1, 2]]]),
                r'x0 <= x1 and y0 <= y1, got \[3.0, 0.0, 1.0, 2.0\]',
            ),
            (torch.zeros(1, 5, 5), torch.tensor([[[0, 0, math.nan, 2.0]]]), 'got .*nan'),
            (torch.zeros(1, 5, 5), torch.tensor([[[0, 0, math.inf, 2.0]]]), 'got .*inf'),
        ],
    )
    def test_misfits_are_refused(self, metric, saliency, boxes, message):
        with pytest.raises(ValueError, match=message):
            metric(saliency, boxes)
