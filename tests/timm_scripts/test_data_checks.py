"""Data sets of timm's scripts against the model and the options."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from timm_castream.timm_scripts.data import DataChecks


def data_set(classes: int, targets: np.ndarray | None = None) -> SimpleNamespace:
    targets = np.zeros(3) if targets is None else targets
    return SimpleNamespace(reader=SimpleNamespace(class_to_idx={str(i): i for i in range(classes)}, targets=targets))


def create(dataset: SimpleNamespace, num_classes: int, **options: object) -> SimpleNamespace:
    checks = DataChecks(Namespace(**options))
    checks.create_model(lambda name: SimpleNamespace(num_classes=num_classes))('any')
    return checks.create_dataset(lambda name, root=None: dataset)('any', root='any')


def test_more_classes_than_the_model_has_are_refused_with_the_option_to_pass():
    with pytest.raises(ValueError, match='The data set has 4 classes, the model has 3: pass --num-classes 4'):
        create(data_set(4), 3)


@pytest.mark.parametrize('classes', [2, 3])
def test_as_many_classes_or_fewer_are_handed_on(classes):
    dataset = data_set(classes)
    assert create(dataset, 3) is dataset


def test_a_data_set_without_a_list_of_classes_is_handed_on():
    dataset = SimpleNamespace()
    assert create(dataset, 3, mixup=0.2) is dataset


@pytest.mark.parametrize('option', [{'mixup': 0.2}, {'cutmix': 1.0}, {'cutmix_minmax': [0.2, 0.8]}], ids=str)
def test_multi_label_data_are_not_mixed(option):
    dense = data_set(3, np.zeros((5, 3)))
    with pytest.raises(ValueError, match='several labels for each image'):
        create(dense, 3, **option)
    assert create(dense, 3, **dict.fromkeys(option)) is dense
    assert create(data_set(3), 3, **option)


def create_loader(number: int, batch_size: int, is_training: bool) -> DataLoader:
    checks = DataChecks(Namespace(batch_size=batch_size))
    dataset = TensorDataset(torch.zeros(number))
    return checks.create_loader(lambda dataset, is_training: DataLoader(dataset, batch_size, drop_last=is_training))(
        dataset, is_training=is_training
    )


def test_training_images_that_fill_no_batch_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match='The 5 training images fill no batch of 6: pass a smaller --batch-size'):
        create_loader(5, 6, is_training=True)
    assert len(create_loader(6, 6, is_training=True)) == 1
    assert len(create_loader(5, 6, is_training=False)) == 1
