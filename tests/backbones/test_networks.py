"""One small network of every model file of timm takes a stream: default stages, widths, and the way back."""

from __future__ import annotations

import pytest
import timm
import torch
from networks import TOKEN_NETWORKS

from timm_castream import attach, detach
from timm_castream.backbones import architectures
from timm_castream.backbones.layout import NCHW, NHWC, Tokens

NETWORKS = {
    'byoanet': 'eca_botnext26ts_256',
    'byobnet': 'test_byobnet',
    'convmixer': 'convmixer_1024_20_ks9_p14',
    'convnext': 'test_convnext',
    'csatv2': 'csatv2',
    'cspnet': 'darknet17',
    'cspnext': 'cspnext_s',
    'davit': 'davit_tiny',
    'densenet': 'densenet121',
    'dla': 'dla46_c',
    'dpn': 'dpn48b',
    'edgenext': 'edgenext_xx_small',
    'efficientformer_v2': 'efficientformerv2_s0',
    'efficientnet': 'test_efficientnet',
    'efficientvit_msra': 'efficientvit_m0',
    'fasternet': 'fasternet_t0',
    'fastvit': 'fastvit_t8',
    'focalnet': 'focalnet_tiny_srf',
    'gcvit': 'gcvit_xxtiny',
    'ghostnet': 'ghostnet_050',
    'hardcorenas': 'hardcorenas_a',
    'hgnet': 'hgnetv2_b0',
    'hieradet_sam2': 'sam2_hiera_tiny',
    'hrnet': 'hrnet_w18_small',
    'iformer': 'iformer_t',
    'inception_next': 'inception_next_atto',
    'inception_resnet_v2': 'inception_resnet_v2',
    'inception_v3': 'inception_v3',
    'inception_v4': 'inception_v4',
    'lcnetv2': 'lcnetv2_small',
    'mambaout': 'test_mambaout',
    'maxxvit': 'coatnet_nano_rw_224',
    'metaformer': 'poolformer_s12',
    'mobilenetv3': 'lcnet_035',
    'mobilenetv5': 'mobilenetv5_base',
    'mobilevit': 'mobilevitv2_050',
    'nasnet': 'nasnetalarge',
    'nest': 'nest_tiny',
    'nextvit': 'nextvit_small',
    'nfnet': 'test_nfnet',
    'pnasnet': 'pnasnet5large',
    'pvt_v2': 'pvt_v2_b0',
    'rdnet': 'rdnet_tiny',
    'regnet': 'regnetx_002',
    'repghost': 'repghostnet_050',
    'repvit': 'repvit_m0_9',
    'res2net': 'res2net50_14w_8s',
    'resnest': 'resnest14d',
    'resnet': 'test_resnet',
    'resnetv2': 'resnetv2_18',
    'rexnet': 'rexnet_100',
    'selecsls': 'selecsls42',
    'senet': 'legacy_seresnet18',
    'sequencer': 'sequencer2d_s',
    'shvit': 'shvit_s1',
    'sknet': 'skresnet18',
    'starnet': 'starnet_s1',
    'swiftformer': 'swiftformer_xs',
    'swin_transformer': 'swin_tiny_patch4_window7_224',
    'swin_transformer_v2': 'swinv2_tiny_window8_256',
    'swin_transformer_v2_cr': 'swinv2_cr_tiny_224',
    'tiny_vit': 'tiny_vit_5m_224',
    'tresnet': 'tresnet_m',
    'vision_transformer_sam': 'samvit_base_patch16',
    'visformer': 'visformer_tiny',
    'vovnet': 'ese_vovnet19b_dw',
    'xception': 'legacy_xception',
    'xception_aligned': 'xception41',
    **{file: name for file, (name, _, _) in TOKEN_NETWORKS.items() if isinstance(name, str)},
    'deepseek_vit': 'deepseek_vit_412m',
    'qwen3_vit': 'qwen3_vit_88m',
    'gemma4_vit': 'gemma4_vit_167m',
    'mlp_mixer': 'mixer_s32_224',
    'mvitv2': 'mvitv2_tiny',
    'volo': 'volo_d1_224',
}
# Too large to make: on the meta device, where a head's pooling cannot be compared.
LARGE = (
    'deepseek_vit',
    'gemma4_vit',
    'inception_resnet_v2',
    'inception_v4',
    'nasnet',
    'nextvit',
    'pnasnet',
    'qwen3_vit',
    'vision_transformer_sam',
)
# The map that they pool is (B, H, W, D).
CHANNELS_LAST = (
    'deepseek_vit',
    'hieradet_sam2',
    'mambaout',
    'qwen3_vit',
    'sequencer',
    'swin_transformer',
    'swin_transformer_v2',
)


def test_every_file_has_its_network():
    assert set(NETWORKS) == architectures.MAPS | architectures.TOKENS
    assert {file: architectures.file_of(name) for file, name in NETWORKS.items()} == {file: file for file in NETWORKS}


@pytest.mark.slow
@pytest.mark.parametrize('file', NETWORKS)
def test_a_network_of_every_file_takes_a_stream_and_gives_it_back(file):
    with torch.device('meta' if file in LARGE else 'cpu'):
        model = timm.create_model(NETWORKS[file])
    keys, kind = list(model.state_dict()), type(model)
    attach(model)
    assert 2 < len(model.castream_stages) <= 6, model.castream_stages
    assert model.castream.dims[-1] == model.num_features
    layout = NHWC if file in CHANNELS_LAST else Tokens if file in architectures.TOKENS else NCHW
    assert isinstance(model.pooled_stage.layout, layout)
    detach(model)
    assert list(model.state_dict()) == keys and type(model) is kind
