"""The registered variants, by name and through timm alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import make_backbone
from safetensors.torch import save_file
from timm.models import FeatureListNet, PretrainedCfg
from torch import Tensor, nn

import timm_castream
from hf_configs import PUBLISHED
from timm_castream import detach, forward_both, models, pooling
from timm_castream.backbones import architectures as families
from timm_castream.hub import repository

BACKBONES = (
    'resnet18',
    'resnet34',
    'resnet50',
    'resnet101',
    'resnet152',
    'resnext50_32x4d',
    'resnext101_32x8d',
    'wide_resnet50_2',
    'wide_resnet101_2',
    'convnext_tiny',
    'convnext_small',
    'convnext_base',
    'convnext_large',
    'test_resnet',
    'test_convnext',
)
SMALL = ('test_resnet', 'test_convnext')
# Variants whose trained stream is in the package.
SHIPPED = tuple(f'tf_efficientnet_lite{i}_castream' for i in range(3))
# What the images of a network look like, and where its first and last layers are.
CFG_FIELDS = (
    'input_size',
    'pool_size',
    'mean',
    'std',
    'interpolation',
    'crop_pct',
    'crop_mode',
    'first_conv',
    'classifier',
    'num_classes',
    'fixed_input_size',
    'min_input_size',
)


def random_weights(name: str, **kwargs: object) -> dict[str, Tensor]:
    """A state dict of the plain backbone unlike a fresh one."""
    model = make_backbone(name, **kwargs)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.state_dict()


def logits(state_dict: dict[str, Tensor], name: str, x: Tensor, num_classes: int = 10) -> Tensor:
    model = make_backbone(name, num_classes)
    model.load_state_dict(state_dict)
    return model(x)


@pytest.fixture
def weights_of_the_hub(monkeypatch) -> dict[str, Tensor]:
    """1000-class weights of test_resnet, in place of those that the Hub would give."""
    state_dict = random_weights('test_resnet', num_classes=1000)
    asked = []

    def answer(name: str) -> dict[str, Tensor]:
        asked.append(name)
        assert name == 'test_resnet.r160_in1k'
        return {key: value.clone() for key, value in state_dict.items()}

    monkeypatch.setattr('timm_castream.hub.load.read_timm_weights', answer)
    monkeypatch.setattr('timm_castream.hub.repository.read_timm_weights', answer)
    monkeypatch.setattr('timm_castream.hub.read.read_timm_weights', answer)
    yield state_dict
    assert asked


def in_a_fresh_process(code: str) -> str:
    """Runs code in another process; returns its output."""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_architecture_that_takes_a_stream_has_a_variant_which_timm_lists():
    names = {f'{name}_castream' for name in families.architectures()}
    assert names >= {f'{name}_castream' for name in BACKBONES}
    assert len(names) > 1000
    assert set(timm.list_models('*_castream*')) == set(timm.list_models('*_castream', module='models')) == names
    assert not any(timm.is_model(f'{name}_castream') for name in ('vgg16', 'crossvit_9_240', 'resnet50_clip'))


def test_registering_builds_no_network():
    assert (
        in_a_fresh_process(
            'import timm, torch\n'
            'def refuse(self, *args, **kwargs): raise AssertionError(type(self))\n'
            'torch.nn.Module.__init__ = refuse\n'
            'import timm_castream\n'
            "print(timm.is_model('resnet50_castream'))"
        )
        == 'True\n'
    )


def test_an_architecture_that_timm_adds_to_a_known_file_gets_its_variant():
    assert (
        in_a_fresh_process(
            'import timm\n'
            'from timm.models import resnet, register_model\n'
            'def resnet18_of_tomorrow(pretrained=False, **kwargs): return resnet.resnet18(pretrained, **kwargs)\n'
            "resnet18_of_tomorrow.__module__ = 'timm.models.resnet'\n"
            'register_model(resnet18_of_tomorrow)\n'
            'import timm_castream\n'
            "print(timm.create_model('resnet18_of_tomorrow_castream', device='meta').castream.dims)"
        )
        == '(64, 64, 128, 256, 512)\n'
    )


def test_every_variants_cfg_is_its_backbones_without_the_weights():
    fields = set(PretrainedCfg.__dataclass_fields__) - {
        'url',
        'file',
        'hf_hub_id',
        'hf_hub_filename',
        'architecture',
        'tag',
        'custom_load',
        'label_offset',
    }
    for name in set(families.architectures()) - set(BACKBONES):
        own, backbone = timm.get_pretrained_cfg(f'{name}_castream'), timm.get_pretrained_cfg(name) or PretrainedCfg()
        assert {f: getattr(own, f) for f in fields} == {f: getattr(backbone, f) for f in fields}, name
        shipped = f'{name}_castream' in SHIPPED
        assert (own.architecture, own.tag, bool(own.has_weights)) == (f'{name}_castream', None, shipped), name


def test_published_weights_and_the_streams_of_the_package_alone_are_advertised():
    names = timm.list_pretrained('*_castream*')
    assert names == timm.list_models('*_castream*', pretrained=True) == sorted({*PUBLISHED, *SHIPPED})


class TestStreamOfThePackage:
    """A stand-in: random weights of the backbone, and a stream of other arguments than the default ones."""

    NAME = 'test_resnet_castream'

    @pytest.fixture
    def trained(self, weights_of_the_hub, monkeypatch, tmp_path):
        """The model that `pretrained=True` should give, whose stream alone is in the package."""
        model = timm.create_model(self.NAME, backbone_pretrained=True, stream_start=2)
        timm_castream.save_stream(model, tmp_path / f'{self.NAME}.safetensors')
        monkeypatch.setattr(models, '_shipped', {self.NAME: str(tmp_path / f'{self.NAME}.safetensors')})
        return model.eval()

    def create(self, **kwargs):
        overlay = {'file': models._shipped[self.NAME]}
        return timm.create_model(self.NAME, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()

    def test_brings_its_arguments_and_takes_timms_weights_of_the_backbone(self, trained, x):
        model = self.create()
        assert model.castream_config == trained.castream_config
        assert torch.equal(model(x), trained(x))

    def test_loads_with_other_classes_and_as_feature_maps(self, trained, x):
        model = self.create(num_classes=7)
        assert model(x).shape == (len(x), 7)
        assert torch.equal(model.castream.cls_token, trained.castream.cls_token)
        maps = self.create(features_only=True)(x)
        assert torch.allclose(maps[-1], trained.forward_features(x))

    def test_other_arguments_or_another_backbone_are_refused(self, trained, tmp_path):
        with pytest.raises(ValueError, match=r'stream_start=2, .* has stream_start=1'):
            self.create(stream_start=1)
        other = random_weights('test_resnet', num_classes=1000)
        other['conv1.0.weight'] *= 2
        torch.save(other, tmp_path / 'other.pth')
        with pytest.raises(ValueError, match='trained on other weights of test_resnet: their fingerprint is'):
            self.create(backbone_checkpoint=str(tmp_path / 'other.pth'))

    def test_a_repository_of_the_same_content_can_be_pushed(self, trained, tmp_path, x):
        for stream_only in (False, True):
            folder = tmp_path / str(stream_only)
            repository.write_repository(self.create(), folder, f'org/{self.NAME}', stream_only)
            config = (folder / 'config.json').read_text()
            assert str(tmp_path) not in config
            assert torch.equal(timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(x), trained(x))


@pytest.mark.parametrize('name', ['test_efficientnet', 'test_vit', 'swin_tiny_patch4_window7_224'])
def test_pretrained_without_published_weights_is_one_sentence(name):
    message = rf'^No pretrained weights exist for {name}_castream: .*backbone_pretrained'
    with pytest.raises(RuntimeError, match=message) as caught:
        timm.create_model(f'{name}_castream', pretrained=True)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', BACKBONES)
def test_a_variants_cfg_is_its_backbones(name):
    tag = models.GAP_TAGS[name]
    assert f'{name}.{tag}' in timm.list_pretrained(f'{name}.*')
    backbone, own = timm.get_pretrained_cfg(f'{name}.{tag}'), timm.get_pretrained_cfg(f'{name}_castream')
    assert own.architecture == f'{name}_castream'
    assert {field: getattr(own, field) for field in CFG_FIELDS} == {
        field: getattr(backbone, field) for field in CFG_FIELDS
    }


@pytest.mark.parametrize('name', BACKBONES)
def test_every_variant_is_its_backbone_and_five_stages_of_a_stream(name):
    model = timm.create_model(f'{name}_castream', num_classes=10, device='meta')
    plain = timm.create_model(name, num_classes=10, device='meta')
    state = {k: v.shape for k, v in model.state_dict().items()}
    assert {k: v for k, v in state.items() if not k.startswith('castream.')} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    assert isinstance(model, type(plain))
    assert len(model.castream_stages) == len(model.castream.blocks) == 5
    assert model.castream.dims[-1] == model.num_features
    assert model.default_cfg['architecture'] == f'{name}_castream'
    # x of layer1 .. layer4 and of stages 0 .. 3; the stem has the width that the first stage starts from.
    stem = 64 if 'res' in name else plain.feature_info[0]['num_chs']
    if name != 'test_resnet':
        assert model.castream.dims == (stem, *(info['num_chs'] for info in plain.feature_info[-4:]))


@pytest.mark.parametrize('name', SMALL)
def test_all_arguments_go_through_create_model(name):
    args = {
        'stream_start': 1,
        'stream_stages': None,
        'stream_block': 'proj_ca',
        'stream_class_specific': True,
        'stream_heads': 2,
        'stream_drop': 0.1,
        'stream_bias': False,
        'stream_init': 'gap',
    }
    model = timm.create_model(f'{name}_castream', num_classes=7, in_chans=1, drop_rate=0.1, **args)
    assert model.castream_config == args
    assert model.castream.cls_token.shape == (7, model.castream.dims[0])
    assert model.eval()(torch.randn(2, 1, 64, 64)).shape == (2, 7)
    frozen = timm.create_model(f'{name}_castream', **args)
    assert all(p.requires_grad for p in frozen.parameters())


def test_an_unknown_argument_is_refused_as_timm_does():
    with pytest.raises(TypeError, match='stream_stop'):
        timm.create_model('test_resnet_castream', stream_stop=3)
    with pytest.raises(ValueError, match='stream_start 9'):
        timm.create_model('test_resnet_castream', stream_start=9)


def test_a_backbone_without_pooling_gives_the_plain_map(x):
    model = timm.create_model('test_resnet_castream', num_classes=0, global_pool='').eval()
    assert model(x).shape == (2, 96, 2, 2)


@pytest.mark.parametrize('name', SMALL)
def test_features_only_gives_the_backbones_feature_maps(name, x):
    torch.manual_seed(0)
    expected = timm.create_model(name, features_only=True, out_indices=(1, 2)).eval()
    torch.manual_seed(0)
    model = timm.create_model(f'{name}_castream', features_only=True, out_indices=(1, 2), stream_start=2).eval()
    assert isinstance(model, FeatureListNet)
    assert list(model.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model(x), expected(x), strict=True))
    assert model.feature_info.channels() == expected.feature_info.channels()


@pytest.mark.parametrize('name', SMALL)
def test_detach_gives_back_the_backbone_that_timm_makes(name, x):
    model = timm.create_model(f'{name}_castream', num_classes=10).eval()
    plain = timm.create_model(name, num_classes=10).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('castream.')})
    detach(model)
    assert type(model) is type(plain)
    assert model.pretrained_cfg['architecture'] == model.default_cfg['architecture'] == name
    assert {field: model.pretrained_cfg.get(field) for field in CFG_FIELDS} == {
        field: plain.pretrained_cfg.get(field) for field in CFG_FIELDS
    }
    assert torch.equal(model(x), plain(x))


def test_a_detached_model_is_saved_without_the_streams_arguments(x, tmp_path):
    with pytest.warns(UserWarning, match='never loaded'):
        model = timm.create_model('test_resnet_castream', num_classes=7, stream_start=2, freeze_backbone=True).eval()
    timm.models.save_for_hf(detach(model), tmp_path, safe_serialization=True)
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), model(x))


def test_pretrained_says_that_there_are_no_weights_and_what_there_is():
    with pytest.raises(RuntimeError, match=r'No pretrained weights .* test_resnet_castream: .*backbone_pretrained'):
        timm.create_model('test_resnet_castream', pretrained=True)


# GAP weights


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('suffix', ['pth', 'safetensors', 'timm', 'ddp'])
def test_a_backbone_checkpoint_is_loaded_classifier_included(name, suffix, x, tmp_path):
    state_dict = random_weights(name)
    path = tmp_path / f'gap.{"safetensors" if suffix == "safetensors" else "pth"}'
    if suffix == 'safetensors':
        save_file(state_dict, path)
    elif suffix == 'timm':
        torch.save({'epoch': 3, 'arch': name, 'state_dict': state_dict}, path)
    elif suffix == 'ddp':
        torch.save({f'module.{key}': value for key, value in state_dict.items()}, path)
    else:
        torch.save(state_dict, path)
    model = timm.create_model(f'{name}_castream', num_classes=10, backbone_checkpoint=str(path)).eval()
    with pooling(model, 'gap'):
        assert torch.equal(model(x), logits(state_dict, name, x))


def test_a_checkpoint_without_batchnorms_counters_is_complete(x, tmp_path):
    state_dict = {k: v for k, v in random_weights('test_resnet').items() if not k.endswith('num_batches_tracked')}
    torch.save(state_dict, tmp_path / 'old.pth')
    model = timm.create_model(
        'test_resnet_castream', num_classes=10, backbone_checkpoint=str(tmp_path / 'old.pth')
    ).eval()
    torch.testing.assert_close(model.fc.weight, state_dict['fc.weight'], rtol=0, atol=0)


def test_of_a_castream_checkpoint_the_backbone_alone_is_taken(x, tmp_path):
    trained = timm.create_model('test_resnet_castream', num_classes=10)
    torch.save(trained.state_dict(), tmp_path / 'whole.pth')
    model = timm.create_model('test_resnet_castream', num_classes=10, backbone_checkpoint=str(tmp_path / 'whole.pth'))
    assert torch.equal(model.fc.weight, trained.fc.weight)
    assert not torch.equal(model.castream.cls_token, trained.castream.cls_token)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda state: state.pop('layer2.0.conv1.weight'), r'layer2\.0\.conv1\.weight'),
        (lambda state: state.update(extra=torch.zeros(1)), 'extra'),
        (lambda state: state.update({'fc.bias': torch.zeros(3)}), r'fc\.bias'),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_and_names_what_does_not_fit(change, message, tmp_path):
    state_dict = random_weights('test_resnet')
    change(state_dict)
    torch.save(state_dict, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=rf'other\.pth.* does not fit this model: .*{message}'):
        timm.create_model('test_resnet_castream', num_classes=10, backbone_checkpoint=str(tmp_path / 'other.pth'))


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'backbone_checkpoint .*nowhere\.pth'):
        timm.create_model('test_resnet_castream', backbone_checkpoint=str(tmp_path / 'nowhere.pth'))


def test_timms_checkpoint_path_takes_a_gap_checkpoint(x, tmp_path):
    state_dict = random_weights('test_resnet')
    torch.save(state_dict, tmp_path / 'gap.pth')
    with pytest.warns(UserWarning, match='the stream stays as it is'):
        model = timm.create_model(
            'test_resnet_castream', num_classes=10, checkpoint_path=str(tmp_path / 'gap.pth')
        ).eval()
    assert torch.equal(forward_both(model, x)['gap'], logits(state_dict, 'test_resnet', x))


@pytest.mark.parametrize('weights', [True, 'r160_in1k'])
def test_backbone_pretrained_loads_timms_weights(weights, weights_of_the_hub, x):
    model = timm.create_model('test_resnet_castream', backbone_pretrained=weights).eval()
    with pooling(model, 'gap'):
        assert torch.equal(model(x), logits(weights_of_the_hub, 'test_resnet', x, 1000))


def test_backbone_pretrained_adapts_classes_and_channels_as_timm_does(weights_of_the_hub):
    model = timm.create_model('test_resnet_castream', num_classes=3, in_chans=1, backbone_pretrained=True)
    expected = timm.create_model(
        'test_resnet.r160_in1k',
        pretrained=True,
        num_classes=3,
        in_chans=1,
        pretrained_cfg_overlay={'state_dict': dict(weights_of_the_hub)},
    ).state_dict()
    for key, value in expected.items():
        if not key.startswith('fc.'):
            assert torch.equal(model.state_dict()[key], value), key
    assert model.fc.weight.shape == (3, 96)


def test_backbone_pretrained_loads_features_only_too(weights_of_the_hub):
    model = timm.create_model('test_resnet_castream', features_only=True, backbone_pretrained=True)
    assert torch.equal(model.layer1[0].conv1.weight, weights_of_the_hub['layer1.0.conv1.weight'])


def test_a_tag_that_timm_does_not_have_is_refused_naming_those_it_has():
    with pytest.raises(ValueError, match=r"'nosuch'.*r160_in1k"):
        timm.create_model('test_resnet_castream', backbone_pretrained='nosuch')


def test_other_gap_weights_bring_their_own_image_settings(monkeypatch):
    tag = 'a1_in1k'
    own, other = timm.get_pretrained_cfg('resnet50.tv_in1k'), timm.get_pretrained_cfg(f'resnet50.{tag}')
    assert own.crop_pct != other.crop_pct or own.interpolation != other.interpolation
    monkeypatch.setattr('timm_castream.hub.read.read_timm_weights', lambda name: {})
    model = timm.create_model('resnet50_castream', backbone_pretrained=tag, device='meta')
    for field in ('crop_pct', 'interpolation'):
        assert model.pretrained_cfg[field] == getattr(other, field)


def test_gap_weights_with_other_classes_bring_their_classes(monkeypatch):
    monkeypatch.setattr('timm_castream.hub.read.read_timm_weights', lambda name: {})
    model = timm.create_model('convnext_tiny_castream', backbone_pretrained='fb_in22k', device='meta')
    assert model.num_classes == model.pretrained_cfg['num_classes'] == 21841
    model = timm.create_model('convnext_tiny_castream', backbone_pretrained='fb_in22k', num_classes=3, device='meta')
    assert model.num_classes == 3


# Freezing


def test_freezing_a_classifier_that_was_never_loaded_warns():
    with pytest.warns(UserWarning, match='never loaded'):
        model = timm.create_model('test_resnet_castream', freeze_backbone=True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f'castream.{key}' for key in model.castream.state_dict()
    }


def test_freezing_new_classes_beside_pretrained_weights_warns(weights_of_the_hub):
    with pytest.warns(UserWarning, match='never loaded'):
        timm.create_model('test_resnet_castream', num_classes=3, freeze_backbone=True, backbone_pretrained=True)


@pytest.mark.filterwarnings('error')
def test_freezing_loaded_weights_does_not_warn(weights_of_the_hub, tmp_path: Path):
    timm.create_model('test_resnet_castream', freeze_backbone=True, backbone_pretrained=True)
    torch.save(random_weights('test_resnet', num_classes=3), tmp_path / 'gap.pth')
    timm.create_model(
        'test_resnet_castream', num_classes=3, freeze_backbone=True, backbone_checkpoint=str(tmp_path / 'gap.pth')
    )


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'freeze_backbone': 'false'}, "freeze_backbone must be True or False, got 'false'"),
        ({'stream_class_specific': 'false'}, "stream_class_specific must be True or False, got 'false'"),
        ({'backbone_pretrained': 'true'}, "backbone_pretrained .* got 'true': write True"),
        ({'backbone_pretrained': 'False'}, "backbone_pretrained .* got 'False': write False"),
    ],
)
def test_a_string_in_place_of_true_or_false_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('test_resnet_castream', **kwargs)
