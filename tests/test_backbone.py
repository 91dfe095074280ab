"""What a stream asks of the network beside it."""
from __future__ import annotations

import pytest
import torch
from conftest import make_backbone
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, LayerNorm2d
from torch import nn

from timm_castream.backbone import (
    eval_mode,
    find_stages,
    head_pools,
    hook_target,
    is_norm,
    one_location,
)


@pytest.mark.parametrize('name, names, dims', [
    ('test_resnet', ('maxpool', 'layer1', 'layer2', 'layer3', 'layer4'), (32, 32, 48, 192, 96)),
    ('test_convnext', ('stem', 'stages.0', 'stages.1', 'stages.2', 'stages.3'), (24, 24, 32, 48, 64)),
    ('swin', ('layers.0', 'layers.1', 'layers.2', 'layers.3'), (8, 16, 32, 64)),
    # Its last table entry gives way to the map after conv_head, which is what it pools.
    ('test_efficientnet', ('blocks.0', 'blocks.1', 'blocks.2', 'blocks.3', 'blocks.4'), (16, 24, 32, 48, 256)),
])
def test_the_default_stages_end_in_the_map_that_is_pooled(name, names, dims):
    stages = find_stages(make_backbone(name))
    assert stages.names == names
    assert stages.dims == dims


def test_finding_the_stages_moves_neither_statistics_nor_modes_nor_random_numbers_nor_hooks():
    model = make_backbone('test_resnet').train()
    model.layer2.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    find_stages(model)
    assert torch.equal(torch.rand(1), expected)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_taken_off_when_the_probe_fails():
    model = make_backbone('test_resnet')

    def fail(*args: object) -> None:
        raise RuntimeError('broken network')

    handle = model.layer2.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match=r'ResNet takes none of the image sizes.*broken network'):
        find_stages(model)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert len(find_stages(model).names) == 5


@pytest.mark.parametrize('pool', ['avg', 'max', 'avgmax'])
def test_heads_that_pool_by_average_or_maximum_are_served(pool):
    assert find_stages(make_backbone('test_resnet', global_pool=pool)).dims[-1] == 96


def test_a_head_that_pools_otherwise_is_refused():
    with pytest.raises(ValueError, match=r'ResNet does not pool .* by average or maximum'):
        find_stages(make_backbone('test_resnet', global_pool='catavgmax'))


@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'test_efficientnet', 'swin'])
def test_head_pools_until_the_pooling_is_taken_away(name):
    model = make_backbone(name)
    assert head_pools(model, model.forward_head)
    model.reset_classifier(0)
    assert head_pools(model, model.forward_head)
    model.reset_classifier(0, '')
    assert not head_pools(model, model.forward_head)


@pytest.mark.parametrize('name', ['test_resnet', 'swin'])
def test_pooling_one_location_gives_the_vector(name):
    model = make_backbone(name)
    vector = torch.randn(2, model.num_features)
    assert torch.equal(model.forward_head(one_location(model, vector), pre_logits=True), vector)


def test_a_sequential_is_hooked_at_its_last_block_but_not_at_a_normalisation():
    blocks = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1)))
    assert hook_target(blocks) is blocks[1][1]
    assert hook_target(blocks[0]) is blocks[0]
    stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert hook_target(stem) is stem
    empty = nn.Sequential()
    assert hook_target(empty) is empty


@pytest.mark.parametrize('layer, expected', [
    (nn.BatchNorm2d(4), True), (nn.SyncBatchNorm(4), True), (BatchNormAct2d(4), True), (FrozenBatchNormAct2d(4), True),
    (nn.LayerNorm(4), True), (LayerNorm2d(4), True), (nn.GroupNorm(2, 4), True), (nn.InstanceNorm2d(4), True),
    (nn.Conv2d(4, 4, 1), False), (nn.Sequential(nn.BatchNorm2d(4)), False), (nn.Dropout(), False),
])
def test_normalisation_layers_are_known(layer, expected):
    assert is_norm(layer) is expected


def test_eval_mode_gives_every_module_its_own_mode_back_even_after_an_exception():
    model = make_backbone('test_resnet').train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyError
    assert modes == [module.training for module in model.modules()]
    assert torch.is_grad_enabled()
