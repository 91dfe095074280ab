"""Models opened by name, with the weights that the user names."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import make_backbone
from safetensors.torch import save_file
from states import make_model, publish_weights, same, snapshot, stream_of

import timm_castream
from timm_castream.hub import repository as publish
from timm_castream.hub import stream_file as weights
from timm_castream.hub.load import load_gap_weights, open_model
from timm_castream.hub.read import timm_weights_name

pytest_plugins = ('hub_server',)


WRAPPED = {
    'plain': lambda state_dict: state_dict,
    'model': lambda state_dict: {'model': state_dict, 'epoch': 3, 'args': {'lr': 0.1}},
    'DistributedDataParallel': lambda state_dict: {f'module.{key}': value for key, value in state_dict.items()},
    'Lightning': lambda state_dict: {
        'state_dict': {f'model.{key}': value for key, value in state_dict.items()},
        'optimizer_states': [{'state': {}, 'param_groups': []}],
    },
    'one dict of tensors': lambda state_dict: {'model_state_dict': state_dict, 'optimizer_state_dict': {'state': {}}},
    'averaged alone': lambda state_dict: {'state_dict_ema': state_dict},
    'averaged alone, DeiT': lambda state_dict: {'model_ema': state_dict},
}

TWO_NETWORKS = {'teacher': {'fc.weight': torch.ones(1)}, 'student': {'fc.weight': torch.ones(1)}}


@pytest.mark.filterwarnings('ignore:freeze_backbone freezes a classifier')
class TestCheckpoints:
    @pytest.fixture
    def folder(self, tmp_path):
        """What timm's train.py leaves behind."""
        model = make_model(num_classes=5, stream_start=2, freeze_backbone=True)
        ema = timm.utils.ModelEmaV3(model)
        torch.nn.init.ones_(ema.module.castream.cls_token)
        args = argparse.Namespace(
            model='test_resnet_castream',
            num_classes=5,
            in_chans=None,
            gp=None,
            model_kwargs={'stream_start': 2, 'freeze_backbone': True, 'backbone_checkpoint': '/gone.pth'},
        )
        saver = timm.utils.CheckpointSaver(
            model,
            torch.optim.SGD(model.castream.parameters(), 0.1),
            args,
            model_ema=ema,
            checkpoint_dir=str(tmp_path),
            recovery_dir=str(tmp_path),
        )
        saver.save_checkpoint(0, metric=1.0)
        return tmp_path, model

    def test_checkpoint_of_train_py_gives_its_model_back_with_the_arguments_it_remembers(self, folder):
        path, model = folder
        loaded = open_model('test_resnet_castream', path / 'last.pth.tar', num_classes=None)
        assert same(snapshot(model), snapshot(loaded))
        assert loaded.conv1[0].weight.requires_grad

    def test_averaged_weights_are_taken_where_asked_for(self, folder):
        path, model = folder
        loaded = open_model('test_resnet_castream', path / 'last.pth.tar', use_ema=True)
        assert torch.equal(loaded.castream.cls_token, torch.ones_like(model.castream.cls_token))

    def test_averaged_weights_that_are_not_there_are_an_error(self, tmp_path):
        torch.save({'state_dict': make_model().state_dict()}, tmp_path / 'last.pth.tar')
        with pytest.raises(ValueError, match='has no EMA weights'):
            open_model('test_resnet_castream', tmp_path / 'last.pth.tar', use_ema=True)

    def test_safetensors_file_brings_its_streams_arguments(self, tmp_path):
        model = make_model(num_classes=5, stream_start=3)
        publish.write_repository(model, tmp_path, 'org/net')
        loaded = open_model('test_resnet_castream', tmp_path / 'model.safetensors', num_classes=5)
        assert same(snapshot(model), snapshot(loaded))

    def test_checkpoint_of_another_model_is_refused(self, folder):
        with pytest.raises(ValueError, match=r'last\.pth\.tar does not fit this model: it lacks stem\.0\.weight'):
            open_model('test_convnext_castream', folder[0] / 'last.pth.tar')

    @pytest.mark.parametrize('wrap', WRAPPED.values(), ids=WRAPPED.keys())
    @pytest.mark.parametrize('option', ['checkpoint', 'backbone_checkpoint'])
    def test_the_weights_alone_are_found_in_every_form(self, wrap, option, tmp_path, caplog):
        model = make_model('test_resnet', num_classes=5, seed=3)
        path = tmp_path / 'weights.pth'
        torch.save(wrap(snapshot(model)), path)
        if option == 'checkpoint':
            loaded = open_model('test_resnet', path, num_classes=5)
            assert ('averaged weights' in caplog.text) == ('ema' in str(wrap({}).keys()))
        else:
            loaded = timm_castream.detach(make_model(num_classes=5, backbone_checkpoint=str(path)))
        assert same(snapshot(loaded), snapshot(model))

    def test_without_use_ema_the_weights_beside_averaged_ones_are_taken(self, tmp_path):
        own, averaged = (snapshot(make_model('test_resnet', seed=seed)) for seed in (0, 1))
        torch.save({'state_dict_ema': averaged, 'state_dict': own}, tmp_path / 'both.pth')
        assert same(snapshot(open_model('test_resnet', tmp_path / 'both.pth')), own)
        assert same(snapshot(open_model('test_resnet', tmp_path / 'both.pth', use_ema=True)), averaged)

    @pytest.mark.parametrize('prefix', ['model.', 'net.0.', 'base_model.model.'])
    def test_a_prefix_of_all_keys_is_named(self, prefix, tmp_path):
        state_dict = {f'{prefix}{key}': value for key, value in snapshot(make_model('test_resnet')).items()}
        torch.save({'state_dict': {**state_dict, 'loss.weight': torch.ones(2)}}, tmp_path / 'x.pth')
        with pytest.raises(
            ValueError, match=rf"x\.pth does not fit this model: its keys begin with '{prefix}'"
        ) as error:
            open_model('test_resnet', tmp_path / 'x.pth')
        assert len(str(error.value)) < 300

    def test_a_model_with_a_stream_is_found_inside_wrappers(self, tmp_path):
        state_dict = snapshot(make_model())
        torch.save({'state_dict': {f'module.model.{key}': state_dict[key] for key in state_dict}}, tmp_path / 'x.ckpt')
        save_file({f'net._orig_mod.{key}': state_dict[key] for key in state_dict}, tmp_path / 'x.safetensors')
        for name in ('x.ckpt', 'x.safetensors'):
            assert same(snapshot(open_model('test_resnet_castream', tmp_path / name)), state_dict)

    @pytest.mark.parametrize('architecture', ['test_resnet', 'test_convnext', 'test_vit', 'test_resnet_castream'])
    def test_weights_that_remember_no_arguments_tell_the_number_of_classes(self, architecture, tmp_path):
        torch.save(make_model(architecture, num_classes=7).state_dict(), tmp_path / 'x.pth')
        assert open_model(architecture, tmp_path / 'x.pth').num_classes == 7
        with pytest.raises(ValueError, match=r'weight is \(7, \d+\), not \(5'):
            open_model(architecture, tmp_path / 'x.pth', num_classes=5)

    def test_an_averaged_model_of_torch_is_taken_without_its_count(self, tmp_path):
        model = make_model('test_resnet')
        averaged = torch.optim.swa_utils.AveragedModel(model)
        averaged.update_parameters(model)
        torch.save(averaged.state_dict(), tmp_path / 'swa.pth')
        assert same(snapshot(open_model('test_resnet', tmp_path / 'swa.pth')), snapshot(model))

    @pytest.mark.parametrize('share', [0.1, 0.5, 0.99])
    def test_a_file_that_is_cut_off_is_one_sentence(self, share, tmp_path):
        path = tmp_path / 'cut.pth'
        torch.save(snapshot(make_model('test_resnet')), path)
        path.write_bytes(path.read_bytes()[: round(share * path.stat().st_size)])
        with pytest.raises(ValueError, match=r'cut\.pth is damaged'):
            open_model('test_resnet', path)
        with pytest.raises(ValueError, match=r'cut\.pth is damaged'):
            make_model(backbone_checkpoint=str(path))

    @pytest.mark.parametrize('content', [{'epoch': 3, 'weights': {}}, {}, {'state_dict': None}, TWO_NETWORKS])
    def test_a_file_without_weights_names_its_keys(self, content, tmp_path):
        torch.save(content, tmp_path / 'x.pth')
        keys = ', '.join(map(repr, content)) or 'none'
        with pytest.raises(ValueError, match=rf'x\.pth has no state_dict: .*state_dict, model.*its keys are {keys}'):
            open_model('test_resnet', tmp_path / 'x.pth')

    @pytest.mark.parametrize('content', [b'', b'not a checkpoint', pickle.dumps([1, 2])])
    def test_file_that_is_no_checkpoint_is_refused(self, content, tmp_path):
        (tmp_path / 'x.pth.tar').write_bytes(content)
        with pytest.raises(ValueError, match=r'x\.pth\.tar (is damaged, or no checkpoint|has no state_dict)'):
            open_model('test_resnet_castream', tmp_path / 'x.pth.tar')


class TestImageSettings:
    """Options of train.py that change the images which the network sees."""

    OPTIONS = {
        'img_size': 64,
        'crop_pct': 1.0,
        'mean': [0.1, 0.2, 0.3],
        'std': [0.4, 0.5, 0.6],
        'interpolation': 'bicubic',
    }
    SETTINGS = {
        'input_size': (3, 64, 64),
        'crop_pct': 1.0,
        'mean': (0.1, 0.2, 0.3),
        'std': (0.4, 0.5, 0.6),
        'interpolation': 'bicubic',
    }

    @pytest.fixture(params=['test_resnet_castream', 'test_resnet'])
    def opened(self, request, tmp_path):
        args = argparse.Namespace(model=request.param, num_classes=5, in_chans=None, input_size=None, **self.OPTIONS)
        state_dict = make_model(request.param, num_classes=5).state_dict()
        torch.save({'state_dict': state_dict, 'args': args}, tmp_path / 'last.pth.tar')
        return open_model(request.param, tmp_path / 'last.pth.tar')

    def test_those_of_the_checkpoint_become_the_models_and_options_override_them(self, opened):
        config = timm.data.resolve_data_config(model=opened)
        assert {key: config[key] for key in self.SETTINGS} == self.SETTINGS
        assert timm.data.resolve_data_config({'img_size': 96, 'crop_pct': 0.9}, model=opened)['crop_pct'] == 0.9

    @pytest.mark.parametrize('opened', ['test_resnet_castream'], indirect=True)
    def test_a_pushed_model_keeps_them(self, opened, tmp_path):
        publish.write_repository(opened, tmp_path / 'net', 'org/net')
        loaded = open_model(f'local-dir:{tmp_path / "net"}', pretrained=True)
        config = timm.data.resolve_data_config(model=loaded)
        config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
        assert {key: config[key] for key in self.SETTINGS} == self.SETTINGS
        assert '64 x 64' in (tmp_path / 'net' / 'README.md').read_text()

    def test_a_checkpoint_without_them_leaves_those_of_the_name(self, tmp_path):
        args = argparse.Namespace(num_classes=5, img_size=None, crop_pct=None, mean=None, interpolation='')
        torch.save({'state_dict': make_model(num_classes=5).state_dict(), 'args': args}, tmp_path / 'last.pth.tar')
        cfg = open_model('test_resnet_castream', tmp_path / 'last.pth.tar').pretrained_cfg
        assert cfg == make_model(num_classes=5).pretrained_cfg


class TestNames:
    def test_plain_timm_model_is_opened_with_its_checkpoint(self, tmp_path):
        model = make_model('test_resnet', num_classes=5)
        torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
        loaded = open_model('test_resnet', tmp_path / 'last.pth.tar', num_classes=5)
        assert same(snapshot(model), snapshot(loaded))

    def test_name_of_a_hub_repository_and_of_a_folder_is_opened(self, hub, tmp_path):
        model = make_model(num_classes=5)
        publish_weights(hub, 'org/net', model)
        publish.write_repository(model, tmp_path / 'net', 'org/net')
        for name in ('hf-hub:org/net', f'local-dir:{tmp_path / "net"}'):
            assert same(snapshot(model), snapshot(open_model(name, pretrained=True)))

    @pytest.mark.parametrize('checkpoint', ['org/net', 'hf-hub:org/net'])
    def test_checkpoint_may_be_a_repository_of_the_same_architecture(self, hub, checkpoint):
        model = make_model(num_classes=5)
        publish_weights(hub, 'org/net', model)
        assert same(snapshot(model), snapshot(open_model('test_resnet_castream', checkpoint)))
        with pytest.raises(ValueError, match='org/net holds a test_resnet_castream, not a test_convnext_castream'):
            open_model('test_convnext_castream', checkpoint)

    def test_checkpoint_of_the_other_kind_names_the_model_to_open(self, tmp_path):
        for name in ('test_resnet', 'test_resnet_castream'):
            torch.save({'state_dict': make_model(name).state_dict()}, tmp_path / f'{name}.pth')
        with pytest.raises(ValueError, match='holds a CA-Stream: open it as test_resnet_castream'):
            open_model('test_resnet', tmp_path / 'test_resnet_castream.pth')
        timm_castream.save_stream(make_model(), tmp_path / 's.safetensors')
        with pytest.raises(ValueError, match=r's\.safetensors holds a CA-Stream: open it as test_resnet_castream'):
            open_model('test_resnet.r160_in1k', tmp_path / 's.safetensors')
        with pytest.raises(ValueError, match='without a CA-Stream: open it as test_resnet, or pass it as backbone_ch'):
            open_model('test_resnet_castream', tmp_path / 'test_resnet.pth')

    @pytest.mark.parametrize(
        ('args', 'error', 'message'),
        [
            (('no_such',), ValueError, 'There is no model no_such'),
            (('local-dir:nowhere',), FileNotFoundError, 'no folder nowhere'),
            (('test_resnet', 'missing.pth'), FileNotFoundError, r'There is no file missing\.pth'),
            (('test_resnet', None, False, True), ValueError, 'EMA weights are part of a checkpoint'),
        ],
        ids=str,
    )
    def test_mistake_is_one_sentence(self, args, error, message):
        with pytest.raises(error, match=message) as caught:
            open_model(*args)
        assert '\n' not in str(caught.value)

    @pytest.mark.parametrize('name', ['test_resnet', 'test_resnet_castream'])
    def test_an_argument_that_the_network_does_not_take_is_named(self, name):
        with pytest.raises(ValueError, match=f"^{name} takes no argument 'foo'"):
            open_model(name, foo=1)

    @pytest.mark.parametrize('kwargs', [{}, {'backbone_checkpoint': 'gap.safetensors'}], ids=str)
    def test_weights_that_are_random_are_warned_about(self, kwargs, tmp_path, monkeypatch, caplog):
        monkeypatch.chdir(tmp_path)
        save_file(make_model('test_resnet').state_dict(), 'gap.safetensors')
        open_model('test_resnet_castream', **kwargs)
        part = 'The stream' if kwargs else 'Every weight'
        assert f'{part} of test_resnet_castream is random' in caplog.text

    def test_trained_weights_are_not_warned_about(self, hub, caplog):
        publish_weights(hub, 'org/net', make_model(num_classes=5))
        open_model('hf-hub:org/net', pretrained=True)
        assert 'random' not in caplog.text


class TestStreamAlone:
    @pytest.fixture
    def model(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        save_file(make_model('test_resnet').state_dict(), 'gap.safetensors')
        model = make_model(stream_start=2, backbone_checkpoint='gap.safetensors')
        timm_castream.save_stream(model, 'stream.safetensors')
        return model

    def test_stream_goes_on_the_backbone_that_the_caller_names(self, model):
        loaded = open_model('test_resnet_castream', 'stream.safetensors', backbone_checkpoint='gap.safetensors')
        assert same(snapshot(model), snapshot(loaded))

    def test_stream_goes_on_timms_weights_by_default(self, model, hub):
        hub.add('timm/test_resnet.r160_in1k', model__safetensors=Path('gap.safetensors').read_bytes())
        assert same(snapshot(model), snapshot(open_model('test_resnet_castream', 'stream.safetensors')))

    def test_stream_of_another_backbone_is_refused(self, model):
        save_file(make_model('test_resnet', seed=1).state_dict(), 'other.safetensors')
        with pytest.raises(ValueError, match=r'stream\.safetensors was trained on other weights of test_resnet'):
            open_model('test_resnet_castream', 'stream.safetensors', backbone_checkpoint='other.safetensors')


class TestFilesOfVersion01:
    """Files in the format of version 0.1, which had seven stream arguments."""

    ARGS = {
        'stream_start': 1,
        'stream_stages': None,
        'stream_block': 'ca',
        'stream_class_specific': False,
        'stream_heads': 1,
        'stream_drop': 0.0,
        'stream_bias': True,
    }

    @pytest.fixture
    def model(self) -> Any:
        return make_model(num_classes=3, stream_start=1)

    def metadata(self, model: Any, **changes: Any) -> dict[str, str]:
        return {
            'format': 'pt',
            'castream_format': '1',
            'backbone': 'test_resnet',
            'stream_args': json.dumps(self.ARGS | changes),
            'fingerprint': weights.fingerprint(model),
        }

    def test_stream_alone_loads(self, model, tmp_path):
        save_file(stream_of(model), tmp_path / 's.safetensors', self.metadata(model))
        other = make_model(num_classes=3, stream_start=1)
        torch.nn.init.zeros_(other.castream.cls_token)
        timm_castream.load_stream(other, tmp_path / 's.safetensors')
        assert same(snapshot(model), snapshot(other))

    def test_stream_with_other_arguments_is_still_refused(self, model, tmp_path):
        save_file(stream_of(model), tmp_path / 's.safetensors', self.metadata(model, stream_heads=2))
        with pytest.raises(ValueError, match="stream_heads=2, this model's has stream_heads=1"):
            timm_castream.load_stream(model, tmp_path / 's.safetensors')

    def test_folder_of_a_whole_model_loads(self, model, tmp_path):
        save_file(model.state_dict(), tmp_path / 'model.safetensors', self.metadata(model))
        (tmp_path / 'config.json').write_text(
            json.dumps(
                {
                    'architecture': 'test_resnet_castream',
                    'num_classes': 3,
                    'num_features': 96,
                    'global_pool': 'avg',
                    'model_args': {**self.ARGS, 'num_classes': 3},
                    'pretrained_cfg': {
                        'input_size': [3, 160, 160],
                        'fixed_input_size': False,
                        'interpolation': 'bilinear',
                        'crop_pct': 0.95,
                        'mean': [0.5, 0.5, 0.5],
                        'std': [0.5, 0.5, 0.5],
                        'num_classes': 3,
                        'first_conv': 'conv1.0',
                        'classifier': 'fc',
                        'hf_hub_filename': 'model.safetensors',
                    },
                }
            )
        )
        for name, checkpoint in (
            (f'local-dir:{tmp_path}', None),
            ('test_resnet_castream', tmp_path / 'model.safetensors'),
        ):
            loaded = open_model(name, checkpoint, pretrained=True, num_classes=3)
            assert same(snapshot(model), snapshot(loaded))

    def test_checkpoint_of_a_training_loads(self, model, tmp_path):
        args = argparse.Namespace(model='test_resnet_castream', num_classes=3, model_kwargs={'stream_start': 1})
        torch.save(
            {'epoch': 1, 'arch': 'test_resnet_castream', 'state_dict': model.state_dict(), 'args': args},
            tmp_path / 'last.pth.tar',
        )
        assert same(snapshot(model), snapshot(open_model('test_resnet_castream', tmp_path / 'last.pth.tar')))


# Weights of the plain backbone


def test_pretrained_names_are_timms():
    assert timm_weights_name('resnet50', 'a1_in1k') == 'resnet50.a1_in1k'
    assert timm_weights_name('resnet50', None) == 'resnet50'
    with pytest.raises(ValueError, match=r"'a9' is no tag of resnet50, valid ones: .*a1_in1k"):
        timm_weights_name('resnet50', 'a9')


def test_weights_by_tag_need_a_registered_network():
    model = make_backbone('test_resnet')
    model.pretrained_cfg = None
    with pytest.raises(ValueError, match='backbone_checkpoint'):
        load_gap_weights(model, pretrained=True)


def test_nothing_is_loaded_of_a_checkpoint_that_does_not_fit(tmp_path):
    model = make_backbone('test_resnet')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = {k: v + 1 for k, v in before.items()}
    del other['fc.bias']
    torch.save(other, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=r'does not fit this model: it lacks fc\.bias\.'):
        load_gap_weights(model, checkpoint=tmp_path / 'other.pth')
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
