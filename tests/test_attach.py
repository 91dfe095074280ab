"""What a stream computes beside a network, and how it is attached and detached."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import make_backbone, sharpen
from streams import BACKBONES, STAGES, apply_head, assert_same, equation_10, first_query, recorded, snapshot, stage_maps
from timm.models import ResNet
from torch import Tensor, nn

from timm_castream import attach, attention_maps, class_labels, detach, forward_both, freeze_backbone, pooling


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('args', [{}, {'stream_start': 2}, {'stream_bias': False}])
def test_logits_are_the_head_of_the_last_query_of_equation_10(name, args, make_model, x):
    model = make_model(name, **args)
    maps = stage_maps(model, name, x, args.get('stream_start', 0))
    query, _ = equation_10(model.castream, maps, first_query(model))
    with torch.no_grad():
        torch.testing.assert_close(model(x), apply_head(model, name, query), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(model(x), apply_head(model, name, maps[-1].mean((2, 3))), rtol=0.05, atol=0.05)


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


@pytest.mark.parametrize('name', [*(name for name in BACKBONES if name != 'test_vit'), 'test_vit2'])
@pytest.mark.parametrize(
    'args',
    [
        *({'stream_start': start} for start in range(4)),
        {'stream_block': 'proj_ca', 'stream_heads': 2},
        {'stream_heads': 4},
        {'stream_bias': False, 'stream_heads': 2},
        {'stream_class_specific': True},
    ],
)
def test_a_stream_with_the_gap_initialisation_gives_the_logits_of_gap(name, args, x):
    model = attach(make_backbone(name), stream_init='gap', **args)
    gap = logits_under(model, x, 'gap')
    assert (logits_under(model, x, 'ca') - gap).abs().max() <= 1e-5 * gap.abs().max()
    paper = attach(make_backbone(name), **args)
    assert (logits_under(paper, x, 'ca') - gap).abs().max() > 0.01 * gap.abs().max()  # else this shows nothing


def test_a_stream_of_one_block_with_the_gap_initialisation_gives_the_logits_of_gap(x):
    for name in ('test_resnet', 'test_convnext', 'test_efficientnet', 'swin', 'test_vit2'):
        last = 3 if name == 'swin' else 4
        model = attach(make_backbone(name), stream_init='gap', stream_start=last, stream_block='proj_ca')
        gap = logits_under(model, x, 'gap')
        assert (logits_under(model, x, 'ca') - gap).abs().max() <= 1e-5 * gap.abs().max()


@pytest.mark.parametrize(
    'name, pool, clause',
    [
        ('test_resnet', 'max', 'this ResNet pools by maximum'),
        ('test_resnet', 'avgmax', 'this ResNet pools by average and maximum'),
        ('test_vit', 'token', 'this VisionTransformer pools by its class token'),
    ],
)
def test_the_gap_initialisation_is_refused_where_the_head_does_not_average(name, pool, clause):
    model = make_backbone(name, global_pool=pool)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"stream_init 'gap' .* {clause}, valid ones: 'paper'"):
        attach(model, stream_init='gap')
    assert_same(model, before)


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
    assert not torch.allclose(model(x), plain(x), rtol=0.01, atol=0.01)


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
    args = {
        'stream_start': 1,
        'stream_block': 'proj_ca',
        'stream_heads': 2,
        'stream_drop': 0.1,
        'stream_bias': False,
        'stream_init': 'gap',
        'stream_stages': ['layer1', 'layer2', 'layer4'],
        'stream_class_specific': True,
    }
    model = make_model('test_resnet', **args)
    assert model.castream_config == args
    twin = attach(make_backbone('test_resnet'), **model.castream_config)
    assert twin.castream_stages == model.castream_stages == ('layer2', 'layer4')
    assert {k: v.shape for k, v in twin.castream.state_dict().items()} == {
        k: v.shape for k, v in model.castream.state_dict().items()
    }
    model.castream_config['stream_start'] = 5
    assert model.castream_config == args


def test_a_model_that_timm_does_not_register_takes_a_stream(x):
    from timm.models.resnet import BasicBlock

    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3, channels=(8, 16, 24, 32))
    sharpen(attach(model))
    query, _ = equation_10(model.castream, stage_maps(model.eval(), 'test_resnet', x), first_query(model))
    torch.testing.assert_close(model(x), apply_head(model, 'test_resnet', query), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    'name, args, side',
    [
        ('mobilenetv3_small_050', {}, 64),
        ('regnetx_002', {}, 64),
        ('densenet121', {'growth_rate': 4, 'block_config': (1, 1, 1, 1)}, 64),
        ('test_nfnet', {}, 64),
        ('test_byobnet', {}, 64),
        ('tresnet_m', {'layers': (1, 1, 1, 1), 'width_factor': 0.25}, 64),  # its first convolution has 48 channels
        ('inception_v3', {}, 128),  # takes no images of 64 pixels
    ],
)
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
            nn.init.normal_(parameter, std=3.0)
    model.load_state_dict(plain.state_dict(), strict=False)
    with pooling(model, 'gap'):
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize(
    'name, args, message',
    [
        (
            'vgg11',
            {'mlp_ratio': 0.01},
            'VGG takes no CA-Stream: layers stand between its last feature map and its pooling',
        ),
        ('efficientvit_b0', {}, 'EfficientVit takes no CA-Stream: layers stand between'),
        ('pit_ti_224', {}, 'PoolingVisionTransformer takes no CA-Stream: it drops the patch tokens'),
        ('crossvit_9_240', {}, 'CrossVit takes no CA-Stream: it has two branches'),
        ('test_vit3', {}, 'VisionTransformer takes no CA-Stream: it has an attention pooling of its own'),
        (
            'coat_mini',
            {'embed_dims': (8, 8, 8, 8), 'serial_depths': (1, 1, 1, 1), 'parallel_depth': 1},
            'CoaT pools no feature map: its forward_features gives list',
        ),
        ('test_resnet', {'global_pool': 'catavgmax'}, 'ResNet does not pool .* so a CA-Stream cannot take that place'),
    ],
)
def test_a_network_that_pools_no_map_is_refused_in_one_sentence_and_left_alone(name, args, message):
    model = make_backbone(name, **args).train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as error:
        attach(model)
    assert '\n' not in str(error.value)
    assert_same(model, before)


class UnknownTokens(nn.Module):
    """A network with timm's methods that averages tokens in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stem(x).flatten(2).transpose(1, 2).flip(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.mean(1) if pre_logits else self.fc(x.mean(1))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.fc = nn.Linear(8, num_classes)


def test_patch_tokens_of_a_network_that_is_not_timms_are_refused():
    with pytest.raises(ValueError, match=r'UnknownTokens gives patch tokens, .* the order of its tokens is unknown'):
        attach(UnknownTokens())


def test_a_module_that_is_no_timm_model_is_refused():
    with pytest.raises(ValueError, match='Sequential is no timm classification model'):
        attach(nn.Sequential(nn.Conv2d(3, 3, 3)))
    compiled = torch.compile(make_backbone('test_resnet'))  # shows the methods of the model inside
    with pytest.raises(ValueError, match='OptimizedModule holds a ResNet'):
        attach(compiled)


@pytest.mark.parametrize(
    'args, message',
    [
        ({'stream_start': 5}, 'stream_start 5 .* 0 to 4 .*maxpool, layer1, layer2, layer3, layer4'),
        ({'stream_start': -1}, 'stream_start -1 .* 0 to 4'),
        ({'stream_start': 1.0}, 'stream_start 1.0 .* 0 to 4'),
        ({'stream_start': True}, 'stream_start True .* 0 to 4'),
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
        ({'stream_heads': 0}, '^stream_heads must be a positive int, got 0'),
        ({'stream_drop': 2.0}, 'stream_drop 2.0 .*0 to 1'),
        ({'stream_drop': 'a'}, "stream_drop 'a' .*0 to 1"),
        ({'stream_class_specific': 'false'}, "stream_class_specific must be True or False, got 'false'"),
        ({'stream_bias': 'x'}, "stream_bias must be True or False, got 'x'"),
        ({'freeze_backbone': 'false'}, "freeze_backbone must be True or False, got 'false'"),
        ({'backbone_pretrained': 'true'}, "backbone_pretrained .* got 'true': write True"),
        ({'stream_init': 'zero'}, "stream_init 'zero' .*'paper', 'gap'"),
        ({'backbone_pretrained': 'nosuch'}, "'nosuch' is no tag of test_resnet, valid ones: r160_in1k"),
    ],
)
def test_wrong_arguments_raise_naming_the_value_and_leave_the_model_as_it_was(args, message):
    model = make_backbone('test_resnet').train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        attach(model, **args)
    assert_same(model, before)


@pytest.mark.parametrize('backbone', [{'num_classes': 0}, {'global_pool': '', 'num_classes': 0}])
def test_a_class_specific_stream_needs_a_classifier(backbone):
    model = make_backbone('test_resnet', **backbone)
    before = snapshot(model)
    with pytest.raises(ValueError, match='num_classes=0'):
        attach(model, stream_class_specific=True)
    assert_same(model, before)


def test_attaching_twice_and_detaching_nothing_say_what_to_call(make_model):
    model = make_model('test_resnet')
    with pytest.raises(ValueError, match='detach'):
        attach(model)
    for call in (
        detach,
        freeze_backbone,
        lambda m: forward_both(m, None),
        lambda m: attention_maps(m, None),
        lambda m: pooling(m, 'ca').__enter__(),
        lambda m: class_labels(m, torch.tensor([1])).__enter__(),
    ):
        with pytest.raises(ValueError, match=r'ResNet has no CA-Stream; call timm_castream\.attach'):
            call(make_backbone('test_resnet'))
    with pytest.raises(ValueError, match=r"pooling 'max' .*'gap', 'ca'"), pooling(model, 'max'):
        pass


def test_timms_registered_models_are_untouched_by_the_plugin(x):
    assert type(timm.create_model('test_resnet')) is ResNet
