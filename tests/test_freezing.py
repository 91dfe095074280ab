"""What autograd keeps of a training forward beside a frozen backbone: the memory that such a training needs."""
from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from timm_castream import class_labels, freeze_backbone

BACKBONES = ('test_resnet', 'test_convnext', 'test_efficientnet', 'swin')


def storage(tensor):
    """The memory behind a tensor, whatever its view of it."""
    return tensor.untyped_storage().data_ptr()


def training_forward(model, images, labels=None):
    """What autograd saves of a forward in train mode, and the map of each stage of the stream."""
    saved, maps = [], []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    handles = [model.get_submodule(name).register_forward_hook(lambda module, args, output: maps.append(output))
               for name in model.castream_stages[:-1]]
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
    return [tuple(tensor.shape) for tensor in saved
            if storage(tensor) not in expected and tensor.untyped_storage().nbytes() > largest * tensor.itemsize]


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('name', BACKBONES)
def test_of_a_frozen_backbone_autograd_keeps_the_stage_maps_alone(name, memory_format, make_model):
    model = freeze_backbone(make_model(name)).to(memory_format=memory_format)
    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=memory_format)
    saved, maps = training_forward(model, images)
    assert {storage(m) for m in maps} <= {storage(tensor) for tensor in saved}
    assert other_maps(model, saved, maps) == []


@pytest.mark.parametrize('kwargs', [
    {'stream_class_specific': True}, {'stream_block': 'proj_ca'}, {'stream_heads': 2}, {'stream_start': 3}])
def test_every_kind_of_stream_keeps_its_own_stage_maps_alone(kwargs, make_model):
    model = freeze_backbone(make_model('test_resnet', **kwargs))
    saved, maps = training_forward(model, torch.randn(4, 3, 64, 64), torch.tensor([3, 1, 3, 0]))
    assert {storage(m) for m in maps} <= {storage(tensor) for tensor in saved}
    assert other_maps(model, saved, maps) == []


@pytest.mark.parametrize('name', BACKBONES)
def test_unless_it_is_frozen_autograd_keeps_the_backbones_activations_too(name, make_model):
    model = make_model(name)
    assert other_maps(model, *training_forward(model, torch.randn(4, 3, 64, 64)))
