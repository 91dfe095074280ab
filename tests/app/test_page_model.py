"""Models opened for a page: the network of the package, a network by name, and the words for their weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from timm_castream.app.page_model import DIGITS, open_for_page
from timm_castream.datasets import DigitScenes
from timm_castream.demo import measure_accuracy


def test_the_network_of_the_package_reads_digits() -> None:
    opened = open_for_page()
    assert opened.name == 'test_resnet_castream' and 'castream demo' in opened.weights
    assert not opened.model.training and opened.network.poolings == ('gap', 'ca')
    assert opened.class_name(7) == 'digit 7'
    accuracy = measure_accuracy(opened.model, DigitScenes('validation', 200, seed=1), 50)
    assert min(accuracy.values()) > 90


def test_the_weights_of_the_package_are_small_and_no_pickle() -> None:
    assert sorted(path.name for path in DIGITS.iterdir()) == ['config.json', 'model.safetensors']
    assert (DIGITS / 'model.safetensors').stat().st_size < 1_000_000
    assert json.loads((DIGITS / 'config.json').read_text(encoding='utf-8'))['architecture'] == 'test_resnet_castream'


@pytest.mark.parametrize('arguments', [{'checkpoint': 'a.pth'}, {'pretrained': True}, {'num_classes': 3}])
def test_weights_and_arguments_without_a_model_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match='need the name of the model'):
        open_for_page(**arguments)


def test_a_checkpoint_is_named_without_its_folder(make_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = make_model('test_resnet')
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    opened = open_for_page('test_resnet_castream', str(tmp_path / 'last.pth.tar'), num_classes=10, activation='sigmoid')
    assert opened.weights == 'Its weights are those of last.pth.tar.'
    assert opened.network.activation == 'sigmoid'
    for ours, theirs in zip(opened.model.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_random_weights_are_said_to_be_random() -> None:
    assert 'random' in open_for_page('test_resnet_castream').weights


def test_a_plain_network_of_timm_has_no_attention() -> None:
    opened = open_for_page('test_resnet')
    assert opened.network.poolings == ('gap',)
    assert 'attention' not in opened.methods and 'grad_cam' in opened.methods


def test_methods_that_ignore_the_class_are_told_from_those_that_do_not() -> None:
    opened = open_for_page()
    assert set(opened.methods) - set(opened.class_methods) == {'attention', 'random', 'centre'}


def test_a_network_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match='no classes'):
        open_for_page('test_resnet', num_classes=0)
