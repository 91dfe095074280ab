"""Classes by name, against the names themselves."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder

from timm_castream.datasets import DigitScenes, align_classes, label_names_of
from timm_castream.datasets.classes import match_classes


def test_missing_classes_are_named_and_another_order_of_all_is_said(caplog):
    with caplog.at_level(logging.INFO):
        assert match_classes(['b', 'a'], ['a', 'b', 'c', 'd'], 'val') == {'b': 1, 'a': 0}
        assert "val lacks 2 classes ('c', 'd'); the other" in caplog.text and 'another order' not in caplog.text
        caplog.clear()
        assert match_classes(['b', 'a', 'c'], ['a', 'b', 'c'], 'val') == {'b': 1, 'a': 0, 'c': 2}
    assert 'another order' in caplog.text
    caplog.clear()
    assert match_classes(['a', 'b'], ['a', 'b'], 'val') == {'a': 0, 'b': 1} and not caplog.text


def test_new_classes_are_refused_with_a_name_that_is_near():
    with pytest.raises(ValueError, match=r"val has the class 'zebras' that is not known.* Is zebras meant to be zebra"):
        match_classes(['a', 'zebras'], ['a', 'zebra'], 'val')
    with pytest.raises(
        ValueError, match=r"2 classes \('x', 'y'\) that are not known: the known classes are 'a', 'b'\."
    ):
        match_classes(['x', 'y'], ['a', 'b'], 'val')


def test_the_names_near_an_unknown_class_are_in_the_words_of_people():
    known = [f'n{i:08}' for i in range(9)]
    texts = dict(
        zip(known, ['tabby, tabby cat', 'Egyptian cat', 'catamaran', 'hot dog, red hot', *'efghi'], strict=True)
    )
    with pytest.raises(ValueError, match=r"are 9\. Near Cat are 'tabby cat', 'Egyptian cat'\. A class map"):
        match_classes(['Cat'], known, 'val', texts)
    with pytest.raises(ValueError, match=r'are 9\. Is hot_dogs meant to be hot dog\?'):
        match_classes(['hot_dogs', known[0]], known, 'val', texts)
    # No name is near: the first ones are shown as people read them.
    with pytest.raises(
        ValueError, match=r"are 'tabby, tabby cat', 'Egyptian cat', 'catamaran', .*, \.\.\.\. A class map"
    ):
        match_classes(['xylophone'], known, 'val', texts)


def test_targets_of_any_data_set_get_the_indices_of_the_names():
    names = ['nine', *'876543210', '9']
    scenes = DigitScenes('train', num_images=20)
    before = scenes.labels.copy()
    align_classes(scenes, names)
    assert [names[i] for i in scenes.labels] == [str(digit) for digit in before]
    assert label_names_of(scenes) == names and DigitScenes.classes == [str(digit) for digit in range(10)]


def test_targets_of_torchvisions_folders_get_the_indices_of_the_names(tmp_path):
    for name in 'abc':
        (tmp_path / name).mkdir()
        Image.new('RGB', (2, 2)).save(tmp_path / name / '0.png')
    data = ImageFolder(tmp_path, target_transform=lambda label: (label + 1) % 3)
    before = [data[i][1] for i in range(3)]
    align_classes(data, ['c', 'd', 'b', 'a'])
    assert [['c', 'd', 'b', 'a'][data[i][1]] for i in range(3)] == ['abc'[label] for label in before]


def test_several_labels_an_image_move_together():
    class Reader:
        targets = np.array([[1, 0, -1], [0, 1, 1]], dtype=np.float32)
        class_to_idx = {'a': 0, 'b': 1, 'c': 2}

    class Data:
        reader = Reader()

    data = Data()
    align_classes(data, ['c', 'new', 'a', 'b'])
    assert data.reader.targets.tolist() == [[-1, -1, 1, 0], [1, -1, 0, 1]]  # nothing is known of the class `new`


def test_a_data_set_without_names_stays_and_one_that_cannot_change_is_refused():
    data = TensorDataset(torch.zeros(3))
    align_classes(data, ['a', 'b'])
    assert label_names_of(data) is None
    data.classes = ['b', 'a']
    with pytest.raises(ValueError, match='another order'):
        align_classes(data, ['a', 'b'])
