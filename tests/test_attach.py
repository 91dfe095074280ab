"""A stream beside timm's own networks: what it computes, what it leaves alone, and what it survives."""
from __future__ import annotations

import copy
import gc
import importlib
import inspect
import math
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from conftest import make_backbone, sharpen
from timm.layers import set_reentrant_ckpt
from timm.models import ConvNeXt, ResNet
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from timm_castream import attach, attention_maps, class_labels, detach, forward_both, freeze_backbone, pooling

mixin_module = importlib.import_module('timm_castream.mixin')

# What the stream must visit, and which layers of the head read the pooled vector.
STAGES = {
    'test_resnet': ('maxpool', 'layer1', 'layer2', 'layer3', 'layer4'),
    'test_convnext': ('stem', 'stages.0', 'stages.1', 'stages.2', 'stages.3'),
    'test_efficientnet': ('blocks.0', 'blocks.1', 'blocks.2', 'blocks.3', 'bn2'),
    'swin': ('layers.0', 'layers.1', 'layers.2', 'norm'),
}
HEADS = {
    'test_resnet': ('fc',),
    'test_convnext': ('head.norm', 'head.fc'),
    'test_efficientnet': ('classifier',),
    'swin': ('head.fc',),
}
BACKBONES = tuple(STAGES)
SMALL = ('test_resnet', 'test_convnext')


@contextmanager
def recorded(model: nn.Module, names: tuple[str, ...]) -> Iterator[list[Tensor]]:
    """The outputs of modules, through hooks of the test's own."""
    outputs: list[Tensor] = []
    handles = [model.get_submodule(name).register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
               for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def stage_maps(model: nn.Module, name: str, x: Tensor, start: int = 0) -> list[Tensor]:
    """F_start to F_L in float64, (B, D, H, W), of a pass through the plain backbone."""
    with torch.no_grad(), pooling(model, 'gap'), recorded(model, STAGES[name]) as outputs:
        model.forward_features(x)
    if name == 'swin':
        outputs = [out.permute(0, 3, 1, 2) for out in outputs]
    return [out.double() for out in outputs][start:]


def first_query(model: nn.Module) -> Tensor:
    return model.castream.cls_token.detach().double().expand(2, -1)


def equation_10(stream: nn.Module, maps: list[Tensor], query: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The last query and the attention maps of a stream of one head, location by location, in float64."""
    attentions = []
    for block, stage in zip(stream.blocks, maps, strict=True):
        batch, dim, height, width = stage.shape
        attention = torch.zeros(batch, height, width, dtype=torch.float64)
        pooled = torch.zeros(batch, dim, dtype=torch.float64)
        for b in range(batch):
            locations = [(i, j) for i in range(height) for j in range(width)]
            logits = [float(stage[b, :, i, j] @ query[b]) / math.sqrt(dim) for i, j in locations]
            weights = [math.exp(logit - max(logits)) for logit in logits]
            for (i, j), weight in zip(locations, weights, strict=True):
                attention[b, i, j] = weight / sum(weights)
                pooled[b] += attention[b, i, j] * stage[b, :, i, j]
        attentions.append(attention)
        query = pooled @ block.proj.weight.detach().double().T
        if block.proj.bias is not None:
            query = query + block.proj.bias.detach().double()
    return query, attentions


def apply_head(model: nn.Module, name: str, query: Tensor) -> Tensor:
    vector = query.float()[:, :, None, None] if name == 'test_convnext' else query.float()
    for layer in HEADS[name]:
        vector = model.get_submodule(layer)(vector.flatten(1) if layer.endswith('fc') else vector)
    return vector


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that attach, when it fails, and detach must leave as it was."""
    return {
        'class': type(model),
        'state': {key: value.clone() for key, value in model.state_dict().items()},
        'modules': [(name, id(module), module.training) for name, module in model.named_modules()],
        'hooks': [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        'flags': [p.requires_grad for p in model.parameters()],
        'attributes': set(vars(model)),
        'cfg': (copy.deepcopy(model.pretrained_cfg), copy.deepcopy(model.default_cfg)),
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert {k: v for k, v in after.items() if k != 'state'} == {k: v for k, v in before.items() if k != 'state'}
    assert list(after['state']) == list(before['state'])
    for key, value in before['state'].items():
        assert torch.equal(after['state'][key], value), key


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


# What it computes


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('args', [{}, {'stream_start': 2}, {'stream_bias': False}])
def test_logits_are_the_head_of_the_last_query_of_equation_10(name, args, make_model, x):
    model = make_model(name, **args)
    maps = stage_maps(model, name, x, args.get('stream_start', 0))
    query, _ = equation_10(model.castream, maps, first_query(model))
    with torch.no_grad():
        torch.testing.assert_close(model(x), apply_head(model, name, query), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(model(x), apply_head(model, name, maps[-1].mean((2, 3))), rtol=.05, atol=.05)


@pytest.mark.parametrize('name', BACKBONES)
def test_the_stages_are_the_papers_or_timms_and_the_last_is_what_is_pooled(name, make_model, x):
    model = make_model(name)
    assert model.castream_stages[:-1] == STAGES[name][:-1]
    assert model.castream.dims == tuple(stage.shape[1] for stage in stage_maps(model, name, x))


@pytest.mark.parametrize('name', BACKBONES)
def test_attention_maps_are_the_softmax_over_locations_of_each_stage(name, make_model, x):
    model = make_model(name)
    maps = attention_maps(model, x)
    stages = stage_maps(model, name, x)
    _, expected = equation_10(model.castream, stages, first_query(model))
    assert len(maps) == len(stages)
    for attention, reference, stage in zip(maps, expected, stages, strict=True):
        assert attention.shape == (2, 1, *stage.shape[2:])
        torch.testing.assert_close(attention[:, 0].double(), reference, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(attention.sum((2, 3)), torch.ones(2, 1))


def test_attention_maps_have_one_map_a_head_each_summing_to_1(make_model, x):
    for attention in attention_maps(make_model('test_convnext', stream_heads=4, stream_block='proj_ca'), x):
        assert attention.shape[:2] == (2, 4)
        torch.testing.assert_close(attention.sum((2, 3)), torch.ones(2, 4))
        assert attention.flatten(2).std(1).max() > 0  # the heads differ


def logits_under(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    with torch.no_grad(), pooling(model, mode):
        return model(x)


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('args', [
    *({'stream_start': start} for start in range(4)),
    {'stream_block': 'proj_ca', 'stream_heads': 2}, {'stream_heads': 4}, {'stream_bias': False, 'stream_heads': 2},
    {'stream_class_specific': True}])
def test_a_stream_with_the_gap_initialisation_gives_the_logits_of_gap(name, args, x):
    model = attach(make_backbone(name), stream_init='gap', **args)
    gap = logits_under(model, x, 'gap')
    assert (logits_under(model, x, 'ca') - gap).abs().max() <= 1e-5 * gap.abs().max()
    paper = attach(make_backbone(name), **args)
    assert (logits_under(paper, x, 'ca') - gap).abs().max() > .01 * gap.abs().max()  # else this shows nothing


def test_a_stream_of_one_block_with_the_gap_initialisation_gives_the_logits_of_gap(x):
    for name, last in (('test_resnet', 4), ('test_convnext', 4), ('test_efficientnet', 4), ('swin', 3)):
        model = attach(make_backbone(name), stream_init='gap', stream_start=last, stream_block='proj_ca')
        gap = logits_under(model, x, 'gap')
        assert (logits_under(model, x, 'ca') - gap).abs().max() <= 1e-5 * gap.abs().max()


def test_named_stages_express_the_authors_convnext(x):
    model = make_backbone('test_convnext')
    attach(model, stream_stages=['stem', 'stages.1.downsample', 'stages.2.downsample', 'stages.3'])
    maps = attention_maps(model, x)
    assert model.castream.dims == (24, 32, 48, 64)
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]


def test_named_stages_that_end_before_the_pooled_map_get_it_added(x):
    model = attach(make_backbone('test_resnet'), stream_stages=['layer1', 'layer2'])
    assert model.castream_stages[:2] == ('layer1', 'layer2')
    assert model.castream.dims == (32, 48, 96)
    assert model(x).shape == (2, 10)


@pytest.mark.parametrize('name', BACKBONES)
def test_pooling_gap_is_the_plain_network_to_the_bit(name, make_model, x):
    plain = make_backbone(name)
    model = make_model(name)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('castream.')})
    with pooling(model, 'gap'):
        assert torch.equal(model(x), plain(x))
        assert torch.equal(model.forward_features(x), plain.forward_features(x))
    assert not torch.allclose(model(x), plain(x), rtol=.01, atol=.01)


def test_pooling_nests_and_is_undone_after_an_exception(make_model, x):
    model = make_model('test_resnet')
    ca = model(x)
    with pytest.raises(KeyError), pooling(model, 'gap'):
        with pooling(model, 'ca'):
            assert torch.equal(model(x), ca)
        assert not torch.equal(model(x), ca)
        raise KeyError
    assert torch.equal(model(x), ca)


@pytest.mark.parametrize('name', BACKBONES)
def test_forward_both_gives_both_logits_from_one_pass_over_the_backbone(name, make_model, x):
    model = make_model(name)
    with pooling(model, 'gap'):
        gap = model(x)
    with recorded(model, STAGES[name][1:2]) as passes:
        both = forward_both(model, x)
    assert len(passes) == 1
    assert both.keys() == {'gap', 'ca'}
    assert torch.equal(both['gap'], gap)
    assert torch.equal(both['ca'], model(x))
    with pooling(model, 'gap'):
        assert torch.equal(forward_both(model, x)['ca'], both['ca'])


# timm's contract


def test_the_model_is_of_its_backbones_class_and_name():
    assert isinstance(attach(make_backbone('test_resnet')), ResNet)
    assert isinstance(attach(make_backbone('test_convnext')), ConvNeXt)
    assert type(attach(make_backbone('test_resnet'))).__name__ == 'ResNet'
    assert type(attach(make_backbone('test_resnet'))) is type(attach(make_backbone('test_resnet')))


@pytest.mark.parametrize('name', BACKBONES)
def test_state_dict_keys_are_the_backbones_own_and_castream(name):
    plain = make_backbone(name)
    keys = list(plain.state_dict())
    own = list(attach(plain).state_dict())
    assert own[:len(keys)] == keys
    assert own[len(keys):]
    assert all(key.startswith('castream.') for key in own[len(keys):])


@pytest.mark.parametrize('name', SMALL)
def test_a_gap_checkpoint_loads_strictly_with_a_warning_and_leaves_the_stream(name, make_model, x):
    model, plain = make_model(name), make_backbone(name)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=.2)
    before = {k: v.clone() for k, v in model.castream.state_dict().items()}
    with pytest.warns(UserWarning, match=r'no castream\.\* keys'):
        result = model.load_state_dict(plain.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(v, before[k]) for k, v in model.castream.state_dict().items())
    with pooling(model, 'gap'):
        assert torch.equal(model(x), plain(x))


def test_a_gap_checkpoint_loads_loosely_with_only_castream_missing(make_model):
    model = make_model('test_resnet')
    result = model.load_state_dict(make_backbone('test_resnet').state_dict(), strict=False)
    assert result.missing_keys == [f'castream.{key}' for key in model.castream.state_dict()]
    assert not result.unexpected_keys


def test_strict_loading_refuses_a_part_of_a_stream_and_a_part_of_a_backbone(make_model):
    model = make_model('test_resnet')
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r'castream\.blocks\.0\.proj\.bias'):
        model.load_state_dict({k: v for k, v in state.items() if k != 'castream.blocks.0.proj.bias'})
    plain = make_backbone('test_resnet').state_dict()
    del plain['fc.bias']
    with pytest.raises(RuntimeError, match=r'fc\.bias'), pytest.warns(UserWarning):
        model.load_state_dict(plain)


def test_the_castream_keys_alone_are_a_complete_stream(make_model, x):
    model = make_model('test_resnet')
    other = attach(make_backbone('test_resnet'))
    with pytest.warns(UserWarning):
        other.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('castream.')})
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith('castream.')}, strict=False)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize('name', BACKBONES)
def test_forward_is_the_head_of_the_features_and_the_head_may_be_asked_twice(name, make_model, x):
    model = make_model(name)
    features = model.forward_features(x)
    with pooling(model, 'gap'):
        assert torch.equal(model.forward_features(x), features)
    assert torch.equal(model.forward_head(features), model(x))
    assert torch.equal(model.forward_head(features), model(x))


def test_feature_maps_of_several_images_keep_their_own_queries(make_model, x):
    model = make_model('test_resnet')
    first, second = model.forward_features(x), model.forward_features(2 * x)
    assert torch.equal(model.forward_head(first), model(x))
    assert torch.equal(model.forward_head(second), model(2 * x))


def test_the_head_refuses_a_feature_map_without_a_query(make_model, x):
    model = make_model('test_resnet')
    with pytest.raises(RuntimeError, match='forward_features'):
        model.forward_head(model.forward_features(x).clone())
    with pooling(model, 'gap'):
        features = model.forward_features(x)
    with pytest.raises(RuntimeError, match='forward_features'):
        model.forward_head(features)


@pytest.mark.parametrize('name', BACKBONES)
def test_pre_logits_are_what_the_classifier_reads(name, make_model, x):
    model = make_model(name)
    pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(pre_logits), model(x))


@pytest.mark.parametrize('name', BACKBONES)
def test_forward_intermediates_agrees_with_the_backbone_and_with_forward(name, make_model, x):
    model = make_model(name)
    with pooling(model, 'gap'):
        plain_last, plain = model.forward_intermediates(x)
    last, intermediates = model.forward_intermediates(x)
    assert torch.equal(last, plain_last)
    assert all(torch.equal(a, b) for a, b in zip(intermediates, plain, strict=True))
    assert torch.equal(model.forward_head(last), model(x))
    only = model.forward_intermediates(x, indices=1, intermediates_only=True)
    assert len(only) == 1 and torch.equal(only[0], plain[-1])


@pytest.mark.parametrize('class_specific, start', [(False, 0), (True, 0), (True, 4)])
def test_forward_intermediates_may_stop_early(class_specific, start, make_model, x):
    model = make_model('test_resnet', stream_start=start, stream_class_specific=class_specific)
    last, intermediates = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert torch.equal(last, intermediates[-1])
    with pytest.raises(RuntimeError, match='forward_features'):
        model.forward_head(last)


@pytest.mark.parametrize('name', BACKBONES)
def test_reset_classifier_keeps_the_stream_in_all_its_forms(name, make_model, x):
    model = make_model(name)
    pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
    attention = attention_maps(model, x)[-1]
    with pooling(model, 'gap'):
        unpooled = model.forward_features(x)

    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == 7
    torch.testing.assert_close(model(x), model.get_classifier()(pre_logits))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pre_logits)
    model.reset_classifier(0, '')
    assert model(x).shape == unpooled.shape
    if name != 'test_convnext':  # its head's norm stays
        assert torch.equal(model(x), unpooled)
    model.reset_classifier(5, 'avg')
    assert model(x).shape == (2, 5)
    torch.testing.assert_close(model(x), model.get_classifier()(pre_logits))
    assert torch.equal(attention_maps(model, x)[-1], attention)


def test_reset_classifier_has_timms_signature(make_model):
    parameters = inspect.signature(make_model('test_resnet').reset_classifier).parameters
    assert parameters['global_pool'].default is None


def test_reset_classifier_of_a_class_specific_stream_draws_a_q0_for_each_class(make_model, x):
    model = make_model('test_resnet', stream_class_specific=True)
    model.reset_classifier(4)
    assert model.castream.cls_token.shape == (4, 32)
    assert model(x).shape == (2, 4)
    for args in ((0,), (0, ''), (4, '')):
        with pytest.raises(ValueError, match=f'num_classes={args[0]}'):
            model.reset_classifier(*args)
        assert model(x).shape == (2, 4)


@pytest.mark.parametrize('name', BACKBONES)
def test_a_backbone_without_classifier_gives_the_pre_logits_of_the_query(name, make_model, x):
    model = make_model(name, backbone={'num_classes': 0})
    assert model(x).shape == (2, model.head_hidden_size)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    with pooling(model, 'gap'):
        gap = model(x)
    assert not torch.allclose(model(x), gap, rtol=.01, atol=.01)


def test_a_backbone_without_pooling_gives_its_map(x):
    plain = make_backbone('test_resnet', 0, global_pool='')
    expected = plain(x)
    assert torch.equal(attach(plain)(x), expected)


def test_prune_intermediate_layers_drops_the_stream_with_the_head(make_model, x):
    model = make_model('test_resnet')
    pruned = copy.deepcopy(model)
    pruned.prune_intermediate_layers([0, 1])
    assert not hasattr(pruned, 'castream') and type(pruned) is ResNet
    assert pruned(x).shape == (2, 32, 16, 16)
    kept = copy.deepcopy(model)
    kept.prune_intermediate_layers(1, prune_head=False)
    assert torch.equal(kept(x), model(x))


@pytest.mark.parametrize('name', BACKBONES)
def test_the_rest_of_timms_contract_is_the_backbones(name, make_model):
    model, plain = make_model(name), make_backbone(name)
    assert model.num_features == plain.num_features
    assert model.head_hidden_size == plain.head_hidden_size
    assert list(model.feature_info) == list(plain.feature_info)
    assert model.group_matcher() == plain.group_matcher()
    assert model.default_cfg == plain.default_cfg
    assert model.get_classifier() is model.get_submodule(HEADS[name][-1])
    model.set_grad_checkpointing()
    model.set_grad_checkpointing(False)


def test_layer_groups_of_timms_optimisers_take_in_the_stream(make_model):
    from timm.optim import create_optimizer_v2
    model = make_model('test_convnext')
    optimizer = create_optimizer_v2(model, opt='sgd', lr=.1, weight_decay=.1, layer_decay=.9)
    grouped = {id(p) for group in optimizer.param_groups for p in group['params']}
    assert {id(p) for p in model.parameters()} == grouped


# Inputs


@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'test_efficientnet'])
@pytest.mark.parametrize('size', [(64, 96), (65, 47), (160, 33)])
def test_any_size_that_the_backbone_takes_works(name, size, make_model):
    model = make_model(name)
    image = torch.randn(1, 3, *size)
    maps = attention_maps(model, image)
    stages = stage_maps(model, name, image)
    assert [m.shape[2:] for m in maps] == [stage.shape[2:] for stage in stages]
    query, _ = equation_10(model.castream, stages, first_query(model)[:1])
    torch.testing.assert_close(model(image), apply_head(model, name, query), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', BACKBONES)
def test_each_image_of_a_batch_is_pooled_on_its_own(name, make_model, x):
    model = make_model(name)
    torch.testing.assert_close(torch.cat([model(x[:1]), model(x[1:])]), model(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x)[0], model(x)[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('stride', [8, 16])
def test_output_stride_makes_larger_maps(stride, make_model, x):
    model = make_model('test_resnet', backbone={'output_stride': stride})
    assert attention_maps(model, x)[-1].shape == (2, 1, 64 // stride, 64 // stride)
    query, _ = equation_10(model.castream, stage_maps(model, 'test_resnet', x), first_query(model))
    torch.testing.assert_close(model(x), apply_head(model, 'test_resnet', query), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('in_chans', [1, 5])
def test_images_may_have_other_numbers_of_channels(name, in_chans, make_model):
    model = make_model(name, backbone={'in_chans': in_chans})
    assert model(torch.randn(2, in_chans, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize('name', SMALL)
def test_channels_last_changes_nothing(name, make_model, x):
    model = make_model(name)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', SMALL)
def test_autocast_stays_near_float32(name, make_model, x):
    model = make_model(name)
    expected = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        out = model(x)
        maps = attention_maps(model, x)
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() < .1 * expected.abs().max()
    for attention in maps:
        assert attention.dtype == torch.float32
        torch.testing.assert_close(attention.sum((2, 3)), torch.ones(2, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_the_stream_is_made_in_the_backbones_dtype_and_mode(dtype):
    model = attach(make_backbone('test_resnet').to(dtype).train())
    assert {p.dtype for p in model.castream.parameters()} == {dtype}
    assert all(module.training for module in model.modules())
    assert model(torch.randn(2, 3, 64, 64, dtype=dtype)).dtype == dtype
    assert not any(module.training for module in attach(make_backbone('test_resnet')).modules())


def test_a_model_on_the_meta_device_takes_a_stream():
    model = attach(make_backbone('test_resnet', device='meta'))
    assert model.castream.dims == (32, 32, 48, 192, 96)
    assert all(p.is_meta for p in model.parameters())


def test_a_stream_may_be_attached_in_inference_mode(x):
    model = make_backbone('test_resnet')
    with torch.inference_mode():
        attach(model)
        assert model(x).shape == (2, 10)
        with pytest.raises(ValueError, match='bn1'):
            attach(make_backbone('test_resnet'), stream_stages=['bn1'])


# What it survives


def test_concurrent_forwards_from_threads_do_not_meet(make_model):
    model = make_model('test_resnet')
    images = [torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    with torch.no_grad():
        expected = [model(image) for image in images]
    assert all(not torch.allclose(expected[0], other) for other in expected[1:])
    barrier = threading.Barrier(8)

    def work(i: int) -> bool:
        barrier.wait()
        with torch.no_grad():
            return all(torch.equal(model(images[i]), expected[i]) for _ in range(10))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))  # and raises what a thread raised


def test_a_forward_that_raises_half_way_leaves_no_trace(make_model, x):
    model = make_model('test_resnet')
    expected = model(x)

    def fail(module: nn.Module, args: Any) -> None:
        raise KeyError('half way')

    handle = model.layer3.register_forward_pre_hook(fail)
    for call in (model, lambda image: attention_maps(model, image), lambda image: forward_both(model, image)):
        with pytest.raises(KeyError):
            call(3 * x)
    handle.remove()
    assert mixin_module._open.frame is None
    model.layer1(torch.randn(1, 32, 8, 8))  # a stage on its own
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize('name', BACKBONES)
def test_a_deep_copy_has_a_stream_of_its_own(name, make_model, x):
    model = make_model(name)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for parameter in twin.castream.parameters():
            parameter.zero_()
    assert torch.equal(model(x), expected)
    with pooling(twin, 'gap'):
        assert torch.equal(model(x), expected)
    detach(twin)
    assert torch.equal(model(x), expected)


def test_timms_ema_follows_the_stream(make_model, x):
    from timm.utils import ModelEmaV3
    model = make_model('test_resnet')
    ema = ModelEmaV3(model, decay=0.)
    with torch.no_grad():
        for parameter in model.castream.parameters():
            parameter.mul_(2.)
    ema.update(model)
    assert torch.equal(ema.module(x), model(x))


def test_pickles_load_in_a_fresh_process(make_model, x, tmp_path):
    models = {name: make_model(name, stream_heads=2) for name in BACKBONES}
    with torch.no_grad():
        expected = {name: model(x) for name, model in models.items()}
    for name, model in models.items():
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected[name])
    torch.save(models, tmp_path / 'models.pt')
    torch.save((x, expected), tmp_path / 'expected.pt')
    code = '\n'.join([
        'import sys, torch',
        'torch.set_num_threads(1)',
        "models = torch.load(sys.argv[1] + '/models.pt', weights_only=False)",
        "x, expected = torch.load(sys.argv[1] + '/expected.pt')",
        'with torch.no_grad():',
        '    assert all(torch.allclose(m(x), expected[n], rtol=1e-4, atol=1e-5) for n, m in models.items())',
        'import timm_castream',
        "assert callable(timm_castream.attach) and isinstance(models['test_resnet'].castream, timm_castream.CAStream)",
        "assert len(timm_castream.attention_maps(models['swin'], x)) == 4",
    ])
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('name', BACKBONES)
def test_torch_compile_makes_one_graph(name, make_model, x):
    model = make_model(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    assert torch.equal(compiled(x), model(x))
    assert torch.equal(compiled(2 * x), model(2 * x))
    compiled(x).square().sum().backward()
    assert model.castream.cls_token.grad.abs().sum() > 0


def test_torch_compile_follows_pooling_and_serves_class_specific_streams(make_model, x):
    model = make_model('test_resnet', stream_class_specific=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    assert torch.equal(compiled(x), model(x))
    with pooling(model, 'gap'):
        assert torch.equal(compiled(x), model(x))
    with class_labels(compiled, torch.tensor([3, 4])):
        assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('strict', [False, True])
def test_torch_export_keeps_the_stream(name, strict, make_model, x):
    model = make_model(name)
    exported = torch.export.export(model, (x,), strict=strict).module()
    torch.testing.assert_close(exported(2 * x), model(2 * x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', SMALL)
def test_onnx_runs_the_same(name, make_model, x, tmp_path):
    runtime = pytest.importorskip('onnxruntime', reason='onnxruntime runs the exported file')
    pytest.importorskip('onnxscript', reason='torch.onnx exports through onnxscript')
    model = make_model(name)
    torch.onnx.export(model, (x,), tmp_path / 'model.onnx', dynamo=True, input_names=['x'], verbose=False)
    session = runtime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    out, = session.run(None, {'x': (2 * x).numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(2 * x).detach(), rtol=1e-3, atol=1e-4)


def test_torch_jit_trace_records_the_stream(make_model, x):
    model = make_model('test_resnet')
    torch.testing.assert_close(torch.jit.trace(model, (x,))(2 * x), model(2 * x), rtol=1e-4, atol=1e-5)


def test_torchscript_and_fx_say_that_they_cannot_follow(make_model):
    model = make_model('test_resnet')
    with pytest.raises(RuntimeError, match='TorchScript cannot script a CA-Stream'):
        torch.jit.script(model)
    with pytest.raises(RuntimeError, match='FX symbolic tracing cannot follow a CA-Stream'):
        torch.fx.symbolic_trace(model)


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('args', [{}, {'freeze_backbone': True}, {'stream_class_specific': True}])
@pytest.mark.parametrize('reentrant', [False, True])
def test_gradient_checkpointing_changes_no_gradient(name, args, reentrant, make_model, x):
    plain = make_model(name, **args).double().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    set_reentrant_ckpt(reentrant)
    try:
        for model in (plain, checkpointed):
            with class_labels(model, torch.tensor([1, 2])):
                model(x.double().requires_grad_()).square().sum().backward()
    finally:
        set_reentrant_ckpt(False)
    expected = gradients(plain)
    assert expected['castream.cls_token'].abs().sum() > 0
    for key, value in gradients(checkpointed).items():
        assert (value is None) == (expected[key] is None), key
        if value is not None:
            torch.testing.assert_close(value, expected[key], rtol=1e-8, atol=1e-12, msg=key)


def track_maps(model: nn.Module, name: str) -> tuple[list[StorageWeakRef], list[list[bool]]]:
    """The storages of the stages' maps, and at each stage which of those before are gone."""
    refs: list[StorageWeakRef] = []
    gone: list[list[bool]] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        gone.append([ref.expired() for ref in refs])
        refs.append(StorageWeakRef(output.untyped_storage()))

    for stage in STAGES[name]:
        model.get_submodule(stage).register_forward_hook(hook)
    return refs, gone


@pytest.mark.parametrize('name', BACKBONES)
def test_no_feature_map_is_kept_alive_for_the_stream(name, make_model, x):
    model = make_model(name)
    refs, gone = track_maps(model, name)
    with torch.no_grad():
        with pooling(model, 'gap'):
            model.forward_features(x)
        plain = gone.copy()
        gone.clear()
        refs.clear()
        features = model.forward_features(x)
        assert gone == plain and any(gone[-1])  # some networks hold their stem's output for themselves
        assert all(ref.expired() for ref in refs[:-1]) and not refs[-1].expired()
        model.forward_head(features)
        del features
        assert refs[-1].expired()


def test_class_specific_inference_alone_keeps_maps_until_gap_has_predicted(make_model, x):
    model = make_model('test_resnet', stream_class_specific=True)
    refs, gone = track_maps(model, 'test_resnet')
    with torch.no_grad():
        features = model.forward_features(x)
        assert not any(gone[-1])
        assert all(ref.expired() for ref in refs[:-1])
        refs.clear()
        gone.clear()
        with class_labels(model, torch.tensor([0, 1])):
            features = model.forward_features(x)
        assert features is not None and all(gone[-1][:-1])


@pytest.mark.parametrize('args', [{}, {'freeze_backbone': True}, {'stream_class_specific': True}])
def test_training_leaves_no_map_behind_even_without_garbage_collection(args, make_model, x):
    model = make_model('test_resnet', **args).train()
    refs, _ = track_maps(model, 'test_resnet')
    gc.disable()
    try:
        with class_labels(model, torch.tensor([0, 1])):
            features = model.forward_features(x)
            logits = model.forward_head(features)
        logits.sum().backward()
        del features, logits
        assert all(ref.expired() for ref in refs)
    finally:
        gc.enable()


def test_replicas_of_data_parallel_run_their_own_weights(make_model, x):
    model = make_model('test_resnet')
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.5)

    # What torch.nn.parallel.replicate does, without the devices: new modules, weights as plain tensors.
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for key, child in module._modules.items():
            replica._modules[key] = None if child is None else replicas[child]
        for key, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, (parameter * 1.5).view_as(parameter))
    expected = model(x)
    torch.testing.assert_close(replicas[model](x), changed(x))
    assert not torch.allclose(expected, changed(x))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize('half_way', [False, True])
@pytest.mark.parametrize('mode', ['ca', 'gap'])
def test_a_castream_teacher_inside_a_castream_student(half_way, mode, make_model, x):
    student, teacher = make_model('test_resnet'), make_model('test_convnext')
    student.teacher = teacher
    seen = []

    def teach(*args: Any) -> None:
        with pooling(teacher, mode):
            seen.extend((teacher(x), teacher.forward_intermediates(x)[0]))

    expected = student(x), teacher(x)
    teach()
    if half_way:
        student.layer2.register_forward_hook(teach)
    else:
        teach()
    assert torch.equal(student(x), expected[0])
    assert len(seen) == 4 and torch.equal(seen[2], seen[0]) and torch.equal(seen[3], seen[1])
    detach(student)
    assert torch.equal(teacher(x), expected[1])


def test_a_replaced_stage_is_noticed(make_model, x):
    model = make_model('test_resnet')
    model.layer3 = nn.Conv2d(48, 192, 3, 2, 1)
    with pytest.raises(RuntimeError, match=r'3 stages ran and 4 are hooked.*layer3'):
        model(x)


def test_streams_survive_sync_batchnorm(make_model, x):
    from timm.layers import convert_sync_batchnorm
    for name in ('test_resnet', 'test_efficientnet'):
        model = make_model(name, freeze_backbone=True)
        expected = model(x)
        model = convert_sync_batchnorm(model)
        norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
        assert norms
        torch.testing.assert_close(model(x), expected)
        assert not any(norm.training for norm in model.train().modules() if isinstance(norm, nn.SyncBatchNorm))


# Freezing


@pytest.mark.parametrize('name', BACKBONES)
def test_a_frozen_backbone_and_its_statistics_stay_while_the_stream_trains(name, make_model, x):
    model = freeze_backbone(make_model(name)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.1)
    model(x).logsumexp(1).sum().backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith('castream.') for key in changed)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f'castream.{key}' for key in model.castream.state_dict()}
    assert {name for name, grad in gradients(model).items() if grad is not None} == changed | {
        key for key in gradients(model) if key.startswith('castream.')}


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


# Class specific streams


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
        model.castream, stage_maps(model, 'test_resnet', x), model.castream.cls_token.detach().double()[labels])
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


@pytest.mark.parametrize('target, message', [
    (torch.rand(2, 10), 'soft targets'),
    (torch.rand(2), 'soft targets'),
    (torch.tensor([3, 10]), 'from 3 to 10.*10 classes'),
    (torch.tensor([-1, 3]), 'from -1 to 3'),
])
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


# Attaching and detaching


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('frozen', [False, True])
def test_detach_gives_back_the_very_same_gap_model(name, frozen, x):
    model = make_backbone(name)
    before, expected = snapshot(model), model(x)
    attach(model, stream_start=1, freeze_backbone=frozen)
    with torch.no_grad():
        model.train()
        model.eval()
        model(x)
    assert detach(model) is model
    assert_same(model, before)
    assert torch.equal(model(x), expected)
    attach(model)
    assert model(x).shape == (2, 10)


def test_attach_to_a_training_model_moves_nothing():
    model = make_backbone('test_resnet').train()
    model.layer2.eval()
    before = snapshot(model)
    attach(model)
    assert_same(detach(model), before)


def test_castream_config_makes_an_equal_stream(make_model):
    args = {'stream_start': 1, 'stream_block': 'proj_ca', 'stream_heads': 2, 'stream_drop': .1, 'stream_bias': False,
            'stream_init': 'gap', 'stream_stages': ['layer1', 'layer2', 'layer4'], 'stream_class_specific': True}
    model = make_model('test_resnet', **args)
    assert model.castream_config == args
    twin = attach(make_backbone('test_resnet'), **model.castream_config)
    assert twin.castream_stages == model.castream_stages == ('layer2', 'layer4')
    assert {k: v.shape for k, v in twin.castream.state_dict().items()} == {
        k: v.shape for k, v in model.castream.state_dict().items()}
    model.castream_config['stream_start'] = 5
    assert model.castream_config == args


def test_a_model_that_timm_does_not_register_takes_a_stream(x):
    from timm.models.resnet import BasicBlock
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3, channels=(8, 16, 24, 32))
    sharpen(attach(model))
    query, _ = equation_10(model.castream, stage_maps(model.eval(), 'test_resnet', x), first_query(model))
    torch.testing.assert_close(model(x), apply_head(model, 'test_resnet', query), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name, args, side', [
    ('mobilenetv3_small_050', {}, 64),
    ('regnetx_002', {}, 64),
    ('densenet121', {'growth_rate': 4, 'block_config': (1, 1, 1, 1)}, 64),
    ('test_nfnet', {}, 64),
    ('test_byobnet', {}, 64),
    ('tresnet_m', {'layers': (1, 1, 1, 1), 'width_factor': .25}, 64),  # its first convolution has 48 channels
    ('inception_v3', {}, 128),  # takes no images of 64 pixels
])
def test_other_families_that_pool_a_map_take_a_stream(name, args, side, make_model):
    model = make_model(name, backbone=args, side=side)
    image = torch.randn(2, 3, side, side)
    with torch.no_grad():
        with pooling(model, 'gap'):
            gap = model(image)
        both = forward_both(model, image)
        maps = attention_maps(model, image)
        assert torch.equal(both['gap'], gap) and torch.equal(both['ca'], model(image))
    assert len(maps) == len(model.castream_stages) > 1
    for attention in maps:
        torch.testing.assert_close(attention.sum((2, 3)), torch.ones(2, 1))
    plain = detach(model)
    with torch.no_grad():
        assert torch.equal(plain(image), gap)


def test_a_network_of_another_image_size_than_its_cfgs_takes_a_stream(make_model):
    model = make_model('swin', backbone={'img_size': 64})
    assert model.pretrained_cfg['input_size'] == (3, 224, 224)  # else this shows nothing
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)


def test_attaching_caches_nothing_of_the_weights_that_it_saw(x):
    # tiny_vit keeps its attention biases after a pass in eval mode.
    args = {'depths': (1, 1, 1, 1), 'embed_dims': (8, 8, 8, 16), 'num_heads': (1, 1, 1, 1)}
    model, plain = attach(make_backbone('tiny_vit_5m_224', **args)), make_backbone('tiny_vit_5m_224', **args)
    for key, parameter in plain.named_parameters():
        if key.endswith('attention_biases'):
            nn.init.normal_(parameter, std=3.)
    model.load_state_dict(plain.state_dict(), strict=False)
    with pooling(model, 'gap'):
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize('name, args, message', [
    ('test_vit', {}, r'VisionTransformer pools no spatial feature map: .*\(1, \d+, 64\)'),
    ('vgg11', {'mlp_ratio': .01}, 'VGG does not pool'),
    ('efficientvit_b0', {}, 'EfficientVit does not pool'),
])
def test_a_network_that_pools_no_map_is_refused_in_one_sentence_and_left_alone(name, args, message):
    model = make_backbone(name, **args).train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as error:
        attach(model)
    assert '\n' not in str(error.value)
    assert_same(model, before)


def test_a_module_that_is_no_timm_model_is_refused():
    with pytest.raises(ValueError, match='Sequential is no timm classification model'):
        attach(nn.Sequential(nn.Conv2d(3, 3, 3)))
    compiled = torch.compile(make_backbone('test_resnet'))  # shows the methods of the model inside
    with pytest.raises(ValueError, match='OptimizedModule is no timm classification model'):
        attach(compiled)


@pytest.mark.parametrize('args, message', [
    ({'stream_start': 5}, 'stream_start 5 .* 0 to 4 .*maxpool, layer1, layer2, layer3, layer4'),
    ({'stream_start': -1}, 'stream_start -1 .* 0 to 4'),
    ({'stream_start': 1.}, 'stream_start 1.0 .* 0 to 4'),
    ({'stream_stages': ['layer1', 'layer9']}, "'layer9' .* maxpool, layer1, layer2, layer3, layer4"),
    ({'stream_stages': ['']}, "'' in stream_stages .* maxpool"),
    ({'stream_stages': []}, r'stream_stages \[\] .*maxpool'),
    ({'stream_stages': 'layer1'}, "stream_stages 'layer1' .*maxpool"),
    ({'stream_stages': 3}, 'stream_stages 3 .*maxpool'),
    ({'stream_stages': ['layer2', 'layer1']}, r"order in which .*\['layer1', 'layer2'\]"),
    ({'stream_stages': ['layer1', 'layer1.1', 'layer2']}, 'layer1.1'),
    ({'stream_stages': ['layer1', 'layer1']}, 'different stages'),
    ({'stream_stages': ['layer1', 'fc']}, r"before its head.*\['layer1'\]"),
    ({'stream_stages': ['bn1', 'layer1']}, 'bn1 is changed in place'),
    ({'stream_block': 'proj'}, "stream_block 'proj' .*'ca', 'proj_ca'"),
    ({'stream_heads': 5}, 'stream_heads 5 .* 32 channels'),
    ({'stream_drop': 2.}, 'stream_drop 2.0 .*0 to 1'),
    ({'stream_init': 'zero'}, "stream_init 'zero' .*'paper', 'gap'"),
    ({'backbone_pretrained': 'nosuch'}, "'nosuch' is no tag of test_resnet, valid ones: r160_in1k"),
])
def test_wrong_arguments_raise_naming_the_value_and_leave_the_model_as_it_was(args, message):
    model = make_backbone('test_resnet').train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        attach(model, **args)
    assert_same(model, before)


@pytest.mark.parametrize('backbone', [{'num_classes': 0}, {'global_pool': '', 'num_classes': 0}])
def test_a_class_specific_stream_needs_a_gap_prediction(backbone):
    model = make_backbone('test_resnet', **backbone)
    before = snapshot(model)
    with pytest.raises(ValueError, match='prediction'):
        attach(model, stream_class_specific=True)
    assert_same(model, before)


def test_attaching_twice_and_detaching_nothing_say_what_to_call(make_model):
    model = make_model('test_resnet')
    with pytest.raises(ValueError, match='detach'):
        attach(model)
    for call in (detach, freeze_backbone, lambda m: forward_both(m, None), lambda m: attention_maps(m, None),
                 lambda m: pooling(m, 'ca').__enter__(), lambda m: class_labels(m, torch.tensor([1])).__enter__()):
        with pytest.raises(ValueError, match=r'ResNet has no CA-Stream; call timm_castream\.attach'):
            call(make_backbone('test_resnet'))
    with pytest.raises(ValueError, match=r"pooling 'max' .*'gap', 'ca'"), pooling(model, 'max'):
        pass


def test_timms_registered_models_are_untouched_by_the_plugin(x):
    assert type(timm.create_model('test_resnet')) is ResNet
