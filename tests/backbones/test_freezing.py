"""A frozen network: what trains, what stays, and what autograd keeps of a training forward beside it."""

from __future__ import annotations

import pytest
import torch
from conftest import make_backbone
from streams import BACKBONES, assert_same, gradients, snapshot
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from timm_castream import attach, class_labels, detach, freeze_backbone


@pytest.mark.parametrize('name', BACKBONES)
def test_a_frozen_backbone_and_its_statistics_stay_while_the_stream_trains(name, make_model, x):
    model = freeze_backbone(make_model(name)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).logsumexp(1).sum().backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith('castream.') for key in changed)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f'castream.{key}' for key in model.castream.state_dict()
    }
    assert {name for name, grad in gradients(model).items() if grad is not None} == changed | {
        key for key in gradients(model) if key.startswith('castream.')
    }


def test_an_unfrozen_model_trains_whole_and_moves_its_statistics(make_model, x):
    model = make_model('test_resnet').train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(x).logsumexp(1).sum().backward()
    assert all(grad is not None for grad in gradients(model).values())
    assert not torch.equal(model.conv1[1].running_mean, before['conv1.1.running_mean'])


@pytest.mark.parametrize('name', BACKBONES)
def test_normalisation_stays_in_eval_mode_under_train_until_detach(name):
    model = attach(make_backbone(name), freeze_backbone=True).train()
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))]
    assert model.training and model.castream.training
    assert norms and not any(norm.training for norm in norms)
    detach(model)
    assert all(norm.training for norm in norms)


def test_freezing_twice_is_freezing_once_and_detach_gives_back_the_users_own_flags():
    model = make_backbone('test_resnet')
    model.conv1[0].weight.requires_grad_(False)
    before = snapshot(model)
    freeze_backbone(freeze_backbone(attach(model)))
    assert not model.fc.weight.requires_grad
    assert_same(detach(model), before)


def test_freezing_leaves_the_modes_of_other_modules():
    model = attach(make_backbone('test_resnet').train())
    model.layer1.eval()
    freeze_backbone(model)
    assert not model.layer1.training and not model.layer1[0].training
    assert model.layer2.training


def test_a_classifier_that_is_made_after_freezing_trains(make_model):
    model = make_model('test_resnet', freeze_backbone=True)
    model.reset_classifier(3)
    assert model.fc.weight.requires_grad and not model.conv1[0].weight.requires_grad


def storage(tensor):
    """The memory behind a tensor, whatever its view of it."""
    return tensor.untyped_storage().data_ptr()


def training_forward(model, images, labels=None):
    """What autograd saves of a forward in train mode, and the map of each stage of the stream."""
    saved, maps = [], []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, args, output: maps.append(output))
        for name in model.castream_stages[:-1]
    ]
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor), class_labels(model, labels):
            maps.append(model.train().forward_features(images))
            model.forward_head(maps[-1]).logsumexp(1).sum()
    finally:
        for handle in handles:
            handle.remove()
    return saved, maps


def other_maps(model, saved, maps):
    """Shapes of what was saved beyond weights, stage maps, and what is no larger than a query or an attention."""
    stream, batch = model.castream, len(maps[0])
    locations = (m.numel() // (batch * dim) for m, dim in zip(maps, stream.dims, strict=True))
    largest = batch * stream.blocks[0].num_heads * max(*stream.dims, *locations)
    expected = {storage(tensor) for tensor in (*model.parameters(), *maps)}
    return [
        tuple(tensor.shape)
        for tensor in saved
        if storage(tensor) not in expected and tensor.untyped_storage().nbytes() > largest * tensor.itemsize
    ]


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('name', BACKBONES)
def test_of_a_frozen_backbone_autograd_keeps_the_stage_maps_alone(name, memory_format, make_model):
    model = freeze_backbone(make_model(name)).to(memory_format=memory_format)
    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=memory_format)
    saved, maps = training_forward(model, images)
    assert {storage(m) for m in maps} <= {storage(tensor) for tensor in saved}
    assert other_maps(model, saved, maps) == []


@pytest.mark.parametrize(
    'kwargs', [{'stream_class_specific': True}, {'stream_block': 'proj_ca'}, {'stream_heads': 2}, {'stream_start': 3}]
)
def test_every_kind_of_stream_keeps_its_own_stage_maps_alone(kwargs, make_model):
    model = freeze_backbone(make_model('test_resnet', **kwargs))
    saved, maps = training_forward(model, torch.randn(4, 3, 64, 64), torch.tensor([3, 1, 3, 0]))
    assert {storage(m) for m in maps} <= {storage(tensor) for tensor in saved}
    assert other_maps(model, saved, maps) == []


@pytest.mark.parametrize('name', BACKBONES)
def test_unless_it_is_frozen_autograd_keeps_the_backbones_activations_too(name, make_model):
    model = make_model(name)
    assert other_maps(model, *training_forward(model, torch.randn(4, 3, 64, 64)))
