"""Data sets of timm's scripts against the model and the options."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from timm_castream.datasets import create_dataset
from timm_castream.hub.label_names import label_names
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


class TestNamesOfClasses:
    """The data sets of train.py and validate.py, read from folders, with a network of 3 classes."""

    @pytest.fixture
    def folders(self, tmp_path):
        for split, names in {'train': 'abc', 'val': 'bc', 'new': 'abz', 'flat': '.', '4': 'abcd'}.items():
            for name in names:
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                Image.new('RGB', (4, 4)).save(tmp_path / split / name / '0.png')
        return tmp_path

    @staticmethod
    def checks(*, num_classes: int = 3, names: list[str] | None = None, **options: object) -> DataChecks:
        checks = DataChecks(Namespace(**options))
        model = checks.create_model(timm.create_model)('test_resnet', num_classes=num_classes)
        if names:
            model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': names}
        return checks

    @staticmethod
    def read(checks: DataChecks, root: object, split: str, **options: object) -> dict[str, int]:
        dataset = checks.create_dataset(create_dataset)('', root=str(root), split=split, **options)
        return {dataset.filename(i): dataset[i][1] for i in range(len(dataset))}

    def test_those_of_the_training_images_become_the_models_and_its_checkpoints(self, folders):
        checks = self.checks()
        assert self.read(checks, folders, 'train', is_training=True) == {'a/0.png': 0, 'b/0.png': 1, 'c/0.png': 2}
        assert self.read(checks, folders, 'val', is_training=False) == {'b/0.png': 1, 'c/0.png': 2}
        assert label_names(checks.model) == ['a', 'b', 'c']
        args = Namespace()
        checks.create_saver(lambda model, args: None)(None, args=args)
        assert args.label_names == ['a', 'b', 'c']
        with pytest.raises(ValueError, match="class 'z'"):
            self.read(checks, folders, 'new', is_training=False)

    @pytest.mark.parametrize('in_file', [True, False])
    def test_a_split_alone_has_the_indices_of_the_weights(self, folders, tmp_path, in_file):
        """Of a checkpoint that validate.py loads later, or of a repository, whose names are in the model's cfg."""
        names = ['c', 'a', 'b']
        torch.save({'args': Namespace(label_names=names), 'state_dict': {}}, tmp_path / 'last.pth.tar')
        checks = self.checks(**({'checkpoint': str(tmp_path / 'last.pth.tar')} if in_file else {'names': names}))
        assert self.read(checks, folders / 'val', '') == {'b/0.png': 2, 'c/0.png': 0}
        with pytest.raises(ValueError, match="class 'z'"):
            self.read(checks, folders / 'new', '')

    def test_new_classes_start_a_new_task_and_are_refused_where_a_training_resumes(self, folders, tmp_path):
        checks = self.checks(names=['x', 'y', 'z'])
        self.read(checks, folders, 'train', is_training=True)
        assert label_names(checks.model) == ['a', 'b', 'c']
        torch.save({'args': Namespace(label_names=['x', 'y', 'z']), 'state_dict': {}}, tmp_path / 'last.pth.tar')
        with pytest.raises(ValueError, match='3 classes'):
            self.read(self.checks(resume=str(tmp_path / 'last.pth.tar')), folders, 'train', is_training=True)

    def test_weights_with_the_same_classes_keep_their_order(self, folders):
        checks = self.checks(names=['c', 'b', 'a'])
        assert self.read(checks, folders, 'train', is_training=True) == {'a/0.png': 2, 'b/0.png': 1, 'c/0.png': 0}
        assert label_names(checks.model) == ['c', 'b', 'a']

    def test_a_class_map_decides_by_itself(self, folders):
        checks = self.checks(names=['x', 'y', 'z'])
        assert self.read(checks, folders, 'new', class_map={'z': 2, 'a': 0}) == {'a/0.png': 0, 'z/0.png': 2}

    def test_more_classes_than_the_model_has_and_images_without_any_are_refused(self, folders):
        with pytest.raises(ValueError, match='4 classes, the model has 3: pass --num-classes 4'):
            self.read(self.checks(), folders / '4', '', is_training=True)
        with pytest.raises(ValueError, match='flat holds images without folders of classes'):
            self.read(self.checks(), folders / 'flat', '', is_training=True)

    @pytest.mark.parametrize(('channels', 'mode'), [(1, 'L'), (3, 'RGB'), (4, 'RGBA')])
    def test_images_have_as_many_channels_as_the_network(self, folders, channels, mode):
        checks = DataChecks(Namespace(input_img_mode=None))
        checks.create_model(timm.create_model)('test_resnet', num_classes=3, in_chans=channels)
        given = 'RGB' if channels == 3 else 'L'  # as timm's scripts choose
        dataset = checks.create_dataset(create_dataset)('', root=str(folders), split='train', input_img_mode=given)
        assert dataset[0][0].mode == mode
