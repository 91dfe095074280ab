"""Class specific streams: a q_0 for each class."""

from __future__ import annotations

import pytest
import torch
from streams import apply_head, equation_10, stage_maps
from torch import nn

from timm_castream import attention_maps, class_labels, forward_both, pooling


def test_inference_takes_the_q0_of_the_class_that_gap_predicts(make_model):
    model = make_model('test_resnet', stream_class_specific=True)
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    images *= torch.arange(1, 9).view(-1, 1, 1, 1)
    with pooling(model, 'gap'):
        predicted = model(images).argmax(1)
    assert len(set(predicted.tolist())) > 1
    query = model.castream.cls_token.detach().double()[predicted]
    query, attention = equation_10(model.castream, stage_maps(model, 'test_resnet', images), query)
    torch.testing.assert_close(model(images), apply_head(model, 'test_resnet', query), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(attention_maps(model, images)[0][:, 0].double(), attention[0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(forward_both(model, images)['ca'], model(images))


def test_training_takes_the_q0_of_each_label(make_model, x):
    model = make_model('test_resnet', stream_class_specific=True)
    labels = torch.tensor([7, 2])
    query, _ = equation_10(
        model.castream, stage_maps(model, 'test_resnet', x), model.castream.cls_token.detach().double()[labels]
    )
    with class_labels(model, labels):
        out = model(x)
    torch.testing.assert_close(out, apply_head(model, 'test_resnet', query), rtol=1e-3, atol=1e-4)
    out.sum().backward()
    assert model.castream.cls_token.grad.abs().sum(1).nonzero().flatten().tolist() == [2, 7]


@pytest.mark.parametrize('dtype', [torch.int16, torch.int32, torch.uint8])
def test_labels_may_be_any_integers(dtype, make_model, x):
    model = make_model('test_resnet', stream_class_specific=True)
    with class_labels(model, torch.tensor([7, 2])):
        expected = model(x)
    with class_labels(model, torch.tensor([7, 2], dtype=dtype)):
        assert torch.equal(model(x), expected)


def test_class_labels_nest_and_are_undone_after_an_exception(make_model, x):
    model = make_model('test_resnet', stream_class_specific=True)
    free = model(x)
    with pytest.raises(KeyError), class_labels(model, torch.tensor([7, 2])):
        outer = model(x)
        with class_labels(model, torch.tensor([1, 1])):
            assert not torch.equal(model(x), outer)
        assert torch.equal(model(x), outer)
        raise KeyError
    assert torch.equal(model(x), free)


def test_class_labels_reach_the_model_inside_wrappers_and_leave_agnostic_streams_alone(make_model, x):
    model = make_model('test_resnet', stream_class_specific=True)
    wrapped = nn.Sequential(model)
    with class_labels(model, torch.tensor([7, 2])):
        expected = model(x)
    with class_labels(wrapped, torch.tensor([7, 2])):
        assert torch.equal(wrapped(x), expected)
    agnostic = make_model('test_resnet')
    expected = agnostic(x)
    with class_labels(agnostic, torch.rand(2, 10)):
        assert torch.equal(agnostic(x), expected)


@pytest.mark.parametrize(
    'target, message',
    [
        (torch.rand(2, 10), 'soft targets'),
        (torch.rand(2), 'soft targets'),
        (torch.tensor([3, 10]), 'from 3 to 10.*10 classes'),
        (torch.tensor([-1, 3]), 'from -1 to 3'),
    ],
)
def test_targets_that_are_no_class_indices_are_refused(target, message, make_model, x):
    model = make_model('test_resnet', stream_class_specific=True)
    with pytest.raises(ValueError, match=message), class_labels(model, target):
        pass
    assert model(x).shape == (2, 10)


def test_labels_of_another_batch_are_refused(make_model, x):
    model = make_model('test_resnet', stream_class_specific=True)
    with class_labels(model, torch.tensor([1, 2, 3])), pytest.raises(ValueError, match=r'3 labels .* 2 images'):
        model(x)


def test_training_without_labels_warns(make_model, x):
    model = make_model('test_resnet', stream_class_specific=True).train()
    with pytest.warns(UserWarning, match='class_labels'):
        model(x)
