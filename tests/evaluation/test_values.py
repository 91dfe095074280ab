"""Values by name: joined, cut, written as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from timm_castream.evaluation.values import ImageValues

SCORE = 'gap/score'


def make(images: list[int], pairs: list[int], seed: int = 0) -> ImageValues:
    """Values of images and of pairs of these images, of every kind that an evaluation has."""
    rng = np.random.default_rng(seed)
    count = len(pairs)
    return ImageValues(
        {
            'image': np.array(images),
            'label': rng.integers(-1, 2, (len(images), 3)),
            SCORE: rng.random((len(images), 3)),
        },
        {
            'image': np.array(pairs, dtype=int),
            'gap/class': rng.integers(0, 3, count),
            'gap/prob': rng.random(count),
            'gap/has_box': rng.random(count) < 0.5,
            'gap/prob/average_drop': np.where(np.arange(count) == 1, np.nan, 100 * rng.random(count)),
            'gap/prob/max_box_acc_v2': rng.random((count, 12)) < 0.5,
            'gap/prob/insertion_curve': rng.random((count, 4)),
        },
    )


def assert_same(one: ImageValues, other: ImageValues) -> None:
    for table, expected in ((one.images, other.images), (one.pairs, other.pairs)):
        assert list(table) == list(expected)
        for name, array in table.items():
            assert array.dtype.kind == expected[name].dtype.kind, name
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_json_keeps_every_bit_and_every_kind_of_number() -> None:
    values = make([3, 5, 7], [3, 5, 5, 7])
    assert_same(ImageValues.from_json(json.loads(json.dumps(values.to_json()))), values)


def test_parts_are_joined_in_the_order_of_the_images() -> None:
    whole = make([1, 2, 4, 9], [1, 2, 2, 4])
    late, early = whole.without([1, 2]), whole.without([4, 9])
    assert late.images['image'].tolist() == [4, 9] and late.pairs['image'].tolist() == [4]
    assert_same(ImageValues.concatenate([late, early]), whole)
    assert ImageValues.concatenate([]).pairs['image'].tolist() == []


def test_a_part_without_pairs_or_without_curves_may_be_joined() -> None:
    whole, lonely = make([1, 2], [1, 2]), make([0], [])
    joined = ImageValues.concatenate([whole, lonely])
    assert joined.images['image'].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(joined.pairs['gap/prob'], whole.pairs['gap/prob'])
    bare = make([5], [5])
    del bare.pairs['gap/prob/insertion_curve']
    assert 'gap/prob/insertion_curve' not in ImageValues.concatenate([whole, bare]).pairs


def test_a_line_a_pair_has_the_columns_of_its_image() -> None:
    values = make([3, 5, 7], [3, 5, 5])
    file = io.StringIO()
    values.write_csv(file)
    header, *lines = csv.reader(io.StringIO(file.getvalue()))
    assert header == [
        'image', 'label/0', 'label/1', 'label/2', f'{SCORE}/0', f'{SCORE}/1', f'{SCORE}/2',
        'gap/class', 'gap/prob', 'gap/prob/average_drop',
    ]  # fmt: skip
    assert [line[0] for line in lines] == ['3', '5', '5', '7']
    assert [len(line) for line in lines] == [10, 10, 10, 7]
    for line, pair in zip(lines, range(3), strict=False):
        image = values.images['image'].tolist().index(int(line[0]))
        assert [float(cell) for cell in line[4:7]] == pytest.approx(values.images[SCORE][image])
        drop = values.pairs['gap/prob/average_drop'][pair]
        assert float(line[9]) == pytest.approx(drop, nan_ok=True)
        assert line[7] == str(values.pairs['gap/class'][pair])


def test_means_are_of_numbers_that_are_there() -> None:
    values = make([3, 5, 7], [3, 5, 5, 7])
    means = values.means()
    drops = [drop for drop in values.pairs['gap/prob/average_drop'].tolist() if drop == drop]
    assert len(drops) == 3
    assert means['gap/prob/average_drop'] == pytest.approx(sum(drops) / len(drops))
    assert 'image' not in means and 'gap/class' not in means
    assert all(type(value) is float for value in means.values())
