"""The stages of networks, their layouts, and how heads pool, as small forwards find them."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import make_backbone
from networks import token_network
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, LayerNorm2d
from torch import nn
from torch.optim.swa_utils import AveragedModel

from timm_castream import attach
from timm_castream.backbones.freezing import is_norm
from timm_castream.backbones.layout import NCHW, NHWC, Tokens
from timm_castream.backbones.stages import cam_layer, find_stage, find_stages, head_pooling, pooled_stage


@pytest.mark.parametrize(
    'name, names, dims',
    [
        ('test_resnet', ('maxpool', 'layer1', 'layer2', 'layer3', 'layer4'), (32, 32, 48, 192, 96)),
        ('test_convnext', ('stem', 'stages.0', 'stages.1', 'stages.2', 'stages.3'), (24, 24, 32, 48, 64)),
        ('swin', ('layers.0', 'layers.1', 'layers.2', 'layers.3'), (8, 16, 32, 64)),
        # Its last table entry gives way to the map after conv_head, which is what it pools.
        ('test_efficientnet', ('blocks.0', 'blocks.1', 'blocks.2', 'blocks.3', 'blocks.4'), (16, 24, 32, 48, 256)),
    ],
)
def test_the_default_stages_end_in_the_map_that_is_pooled(name, names, dims):
    stages, _ = find_stages(make_backbone(name))
    assert tuple(stage.name for stage in stages) == names
    assert tuple(stage.dim for stage in stages) == dims
    assert {type(stage.layout) for stage in stages} == {NHWC if name == 'swin' else NCHW}


def test_the_layout_is_a_fact_of_each_stage():
    # The blocks of samvit give (B, H, W, D), and its neck gives (B, D, H, W).
    stages, _ = find_stages(timm.create_model('samvit_base_patch16', device='meta'))
    assert [stage.dim for stage in stages] == [768] * (len(stages) - 1) + [256]
    assert [type(stage.layout) for stage in stages] == [NHWC] * (len(stages) - 1) + [NCHW]


class EqualSides(nn.Module):
    """A network whose map has as many channels as rows and columns where the image has 64 pixels."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, 8)
        self.channels_last = channels_last
        self.stage = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.conv(x)
        return self.stage(maps.permute(0, 2, 3, 1) if self.channels_last else maps)


@pytest.mark.parametrize(
    'name, names',
    [
        # Thirty-two, twelve and six blocks of one resolution: at most five, at equal distances.
        ('convmixer_768_32', ('blocks.5', 'blocks.12', 'blocks.18', 'blocks.25', 'blocks.31')),
        ('vit_small_patch16_224', ('blocks.1', 'blocks.4', 'blocks.6', 'blocks.9', 'blocks.11')),
        ('test_vit', ('blocks.0', 'blocks.1', 'blocks.3', 'blocks.4', 'blocks.5')),
        ('samvit_base_patch16', ('blocks.1', 'blocks.4', 'blocks.6', 'blocks.9', 'blocks.11')),
        # timm's table names modules that these do not have.
        (
            'hrnet_w18_small',
            ('incre_modules.0', 'incre_modules.1', 'incre_modules.2', 'incre_modules.3', 'final_layer'),
        ),
        ('mvitv2_tiny', ('stages.0', 'stages.1', 'stages.2', 'stages.3')),
        ('twins_svt_small', ('blocks.0.1', 'blocks.1.1', 'blocks.2.9', 'blocks.3.3')),
        ('coat_lite_tiny', ('serial_blocks1.1', 'serial_blocks2.1', 'serial_blocks3.1', 'serial_blocks4.1')),
        (
            'densenet121',
            (
                'features.norm0',
                'features.denseblock1',
                'features.denseblock2',
                'features.denseblock3',
                'features.norm5',
            ),
        ),
    ],
)
def test_the_default_stages_spread_over_the_depth(name, names):
    stages, _ = find_stages(timm.create_model(name, device='meta'))
    assert tuple(stage.name for stage in stages) == names


@pytest.mark.parametrize('channels_last', [False, True])
def test_a_second_image_tells_channels_from_locations_where_all_sides_are_equal(channels_last):
    model = EqualSides(channels_last)
    stage = find_stage(model, 'stage')
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 8, 8, 8)
    assert stage.layout == (NHWC() if channels_last else NCHW())
    assert stage.to_nchw(model(torch.zeros(1, 3, 64, 128)), (64, 128)).shape == (1, 8, 8, 16)


@pytest.mark.parametrize('size', [(96, 64), (64, 96)])
@pytest.mark.parametrize(
    'name, layer, layout',
    [
        ('swin', 'layers.1', NHWC()),
        ('test_convnext', 'stages.2', NCHW()),
        ('test_convnext', 'stages.2.blocks.0.mlp', NHWC()),
    ],
)
def test_an_image_that_is_not_square_tells_too(name, layer, layout, size):
    model = make_backbone(name, **({'img_size': size} if name == 'swin' else {}))
    assert find_stage(model, layer).layout == layout


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize(
    'name, layer, dim, layout',
    [('test_resnet', 'layer3.0.conv1', 48, NCHW()), ('swin', 'layers.2.blocks.0.norm1', 32, NHWC())],
)
def test_the_stage_of_any_module_and_of_the_pooled_tensor_is_found_with_a_stream_or_without(
    name, layer, dim, layout, stream
):
    model = make_backbone(name)
    width = model.num_features
    if stream:
        attach(model, stream_class_specific=True)
    stage = find_stage(model, layer)
    assert (stage.name, stage.dim, stage.layout) == (layer, dim, layout)
    pooled = pooled_stage(model)
    assert (pooled.dim, pooled.layout) == (width, layout)


def test_a_module_that_gives_no_map_or_does_not_run_once_is_refused():
    model = make_backbone('test_resnet')
    with pytest.raises(ValueError, match=r"layer 'layer9' is no module of ResNet; it has conv1, bn1,"):
        find_stage(model, 'layer9')
    with pytest.raises(ValueError, match=r"layer '' is no module of ResNet"):
        find_stage(model, '')
    with pytest.raises(ValueError, match=r"layer 'fc' of ResNet runs after the pooling or not at all: .* 'layer4'\."):
        find_stage(model, 'fc')
    unused = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten())
    unused[0].unused = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match=r"layer '0\.unused' of Sequential runs after .*, for example '0'\."):
        find_stage(unused, '0.unused')
    with pytest.raises(ValueError, match=r'1 of Sequential gives \(1, 12288\) and not one feature map'):
        find_stage(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.ReLU()), '1')


@pytest.mark.parametrize('pool', ['avg', 'max', 'avgmax'])
def test_heads_that_pool_by_average_or_maximum_are_served(pool):
    stages, found = find_stages(make_backbone('test_resnet', global_pool=pool))
    assert stages[-1].dim == 96 and found == pool


def test_a_head_that_pools_otherwise_is_refused():
    with pytest.raises(ValueError, match=r'ResNet does not pool by average, by maximum or by a class token'):
        find_stages(make_backbone('test_resnet', global_pool='catavgmax'))


@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'test_efficientnet', 'swin'])
def test_heads_pool_until_the_pooling_is_taken_away(name):
    model = make_backbone(name)
    pooled = pooled_stage(model)
    assert head_pooling(model, pooled, model.forward_head) == 'avg'
    model.reset_classifier(0)
    assert head_pooling(model, pooled, model.forward_head) == 'avg'
    model.reset_classifier(0, '')
    assert head_pooling(model, pooled, model.forward_head) == ''


@pytest.mark.parametrize(
    'pool, expected', [('avg', 'avg'), ('max', 'max'), ('avgmax', 'avgmax'), ('catavgmax', 'unknown')]
)
def test_the_head_itself_tells_how_it_pools(pool, expected):
    model = make_backbone('test_resnet', global_pool=pool)
    assert head_pooling(model, pooled_stage(model), model.forward_head) == expected


@pytest.mark.parametrize('name', ['test_resnet', 'swin'])
def test_pooling_one_location_gives_the_vector(name):
    model = make_backbone(name)
    vector = torch.randn(2, model.num_features)
    location = pooled_stage(model).one_location(vector)
    assert torch.equal(model.forward_head(location, pre_logits=True), vector)


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize(
    'file, layer',
    [
        ('vision_transformer', 'blocks.4'),
        ('deit', 'blocks.4'),
        ('convit', 'blocks.4'),
        ('coat', 'serial_blocks4.0'),
        ('tnt', 'blocks.4'),
        ('vision_transformer_hybrid', 'blocks.4'),
        # The patch tokens of these enter blocks of class attention unchanged.
        ('cait', 'blocks.5'),
        ('xcit', 'blocks.5'),
        ('volo', 'network.4'),
        ('beit', None),
        ('mlp_mixer', None),
        ('hiera', None),
        ('naflexvit', None),
    ],
)
def test_cam_methods_read_the_input_of_the_last_block_where_the_head_reads_a_class_token(file, layer, stream):
    model, _ = token_network(file)
    if stream:
        attach(model)
    assert cam_layer(model) == layer


def test_the_cam_layer_follows_the_pooling_and_is_known_on_the_meta_device():
    model = make_backbone('test_vit')
    model.reset_classifier(10, 'avg')
    assert cam_layer(model) is None
    assert cam_layer(make_backbone('test_resnet')) is None
    assert cam_layer(timm.create_model('test_vit', device='meta')) == 'blocks.4'


@pytest.mark.parametrize(
    'file, expected',
    [
        ('vision_transformer', 'token'),
        ('deit', 'token'),
        ('cait', 'token'),
        ('volo', 'token'),
        ('beit', 'avg'),
        ('levit', 'avg'),
        ('efficientformer', 'avg'),
        ('gemma4_vit', 'avg'),
    ],
)
def test_heads_of_token_networks_tell_too(file, expected):
    model, _ = token_network(file)
    assert head_pooling(model, pooled_stage(model), model.forward_head) == expected


def test_an_average_that_takes_in_the_prefix_tokens_is_one_of_its_own():
    model = make_backbone('test_vit2', pool_include_prefix=True)
    assert head_pooling(model, pooled_stage(model), model.forward_head) == 'tokens'


def test_blocks_of_hiera_are_the_only_modules_whose_order_is_known():
    model, _ = token_network('hiera')
    assert find_stage(model, 'blocks.1').layout == Tokens(0, (8, 8), windows=((2, 2), (2, 2)))
    with pytest.raises(ValueError, match=r'blocks\.1\.norm1 of Hiera may give tokens in another order.* to blocks\.4'):
        find_stage(model, 'blocks.1.norm1')


@pytest.mark.parametrize(
    'layer, expected',
    [
        (nn.BatchNorm2d(4), True),
        (nn.SyncBatchNorm(4), True),
        (BatchNormAct2d(4), True),
        (FrozenBatchNormAct2d(4), True),
        (nn.LayerNorm(4), True),
        (LayerNorm2d(4), True),
        (nn.GroupNorm(2, 4), True),
        (nn.InstanceNorm2d(4), True),
        (nn.Conv2d(4, 4, 1), False),
        (nn.Sequential(nn.BatchNorm2d(4)), False),
        (nn.Dropout(), False),
    ],
)
def test_normalisation_layers_are_known(layer, expected):
    assert is_norm(layer) is expected


@pytest.mark.parametrize('wrap', [lambda m: torch.compile(m, backend='eager'), AveragedModel, torch.nn.Sequential])
def test_a_wrapped_model_is_told_to_take_its_stream_first(wrap):
    with pytest.raises(ValueError, match=r'This \w+ holds a ResNet: call timm_castream\.attach on the ResNet first'):
        attach(wrap(timm.create_model('test_resnet')))
