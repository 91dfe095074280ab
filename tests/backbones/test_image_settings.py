"""Settings of a network's images, against timm's own."""

import numpy as np
import pytest
import timm
import torch
from timm.data import resolve_model_data_config

from timm_castream.backbones.image_settings import image_settings, set_image_settings
from timm_castream.hub.load import open_model
from timm_castream.inference.images import normalisation


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'tf_efficientnet_lite0', 'vit_tiny_patch16_224'])
def test_those_of_an_ordinary_network_are_timms(name):
    model = timm.create_model(name)
    expected = resolve_model_data_config(model)
    assert image_settings(model) == expected
    set_image_settings(model)
    assert {key: model.pretrained_cfg[key] for key in expected} == expected


@pytest.mark.parametrize('channels', [1, 2, 4])
def test_other_channels_have_the_average_mean_and_std_as_in_timms_loader(channels):
    model = timm.create_model('test_resnet', in_chans=channels)
    settings = image_settings(model)
    cfg = model.pretrained_cfg
    assert settings['input_size'] == (channels, 160, 160)
    assert settings['mean'] == pytest.approx([sum(cfg['mean']) / 3] * channels)
    assert settings['std'] == pytest.approx([sum(cfg['std']) / 3] * channels)
    opened = open_model('test_resnet_castream', in_chans=channels).pretrained_cfg
    assert (opened['input_size'], opened['mean']) == (settings['input_size'], settings['mean'])
    with pytest.raises(ValueError, match=f'{channels} channels, --input-size has 3'):
        image_settings(model, (3, 64, 64))


@pytest.mark.parametrize('options', [{'input_size': (3, 96, 160)}, {'img_size': 96}])
def test_another_size_is_the_size_of_the_transform(options):
    model = timm.create_model('test_resnet')
    expected = resolve_model_data_config(model, options)
    set_image_settings(model, **options, crop_pct=0.8)
    for use_test_size in (False, True):
        settings = resolve_model_data_config(model, use_test_size=use_test_size)
        assert settings == {**expected, 'crop_pct': 0.8}


@pytest.mark.parametrize('name', ['test_vit_castream', 'test_vit'])
def test_a_network_of_a_fixed_size_takes_the_new_one(name):
    model = open_model(name).eval()
    set_image_settings(model, (3, 96, 128))
    with torch.no_grad():
        assert model(torch.rand(1, 3, 96, 128)).shape == (1, model.num_classes)


def test_another_mean_and_std_are_those_of_the_transform():
    model = timm.create_model('test_resnet')
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    expected = {**resolve_model_data_config(model), 'mean': mean, 'std': std}
    set_image_settings(model, mean=mean, std=std)
    assert resolve_model_data_config(model) == image_settings(model) == expected


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'mean': [0.5, 0.5]}, '^mean must hold one number or one per channel, got 2 for images of 3 channels'),
        ({'mean': []}, '^mean must hold one number or one per channel, got 0'),
        ({'mean': 'grey'}, "^mean must hold numbers, got 'grey'"),
        ({'std': [0.5, 0.5, 0.0]}, '^std must hold positive numbers'),
        ({'std': [0.5, 0.5, float('nan')]}, '^std must hold positive numbers'),
    ],
)
def test_a_mean_or_std_that_is_none_of_the_channels_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        set_image_settings(timm.create_model('test_resnet'), **options)


@pytest.mark.parametrize('mean', [0.25, (0.25,), [0.25] * 3, np.full(3, 0.25), torch.full((3,), 0.25)])
def test_a_mean_and_a_std_are_a_number_or_one_per_channel_of_any_kind(mean):
    model = timm.create_model('test_resnet')
    set_image_settings(model, mean=mean, std=mean)
    assert model.pretrained_cfg['mean'] == model.pretrained_cfg['std'] == (0.25, 0.25, 0.25)
    x = torch.ones(1, 3, 4, 4)
    for offset in normalisation({}, x, mean, mean):
        assert (x * offset).eq(0.25).all()


def test_a_mean_may_be_negative():
    assert image_settings(timm.create_model('test_resnet'), mean=(-0.5, 0, 0.5))['mean'] == (-0.5, 0, 0.5)
