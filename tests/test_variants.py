"""The options of timm's create_model, saving and loading, for variants of every kind of network."""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save, save_file
from states import make_model, same, snapshot, stream_of
from torch import Tensor

from timm_castream import forward_both, save_stream
from timm_castream.hub import repository as publish
from timm_castream.hub.load import open_model

pytest_plugins = ('hub_server',)

# A network of each kind: maps with a BatchNorm and a LayerNorm, maps in (B, H, W, D), tokens that are averaged, and a
# class token. With the arguments that make it small, and another image size that its create_model takes.
SWIN = {'embed_dim': 8, 'depths': (1, 1, 1, 1), 'num_heads': (1, 1, 2, 2), 'img_size': 64, 'window_size': 2}
VIT = {'img_size': 64, 'patch_size': 16, 'embed_dim': 32, 'depth': 3, 'num_heads': 2}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    'map': ('test_efficientnet', {}, {}),
    'map with LayerNorm': ('test_convnext', {}, {}),
    'NHWC map': ('swin_tiny_patch4_window7_224', SWIN, {'img_size': 96}),
    'averaged tokens': ('vit_base_patch16_rpn_224', VIT, {}),
    'tokens with a grid': ('test_vit2', {'img_size': 64}, {'img_size': 96}),
    'class token': ('deit_tiny_patch16_224', VIT, {'img_size': 96}),
}


@pytest.fixture(params=KINDS, ids=list(KINDS))
def kind(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any], dict[str, Any]]:
    return KINDS[request.param]


def images(model: Any, in_chans: int = 3, side: int = 64) -> Tensor:
    return torch.randn(2, in_chans, side, side, generator=torch.Generator().manual_seed(3))


def test_a_variant_takes_classes_channels_and_pooling_as_its_backbone_does(kind):
    name, args, _ = kind
    args = {**args, 'num_classes': 3, 'in_chans': 1}
    model, plain = make_model(f'{name}_castream', **args).eval(), timm.create_model(name, **args)
    assert model(images(model, in_chans=1)).shape == (2, 3)
    assert isinstance(model, type(plain))
    assert {k: v.shape for k, v in model.state_dict().items() if not k.startswith('castream.')} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    unpooled = timm.create_model(f'{name}_castream', **{**args, 'num_classes': 0}, global_pool='')
    expected = timm.create_model(name, **{**args, 'num_classes': 0}, global_pool='')
    x = images(model, in_chans=1)
    with torch.no_grad():
        assert unpooled.eval()(x).shape == expected.eval()(x).shape


def test_features_only_gives_the_feature_maps_of_the_backbone(kind):
    name, args, _ = kind
    model = make_model(f'{name}_castream', features_only=True, **args).eval()
    plain = make_model(name, features_only=True, **args).eval()
    x = images(model)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(x), plain(x), strict=True))


def test_a_variant_is_saved_and_loaded_by_folder_and_by_file(kind, tmp_path):
    name, args, _ = kind
    model = make_model(f'{name}_castream', num_classes=3, stream_start=1, **args)
    publish.write_repository(model, tmp_path, 'org/net')
    assert json.loads((tmp_path / 'config.json').read_text())['architecture'] == f'{name}_castream'
    loaded = make_model(f'local-dir:{tmp_path}', seed=1, pretrained=True)
    assert same(snapshot(model), snapshot(loaded))
    opened = open_model(f'{name}_castream', tmp_path / 'model.safetensors', num_classes=3, **args)
    assert same(snapshot(model), snapshot(opened))
    x = images(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), loaded.eval()(x))


def test_a_saved_variant_is_loaded_for_another_image_size_and_number_of_classes(kind, tmp_path):
    name, args, other = kind
    model = make_model(f'{name}_castream', num_classes=3, **args)
    publish.write_repository(model, tmp_path, 'org/net')
    loaded = make_model(f'local-dir:{tmp_path}', seed=1, pretrained=True, num_classes=4, **other)
    assert same(stream_of(model), stream_of(loaded))
    plain = timm.create_model(name, **{**args, **other})
    adapted = {key for key, value in plain.state_dict().items() if value.shape != model.state_dict()[key].shape}
    classifier = ('head.fc.', 'head.weight', 'head.bias', 'classifier.')
    adapted |= {key for key in model.state_dict() if key.startswith(classifier)}
    for key, value in model.state_dict().items():
        if key not in adapted:
            assert torch.equal(value, loaded.state_dict()[key]), key
    with torch.no_grad():
        assert loaded.eval()(images(model, side=other.get('img_size', 64))).shape == (2, 4)


def test_timms_weights_of_the_backbone_are_loaded_and_a_stream_alone_goes_on_them(kind, hub, tmp_path):
    name, args, _ = kind
    gap = make_model(name, **args)
    repository = timm.get_pretrained_cfg(name).hf_hub_id
    if repository is None:
        pytest.skip(f'timm has no weights of {name} on the Hub')
    hub.add(repository, model__safetensors=save(gap.state_dict()))
    model = make_model(f'{name}_castream', seed=1, backbone_pretrained=True, **args).eval()
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(forward_both(model, x)['gap'], gap.eval()(x))
    save_stream(model, tmp_path / 's.safetensors')
    assert same(snapshot(model), snapshot(open_model(f'{name}_castream', tmp_path / 's.safetensors', **args)))


def test_a_gap_checkpoint_starts_a_frozen_training(kind, tmp_path):
    name, args, _ = kind
    gap = make_model(name, num_classes=3, **args)
    save_file(gap.state_dict(), tmp_path / 'gap.safetensors')
    frozen = {'freeze_backbone': True, 'backbone_checkpoint': tmp_path / 'gap.safetensors'}
    model = make_model(f'{name}_castream', num_classes=3, **frozen, **args)
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {
        f'castream.{key}' for key, _ in model.castream.named_parameters()
    }
    assert same(snapshot(gap), {key: v for key, v in snapshot(model).items() if not key.startswith('castream.')})


def test_output_stride_and_dynamic_sizes_are_handed_to_the_backbone():
    model = make_model('test_efficientnet_castream', output_stride=8).eval()
    assert model.forward_features(images(model)).shape[-1] == 8
    model = make_model('deit_tiny_patch16_224_castream', dynamic_img_size=True, **{**VIT, 'img_size': 32}).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 48, 64)).shape == (1, 1000)
