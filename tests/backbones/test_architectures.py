"""The table of timm's model files: which architectures have a variant, and why the others have none."""

from __future__ import annotations

import pytest
import timm
from conftest import make_backbone
from torch import nn

from timm_castream.backbones import architectures


def test_more_than_a_thousand_architectures_of_timm_are_covered():
    names = architectures.architectures()
    assert len(names) > 1000
    assert set(names) <= set(timm.list_models())
    assert not any(name.endswith('_castream') for name in names)
    assert {
        'resnet50',
        'convnext_base',
        'swin_tiny_patch4_window7_224',
        'vit_base_patch16_224',
        'deit3_small_patch16_224',
        'hiera_tiny_224',
        'mixer_b16_224',
    } <= set(names)


def test_every_model_file_of_timm_has_a_row_once():
    rows = [*architectures.MAPS, *architectures.TOKENS, *architectures.EXCLUDED_FILES]
    assert len(set(rows)) == len(rows)
    files = {architectures.file_of(name) for name in timm.list_models() if not name.endswith('_castream')}
    assert files <= set(rows), f'{sorted(files - set(rows))} are new in timm: add a row'


@pytest.mark.parametrize(
    'architecture, clause',
    [
        ('crossvit_9_240', 'two branches'),
        ('pit_s_224', 'class token alone'),
        ('vgg11', 'layers stand between'),
        ('efficientvit_b0', 'layers stand between'),
        ('cpubone_b0_bfrobust', 'layers stand between'),
        ('lowformer_b0', 'layers stand between'),
        ('efficientvim_m1', 'several scales'),
        ('coat_tiny', 'several scales'),
        ('vit_base_patch16_siglip_224', 'attention pooling'),
        ('vit_pe_core_base_patch16_224', 'attention pooling'),
        ('vit_so150m_patch16_reg4_map_256', 'attention pooling'),
        ('resnet50_clip', 'attention pooling'),
    ],
)
def test_excluded_architectures_have_a_reason(architecture, clause):
    if not timm.is_model(architecture):
        pytest.skip(f'timm {timm.__version__} has no {architecture}')
    assert clause in architectures.why_unsupported(architecture)
    assert not architectures.supported(architecture)


@pytest.mark.parametrize(
    'architecture',
    ['vit_base_patch16_siglip_gap_224', 'resnet50_clip_gap', 'coat_lite_tiny', 'efficientvit_m0', 'test_vit'],
)
def test_their_neighbours_are_covered(architecture):
    assert architectures.why_unsupported(architecture) == ''
    assert architectures.supported(architecture)


def test_an_architecture_that_timm_does_not_register_is_refused():
    with pytest.raises(ValueError, match="'resnet51' is no architecture of timm"):
        architectures.supported('resnet51')


def test_the_table_is_read_for_a_model_too():
    assert architectures.why_unsupported_model(make_backbone('test_resnet')) == ''
    assert architectures.why_unsupported_model(nn.Linear(1, 1)) == ''
    vgg = timm.create_model('vgg11', device='meta')
    assert 'layers stand between' in architectures.why_unsupported_model(vgg)
    vgg.pretrained_cfg = {}
    assert 'layers stand between' in architectures.why_unsupported_model(vgg)
    siglip = timm.create_model('vit_base_patch16_siglip_224', device='meta')
    assert 'attention pooling' in architectures.why_unsupported_model(siglip)
    siglip.reset_classifier(10, 'avg')
    assert architectures.why_unsupported_model(siglip) == ''
    assert architectures.has_raster_tokens(make_backbone('test_vit'))
    assert not architectures.has_raster_tokens(make_backbone('test_resnet'))
