"""timm's model contract of a network with a stream, and the images that it takes."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from conftest import make_backbone
from streams import BACKBONES, HEADS, SMALL, apply_head, equation_10, first_query, stage_maps
from timm.models import ConvNeXt, ResNet
from torch import nn

from timm_castream import attach, attention_maps, pooling


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
    assert own[: len(keys)] == keys
    assert own[len(keys) :]
    assert all(key.startswith('castream.') for key in own[len(keys) :])


@pytest.mark.parametrize('name', SMALL)
def test_a_gap_checkpoint_loads_strictly_with_a_warning_and_leaves_the_stream(name, make_model, x):
    model, plain = make_model(name), make_backbone(name)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.2)
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
    assert not torch.allclose(model(x), gap, rtol=0.01, atol=0.01)


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
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1, weight_decay=0.1, layer_decay=0.9)
    grouped = {id(p) for group in optimizer.param_groups for p in group['params']}
    assert {id(p) for p in model.parameters()} == grouped


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
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()
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
