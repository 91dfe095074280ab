"""timm's task with a stream."""

from __future__ import annotations

import pytest
import timm
import timm.data
import timm.task
import timm.utils
import torch
from timm.loss import BinaryCrossEntropy
from torch import nn

from timm_castream.timm_scripts.task import CAStreamTask

pytest_plugins = ('stand_in_scripts',)


@pytest.fixture
def class_specific():
    torch.manual_seed(0)
    return timm.create_model('test_resnet_castream', num_classes=5, stream_class_specific=True)


@pytest.mark.slow
@pytest.mark.parametrize('compiled', [False, True])
def test_the_task_hands_a_class_specific_stream_its_labels(class_specific, compiled):
    task = CAStreamTask(class_specific, nn.CrossEntropyLoss())
    if compiled:
        task.compile(backend='eager')
    target = torch.tensor([3, 1, 3, 4])
    task(torch.randn(4, 3, 64, 64), target)['loss'].backward()  # at 32 the last map is one location
    touched = class_specific.castream.cls_token.grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == [1, 3, 4]


def test_soft_targets_for_a_class_specific_stream_are_refused(class_specific):
    task = CAStreamTask(class_specific, BinaryCrossEntropy())
    with pytest.raises(ValueError, match='class indices'):
        task(torch.randn(2, 3, 32, 32), torch.rand(2, 5))


def test_the_task_trains_a_network_without_a_stream_as_timms_does():
    model = timm.create_model('test_resnet', num_classes=5)
    images, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    ours = CAStreamTask(model, nn.CrossEntropyLoss())(images, target)
    timms = timm.task.ClassificationTask(model, nn.CrossEntropyLoss())(images, target)
    assert torch.equal(ours['loss'], timms['loss'])
    assert torch.equal(ours['output'], timms['output'])


def test_multi_label_targets_with_a_loss_for_one_label_are_refused():
    task = CAStreamTask(timm.create_model('test_resnet', num_classes=5), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match='--bce-loss'):
        task(torch.randn(2, 3, 32, 32), torch.ones(2, 5))
