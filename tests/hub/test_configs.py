"""The pretrained cfgs of the variants of the paper."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest
import timm
import torch
from safetensors import safe_open
from states import make_model

import hf_configs
from timm_castream.hub import configs
from timm_castream.hub.configs import read_configs

GAP_TAGS = {
    **dict.fromkeys(
        (
            'resnet18',
            'resnet34',
            'resnet50',
            'resnet101',
            'resnet152',
            'resnext50_32x4d',
            'resnext101_32x8d',
            'wide_resnet50_2',
            'wide_resnet101_2',
        ),
        'tv_in1k',
    ),
    **dict.fromkeys(('convnext_tiny', 'convnext_small', 'convnext_base', 'convnext_large'), 'fb_in1k'),
    **dict.fromkeys(('test_resnet', 'test_convnext'), 'r160_in1k'),
}


class TestConfigs:
    @pytest.mark.parametrize(('backbone', 'tag'), GAP_TAGS.items())
    def test_config_says_of_the_images_what_the_gap_weights_say(self, backbone, tag):
        cfg = next(c for c in read_configs().values() if c.architecture == f'{backbone}_castream')
        reference = timm.get_pretrained_cfg(f'{backbone}.{tag}')
        for name in (
            'input_size',
            'test_input_size',
            'min_input_size',
            'fixed_input_size',
            'interpolation',
            'crop_pct',
            'test_crop_pct',
            'crop_mode',
            'mean',
            'std',
            'num_classes',
            'pool_size',
            'test_pool_size',
            'first_conv',
            'classifier',
            'license',
            'custom_load',
        ):
            assert getattr(cfg, name) == getattr(reference, name), name

    def test_there_is_one_config_for_every_variant_of_the_paper_and_no_other(self):
        architectures = sorted(cfg.architecture for cfg in read_configs().values())
        assert architectures == sorted(f'{b}_castream' for b in GAP_TAGS)
        assert set(architectures) <= set(timm.list_models('*_castream'))

    @pytest.mark.parametrize('backbone', GAP_TAGS)
    def test_config_holds_all_that_timm_needs_to_build_the_variant(self, backbone):
        file = next(f for f in files('hf_configs').iterdir() if re.match(rf'{backbone}_castream(\.\w+)?\.json', f.name))
        config = json.loads(file.read_text())
        with torch.device('meta'):
            model = timm.create_model(backbone)
        assert config['architecture'] == f'{backbone}_castream'
        assert (config['num_classes'], config['num_features']) == (model.num_classes, model.num_features)
        small = make_model('test_resnet_castream', **config['model_args'])
        assert config['model_args'] == small.castream_config == make_model('test_resnet_castream').castream_config

    def test_variants_of_the_paper_name_their_file_and_test_variants_name_none(self):
        for name, cfg in read_configs().items():
            if name.startswith('test_'):
                assert (cfg.tag, cfg.hf_hub_id, cfg.hf_hub_filename) == (None, None, None)
            else:
                assert name == f'{cfg.architecture}.sgd90_in1k'
                assert cfg.hf_hub_filename == 'model.safetensors'

    def test_published_variants_alone_name_their_repository_and_are_listed_as_pretrained(self, monkeypatch):
        variants = {name for name, cfg in read_configs().items() if cfg.tag}
        listed = {name for name in timm.list_pretrained('*_castream*') if name not in configs.shipped_streams()}
        assert listed == {name for name in variants if name in hf_configs.PUBLISHED}
        monkeypatch.setattr(configs, 'PUBLISHED', {'resnet50_castream.sgd90_in1k'})
        assert {name: cfg.hf_hub_id for name, cfg in read_configs().items() if cfg.hf_hub_id} == {
            'resnet50_castream.sgd90_in1k': 'timm-castream/resnet50_castream.sgd90_in1k'
        }
        assert read_configs()['resnet50_castream.sgd90_in1k'].has_weights
        assert not read_configs()['resnet18_castream.sgd90_in1k'].has_weights

    def test_streams_of_the_package_are_small_float16_files_with_a_card_each(self):
        for name, path in configs.shipped_streams().items():
            with safe_open(path, 'pt') as file:
                assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
                assert file.metadata()['backbone'] == name.removesuffix('_castream')
            assert path.stat().st_size <= 4_000_000
            assert name in path.with_suffix('.md').read_text(encoding='utf-8')

    def test_environment_variable_names_another_namespace(self, monkeypatch):
        monkeypatch.setenv('TIMM_CASTREAM_NAMESPACE', 'mirror')
        assert configs.hub_repository('resnet50_castream.sgd90_in1k') == 'mirror/resnet50_castream.sgd90_in1k'
        monkeypatch.setattr(configs, 'PUBLISHED', {'resnet50_castream.sgd90_in1k'})
        cfg = read_configs()['resnet50_castream.sgd90_in1k']
        assert cfg.hf_hub_id == 'mirror/resnet50_castream.sgd90_in1k'
