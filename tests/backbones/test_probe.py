"""Forwards of one small image, which leave no trace in the network."""

from __future__ import annotations

import pytest
import torch
from conftest import make_backbone
from torch import nn

from timm_castream.backbones.probe import eval_mode, hook_target
from timm_castream.backbones.stages import find_stages


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
    with pytest.raises(ValueError, match=r'ResNet takes no image of 64 x 64, 160 x 160 or other sizes.*broken network'):
        find_stages(model)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert len(find_stages(model)[0]) == 5


def test_a_sequential_is_hooked_at_its_last_block_but_not_at_a_normalisation():
    blocks = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1)))
    assert hook_target(blocks) is blocks[1][1]
    assert hook_target(blocks[0]) is blocks[0]
    stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert hook_target(stem) is stem
    empty = nn.Sequential()
    assert hook_target(empty) is empty


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
