"""Configs, downloads and pushes through the real client against a Hub on the loopback address, and every failure."""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save
from states import make_model, same, snapshot, stream_of

import timm_castream
from timm_castream import hub as castream_hub
from timm_castream import publish
from timm_castream.download import read_architecture

if TYPE_CHECKING:
    from hub_server import Hub

pytest_plugins = ('hub_server',)

GAP_TAGS = {
    **dict.fromkeys(
        ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnext50_32x4d', 'resnext101_32x8d',
         'wide_resnet50_2', 'wide_resnet101_2'), 'tv_in1k'),
    **dict.fromkeys(('convnext_tiny', 'convnext_small', 'convnext_base', 'convnext_large'), 'fb_in1k'),
    **dict.fromkeys(('test_resnet', 'test_convnext'), 'r160_in1k'),
}
GAP_REPOSITORY = 'timm/test_resnet.r160_in1k'


def publish_weights(hub: Hub, repo_id: str, model, **config) -> None:
    """Puts a whole model on the Hub without our own code."""
    hub.add(repo_id, model__safetensors=save(model.state_dict()), config__json=json.dumps({
        'architecture': 'test_resnet_castream', 'num_classes': model.num_classes,
        'pretrained_cfg': {
            'input_size': [3, 160, 160], 'first_conv': 'conv1.0', 'classifier': 'fc',
            'hf_hub_filename': 'model.safetensors'},
        **config}).encode())


def cached_files() -> list[Path]:
    return [path for path in Path(constants.HF_HUB_CACHE).glob('models--*/blobs/*')]


class TestConfigs:
    @pytest.mark.parametrize(('backbone', 'tag'), GAP_TAGS.items())
    def test_config_says_of_the_images_what_the_gap_weights_say(self, backbone, tag):
        cfg = next(c for c in castream_hub.read_configs().values() if c.architecture == f'{backbone}_castream')
        reference = timm.get_pretrained_cfg(f'{backbone}.{tag}')
        for name in ('input_size', 'test_input_size', 'min_input_size', 'fixed_input_size', 'interpolation', 'crop_pct',
                     'test_crop_pct', 'crop_mode', 'mean', 'std', 'num_classes', 'pool_size', 'test_pool_size',
                     'first_conv', 'classifier', 'license', 'custom_load'):
            assert getattr(cfg, name) == getattr(reference, name), name

    def test_there_is_one_config_for_every_registered_variant_and_no_other(self):
        architectures = sorted(cfg.architecture for cfg in castream_hub.read_configs().values())
        assert architectures == sorted(timm.list_models('*_castream')) == sorted(f'{b}_castream' for b in GAP_TAGS)

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

    def test_published_variants_name_their_repository_and_safetensors_and_test_variants_name_none(self):
        for name, cfg in castream_hub.read_configs().items():
            if name.startswith('test_'):
                assert (cfg.tag, cfg.hf_hub_id, cfg.hf_hub_filename) == (None, None, None)
            else:
                assert name == f'{cfg.architecture}.sgd90_in1k'
                assert (cfg.hf_hub_id, cfg.hf_hub_filename) == (f'timm-castream/{name}', 'model.safetensors')

    def test_environment_variable_names_another_namespace(self, monkeypatch):
        monkeypatch.setenv('TIMM_CASTREAM_NAMESPACE', 'mirror')
        cfg = castream_hub.read_configs()['resnet50_castream.sgd90_in1k']
        assert cfg.hf_hub_id == 'mirror/resnet50_castream.sgd90_in1k'


class TestDownload:
    def test_variant_by_name_loads_once_and_then_without_a_body(self, hub):
        model = make_model('resnet18_castream', num_classes=1000)
        hub.add('timm-castream/resnet18_castream.sgd90_in1k', model__safetensors=save(model.state_dict()))
        for bodies in (['/cdn/timm-castream/resnet18_castream.sgd90_in1k/model.safetensors'], []):
            hub.requests.clear()
            assert same(snapshot(model), snapshot(make_model('resnet18_castream', seed=1, pretrained=True)))
            assert hub.bodies_sent() == bodies

    def test_hf_hub_name_loads_once_then_without_a_body_then_offline(self, hub, monkeypatch):
        model = make_model(num_classes=5)
        publish_weights(hub, 'org/net', model, model_args={'stream_heads': 1})
        for bodies in (['/org/net/resolve/main/config.json', '/cdn/org/net/model.safetensors'], []):
            hub.requests.clear()
            assert same(snapshot(model), snapshot(make_model('hf-hub:org/net', seed=1, pretrained=True)))
            assert hub.bodies_sent() == bodies
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        hub.requests.clear()
        assert same(snapshot(model), snapshot(make_model('hf-hub:org/net', seed=1, pretrained=True)))
        assert hub.requests == []

    def test_revision_in_the_name_is_honoured(self, hub):
        model = make_model(num_classes=5)
        publish_weights(hub, 'org/net', model)
        commit = hub.repositories['org/net'].commit
        assert same(snapshot(model), snapshot(make_model(f'hf-hub:org/net@{commit}', seed=1, pretrained=True)))

    def test_other_class_count_changes_the_classifier_and_the_class_specific_query_alone(self, hub):
        model = make_model(num_classes=5, stream_class_specific=True)
        publish_weights(hub, 'org/net', model, model_args={'stream_class_specific': True})
        fresh = make_model(num_classes=3, stream_class_specific=True, seed=2)
        loaded = make_model('hf-hub:org/net', num_classes=3, pretrained=True, seed=2)
        changed = {'fc.weight', 'fc.bias', 'castream.cls_token'}
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, (fresh if key in changed else model).state_dict()[key]), key

    def test_one_image_channel_takes_the_sum_over_the_first_convolution(self, hub):
        model = make_model(num_classes=5)
        publish_weights(hub, 'org/net', model)
        loaded = make_model('hf-hub:org/net', in_chans=1, pretrained=True)
        torch.testing.assert_close(loaded.conv1[0].weight, model.conv1[0].weight.sum(1, keepdim=True))
        assert torch.equal(loaded.layer1[0].conv1.weight, model.layer1[0].conv1.weight)

    def test_plain_backbone_weights_leave_the_stream_as_it_is_with_a_warning(self, hub):
        gap = timm.create_model('test_resnet', num_classes=5)
        publish_weights(hub, 'org/gap', gap)
        fresh = make_model(num_classes=5)
        with pytest.warns(UserWarning, match='stream stays as it is'):
            loaded = make_model('hf-hub:org/gap', pretrained=True)
        assert same(stream_of(loaded), stream_of(fresh))
        assert torch.equal(loaded.fc.weight, gap.fc.weight)

    def test_damaged_answer_is_downloaded_once_more(self, hub):
        model = make_model(num_classes=5)
        publish_weights(hub, 'org/net', model)
        repository = hub.repositories['org/net']
        repository.body, repository.bodies = b'x' * len(repository.files['model.safetensors']), 1
        assert same(snapshot(model), snapshot(make_model('hf-hub:org/net', seed=1, pretrained=True)))

    def test_file_that_was_damaged_in_the_cache_is_downloaded_again(self, hub):
        model = make_model(num_classes=5)
        publish_weights(hub, 'org/net', model)
        make_model('hf-hub:org/net', pretrained=True)
        blob = max(cached_files(), key=lambda path: path.stat().st_size)
        content = bytearray(blob.read_bytes())
        content[-1] ^= 1  # one bit of a weight
        blob.write_bytes(content)
        assert same(snapshot(model), snapshot(make_model('hf-hub:org/net', seed=1, pretrained=True)))

    def test_variant_without_weights_says_what_else_there_is(self):
        with pytest.raises(RuntimeError, match=r'^No pretrained weights exist for test_resnet_castream\. .*=False'):
            make_model(pretrained=True)

    @pytest.mark.parametrize('name', ['w.safetensors', 'w.pth'])
    def test_file_that_the_user_names_goes_before_the_hub(self, hub, tmp_path, name):
        model = make_model(num_classes=1000)
        (tmp_path / 'w.safetensors').write_bytes(save(model.state_dict()))
        torch.save({'state_dict': model.state_dict()}, tmp_path / 'w.pth')
        overlay = {'file': str(tmp_path / name), 'hf_hub_id': 'org/net'}
        loaded = make_model(pretrained=True, pretrained_cfg_overlay=overlay, seed=1)
        assert same(snapshot(model), snapshot(loaded))
        assert hub.requests == []


def _spoil(hub: Hub, fault: str) -> None:
    repository = hub.repositories['org/net']
    content = repository.files['model.safetensors']
    if fault == 'gone':
        del hub.repositories['org/net']
    elif fault == 'gated':
        repository.gated = True
    elif fault.startswith('head'):
        repository.head_status = int(fault.split()[1])
    elif fault == 'cut off':
        repository.body = content[:-100]
    elif fault == 'same size':
        repository.body = b'x' * len(content)
    elif fault == 'one bit':
        repository.body = content[:-1] + bytes([content[-1] ^ 1])
    elif fault == 'no safetensors':
        repository.files['model.safetensors'] = b'x' * 1000
    elif fault == 'truncated at source':
        repository.files['model.safetensors'] = content[:-100]
    elif fault == 'only a pickle':
        repository.files['pytorch_model.bin'] = repository.files.pop('model.safetensors')
    elif fault == 'wrong shape':
        repository.files['model.safetensors'] = save(make_model(num_classes=6).state_dict())
    elif fault == 'wrong architecture':
        repository.files['model.safetensors'] = save(make_model('test_convnext_castream', num_classes=5).state_dict())
    elif fault == 'part of a stream':
        state_dict = make_model(num_classes=5).state_dict()
        del state_dict['castream.blocks.1.proj.weight']
        repository.files['model.safetensors'] = save(state_dict)
    else:
        raise AssertionError(fault)


@pytest.mark.parametrize('stream_only', [False, True])
def test_feature_maps_are_those_of_the_trained_backbone(hub, stream_only):
    gap = timm.create_model('test_resnet')
    hub.add(GAP_REPOSITORY, model__safetensors=save(gap.state_dict()))
    timm_castream.push_to_hub(make_model(backbone_pretrained=True), 'org/net', stream_only)
    features = make_model('hf-hub:org/net', pretrained=True, features_only=True, seed=1)
    for key, value in features.state_dict().items():
        assert torch.equal(value, gap.state_dict()[key]), key


def test_feature_maps_beside_a_stream_never_come_from_a_pickle_or_from_other_weights(hub):
    hub.add(GAP_REPOSITORY, model__safetensors=save(timm.create_model('test_resnet').state_dict()))
    timm_castream.push_to_hub(make_model(backbone_pretrained=True), 'org/stream', stream_only=True)
    timm_castream.push_to_hub(make_model(), 'org/own', stream_only=True, backbone_pretrained=False)
    with pytest.raises(RuntimeError, match='org/own holds a stream alone'):
        make_model('hf-hub:org/own', pretrained=True, features_only=True)
    hub.repositories[GAP_REPOSITORY].head_status = 403
    hub.repositories[GAP_REPOSITORY].files['pytorch_model.bin'] = b'never read'
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(OSError, match=rf'of {GAP_REPOSITORY} is not in the cache and could not be downloaded'):
        make_model('hf-hub:org/stream', pretrained=True, features_only=True)
    assert not any('pytorch_model.bin' in path for _, path in hub.requests)


class TestFailures:
    cfg = {'source': 'hf-hub', 'hf_hub_id': 'org/net', 'architecture': 'test_resnet_castream', 'num_classes': 5,
           'input_size': (3, 160, 160), 'first_conv': 'conv1.0', 'classifier': 'fc'}

    @pytest.mark.parametrize(('fault', 'error', 'message', 'cached'), [
        ('gone', RuntimeError, 'org/net is not on the Hub, or is private', 0),
        ('gated', RuntimeError, 'org/net asks for permission', 0),
        ('head 403', OSError, 'of org/net is not in the cache and could not be downloaded: .*403', 0),
        ('head 500', OSError, 'of org/net is not in the cache and could not be downloaded: .*500', 0),
        ('head 503', OSError, 'of org/net is not in the cache and could not be downloaded: .*503', 0),
        ('cut off', OSError, 'of org/net is not in the cache and could not be downloaded', 0),
        ('same size', OSError, 'of org/net arrives damaged', 0),
        ('one bit', OSError, 'of org/net arrives damaged', 0),
        ('only a pickle', RuntimeError, r'org/net has no model\.safetensors\. Pickled weights are read only', 0),
        ('no safetensors', ValueError, 'of org/net is damaged or no safetensors file', 1),
        ('truncated at source', ValueError, 'of org/net is damaged or no safetensors file', 1),
        ('wrong shape', ValueError, r'of org/net does not fit.*fc\.weight is \(6, 96\), not \(5, 96\)', 1),
        ('wrong architecture', ValueError, r'of org/net does not fit.*lacks conv1\.0\.weight.* and \d+ more', 1),
        ('part of a stream', ValueError, r'of org/net does not fit.*lacks castream\.blocks\.1\.proj\.weight', 1),
    ])
    def test_failure_is_one_sentence_and_leaves_model_and_cache_clean(self, hub, fault, error, message, cached):
        publish_weights(hub, 'org/net', make_model(num_classes=5))
        # Even where the Hub has a pickle to offer.
        hub.repositories['org/net'].files['pytorch_model.bin'] = b'never read'
        _spoil(hub, fault)
        model = make_model(num_classes=5, seed=1)
        before = snapshot(model)
        with pytest.raises(error, match=message) as caught:
            castream_hub.load_pretrained(model, self.cfg, num_classes=5)
        assert '\n' not in str(caught.value)
        assert same(before, snapshot(model))
        assert not any('pytorch_model.bin' in path for _, path in hub.requests)
        # What stays in the cache is what the Hub has, under its own hash.
        assert len(cached_files()) == cached
        assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in cached_files())

    @pytest.mark.parametrize('fault', ['head 500', 'cut off', 'same size'])
    def test_after_a_failure_of_the_network_the_next_call_succeeds(self, hub, fault):
        source, model = make_model(num_classes=5), make_model(num_classes=5, seed=1)
        publish_weights(hub, 'org/net', source)
        _spoil(hub, fault)
        with pytest.raises(OSError):
            castream_hub.load_pretrained(model, self.cfg, num_classes=5)
        hub.repositories['org/net'].head_status = hub.repositories['org/net'].body = None
        castream_hub.load_pretrained(model, self.cfg, num_classes=5)
        assert same(snapshot(source), snapshot(model))

    def test_variant_that_was_never_published_says_where_it_looked_and_what_to_do(self, hub):
        with pytest.raises(RuntimeError, match=(
                r'^The weights of resnet18_castream\.sgd90_in1k have not been published \(looked for timm-castream/'
                r'resnet18_castream\.sgd90_in1k on the Hub\): train .* backbone_pretrained=True')) as caught:
            make_model('resnet18_castream', pretrained=True)
        assert '\n' not in str(caught.value)

    def test_no_network_and_no_cache_is_an_oserror_that_names_the_repository(self, hub):
        hub.__exit__()
        with pytest.raises(OSError, match='of org/net is not in the cache and could not be downloaded'):
            castream_hub.load_pretrained(make_model(num_classes=5), self.cfg, num_classes=5)

    def test_offline_and_no_cache_says_to_unset_the_variable(self, hub, monkeypatch):
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        with pytest.raises(OSError, match='of org/net is not in the cache and offline mode is on'):
            castream_hub.load_pretrained(make_model(num_classes=5), self.cfg, num_classes=5)

    def test_offline_and_damaged_in_the_cache_says_so_and_drops_the_file(self, hub, monkeypatch):
        publish_weights(hub, 'org/net', make_model(num_classes=5))
        castream_hub.load_pretrained(make_model(num_classes=5), self.cfg, num_classes=5)
        cached_files()[0].write_bytes(b'x' * cached_files()[0].stat().st_size)
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        with pytest.raises(OSError, match='of org/net is not in the cache and offline mode is on'):
            castream_hub.load_pretrained(make_model(num_classes=5), self.cfg, num_classes=5)
        assert cached_files() == []

    def test_name_that_is_no_repository_and_unknown_revision_are_told(self, hub):
        publish_weights(hub, 'org/net', make_model(num_classes=5))
        with pytest.raises(ValueError, match=r"'a/b/c' is no name of a Hub repository"):
            castream_hub.load_pretrained(make_model(), {**self.cfg, 'hf_hub_id': 'a/b/c'})
        with pytest.raises(RuntimeError, match='org/net@v9 has no such revision'):
            castream_hub.load_pretrained(make_model(), {**self.cfg, 'hf_hub_id': 'org/net@v9'})

    @pytest.mark.parametrize(('config', 'error', 'message'), [
        (None, RuntimeError, r'^org/net has no config\.json\.$'),
        (b'{nope', ValueError, r'^config\.json of org/net names no architecture'),
        (b'[]', ValueError, r'^config\.json of org/net names no architecture'),
        (b'{"num_classes": 5}', ValueError, r'^config\.json of org/net names no architecture'),
        (b'{"architecture": "nosuch"}', ValueError, "names the architecture 'nosuch', which is not registered"),
    ], ids=str)
    def test_repository_without_a_registered_architecture_is_told(self, hub, config, error, message):
        hub.add('org/net', **({} if config is None else {'config__json': config}))
        with pytest.raises(error, match=message):
            read_architecture('org/net')

    @pytest.mark.parametrize('name', ['w.pth', 'w.safetensors'])
    def test_file_of_the_user_that_is_missing_or_damaged_is_named(self, name, tmp_path):
        path = tmp_path / name
        for error, message in ((FileNotFoundError, 'There is no file '), (ValueError, '')):
            with pytest.raises(error, match=message + re.escape(str(path))) as caught:
                make_model(pretrained=True, pretrained_cfg_overlay={'file': str(path)})
            assert '\n' not in str(caught.value)
            path.write_bytes(b'garbage')

    def test_other_heads_than_the_file_says_are_refused_though_every_shape_fits(self, hub, tmp_path):
        publish.write_repository(make_model(num_classes=5), tmp_path / 'net', 'org/net')
        with pytest.raises(ValueError, match="stream_heads=1, this model's has stream_heads=2"):
            make_model(f'local-dir:{tmp_path / "net"}', pretrained=True, stream_heads=2)


class Hostile:
    """Unpickled, it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


class TestPickles:
    cfg = TestFailures.cfg

    @pytest.fixture
    def marker(self, tmp_path):
        return tmp_path / 'executed'

    @pytest.fixture
    def pickled(self, marker, tmp_path) -> bytes:
        torch.save({'conv1.weight': Hostile(marker)}, tmp_path / 'evil.bin')
        torch.load(tmp_path / 'evil.bin', weights_only=False)
        assert marker.exists()  # it would do harm
        marker.unlink()
        return (tmp_path / 'evil.bin').read_bytes()

    @pytest.mark.parametrize('way', ['no safetensors', 'failing HEAD', 'named by the config', 'asked for'])
    def test_hostile_pickle_on_the_hub_is_never_executed(self, hub, way, marker, pickled):
        model = make_model(num_classes=5)
        publish_weights(hub, 'org/net', model)
        repository = hub.repositories['org/net']
        repository.files['pytorch_model.bin'] = pickled
        cfg, allow = dict(self.cfg), False
        if way == 'no safetensors':
            del repository.files['model.safetensors']
        elif way == 'failing HEAD':
            repository.head_status = 500
        elif way == 'named by the config':
            config = json.loads(repository.files['config.json'])
            config['pretrained_cfg']['hf_hub_filename'] = 'pytorch_model.bin'
            repository.files['config.json'] = json.dumps(config).encode()
        else:
            cfg['hf_hub_filename'], allow = 'pytorch_model.bin', True
        before = snapshot(model)
        with pytest.raises((RuntimeError, OSError, ValueError)):
            if way == 'named by the config':
                make_model('hf-hub:org/net', pretrained=True)
            castream_hub.load_pretrained(model, cfg, num_classes=5, allow_pickle=allow)
        assert not marker.exists()
        assert same(before, snapshot(model))
        assert ('/cdn/org/net/pytorch_model.bin' in hub.bodies_sent()) == allow

    def test_failing_request_for_timms_own_weights_does_not_go_on_to_their_pickle(self, hub, marker, pickled):
        gap = timm.create_model('test_resnet')
        hub.add(GAP_REPOSITORY, model__safetensors=save(gap.state_dict()), pytorch_model__bin=pickled).head_status = 500
        with pytest.raises(OSError, match=r'of timm/test_resnet\.r160_in1k is not in the cache and could not be'):
            timm_castream.push_to_hub(make_model(), 'org/stream', stream_only=True)
        assert not marker.exists()
        assert not any('pytorch_model.bin' in path for _, path in hub.requests)

    def test_hostile_pickle_in_a_local_folder_is_never_read(self, marker, pickled, tmp_path):
        publish.write_repository(make_model(num_classes=5), tmp_path / 'net', 'org/net')
        (tmp_path / 'net' / 'model.safetensors').unlink()
        (tmp_path / 'net' / 'pytorch_model.bin').write_bytes(pickled)
        with pytest.raises(RuntimeError, match=r'has no model\.safetensors\. Pickled weights'):
            make_model(f'local-dir:{tmp_path / "net"}', pretrained=True)
        assert not marker.exists()

    def test_hostile_checkpoint_is_not_published(self, marker, pickled, tmp_path):
        (tmp_path / 'last.pth.tar').write_bytes(pickled)
        with pytest.raises(ValueError, match='more than tensors and plain data is not unpickled'):
            publish.load_checkpoint(tmp_path / 'last.pth.tar', 'test_resnet_castream')
        assert not marker.exists()

    def test_honest_pickle_loads_where_it_is_asked_for(self, hub, tmp_path):
        source, model = make_model(num_classes=5), make_model(num_classes=5, seed=1)
        torch.save(source.state_dict(), tmp_path / 'w.bin')
        publish_weights(hub, 'org/net', source)
        hub.repositories['org/net'].files['pytorch_model.bin'] = (tmp_path / 'w.bin').read_bytes()
        del hub.repositories['org/net'].files['model.safetensors']
        cfg = {**self.cfg, 'hf_hub_filename': 'pytorch_model.bin'}
        with pytest.raises(RuntimeError, match=r'org/net offers the pickle pytorch_model\.bin'):
            castream_hub.load_pretrained(model, cfg, num_classes=5)
        with pytest.raises(RuntimeError, match='Pickled weights') as caught:
            make_model('hf-hub:org/net', pretrained=True)
        # What the sentence advises, word for word.
        advice = re.search(r'pretrained_cfg_overlay=(dict\(.*?\))', str(caught.value))[1]
        loaded = make_model('hf-hub:org/net', pretrained=True, pretrained_cfg_overlay=eval(advice), seed=1)
        assert same(snapshot(source), snapshot(loaded))


def run_elsewhere(hub: Hub, home: Path, code: str, **environment: str) -> str:
    """Runs code in a fresh process whose client is told of the Hub by HF_ENDPOINT; returns what it printed."""
    environ = {
        **os.environ, 'HF_ENDPOINT': hub.url, 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1', 'OMP_NUM_THREADS': '1',
        **environment}
    done = subprocess.run([sys.executable, '-c', code], env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class TestPush:
    def test_pushed_model_loads_bit_for_bit_in_another_process_and_then_offline(self, hub, tmp_path):
        model = make_model(num_classes=5, stream_block='proj_ca', freeze_backbone=False)
        url = timm_castream.push_to_hub(model, 'org/net', commit_message='First')
        assert url == f'{hub.url}/org/net'
        assert sorted(hub.repositories['org/net'].files) == ['README.md', 'config.json', 'model.safetensors']
        digest = hashlib.sha256(b''.join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()
        code = (
            'import hashlib, timm, timm_castream\n'
            "model = timm.create_model('hf-hub:org/net', pretrained=True)\n"
            "assert model.castream_config['stream_block'] == 'proj_ca'\n"
            "print(hashlib.sha256(b''.join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest())\n")
        assert run_elsewhere(hub, tmp_path / 'home', code) == digest
        hub.requests.clear()
        assert run_elsewhere(hub, tmp_path / 'home', code, HF_HUB_OFFLINE='1') == digest
        assert hub.requests == []

    def test_stream_alone_loads_by_one_call_on_timms_own_backbone(self, hub):
        gap = timm.create_model('test_resnet')
        hub.add(GAP_REPOSITORY, model__safetensors=save(gap.state_dict()))
        model = make_model(backbone_pretrained=True, stream_start=1)
        timm_castream.push_to_hub(model, 'org/stream', stream_only=True)
        assert len(hub.repositories['org/stream'].files['model.safetensors']) < 200_000 < len(save(gap.state_dict()))
        loaded = make_model('hf-hub:org/stream', pretrained=True, seed=1)
        assert same(snapshot(model), snapshot(loaded))
        # Other classes take the stream all the same, and by itself it goes into a model that is there already.
        assert same(stream_of(model), stream_of(make_model('hf-hub:org/stream', pretrained=True, num_classes=3)))
        for source in ('org/stream', 'hf-hub:org/stream'):
            other = make_model(backbone_pretrained=True, stream_start=1, seed=2)
            timm_castream.load_stream(other, source)
            assert same(snapshot(model), snapshot(other))

    def test_stream_alone_is_not_published_beside_weights_that_timm_does_not_have(self, hub, tmp_path):
        hub.add(GAP_REPOSITORY, model__safetensors=save(timm.create_model('test_resnet').state_dict()))
        model = make_model()
        with pytest.raises(ValueError, match=r'are not those of test_resnet\.r160_in1k'):
            timm_castream.push_to_hub(model, 'org/stream', stream_only=True)
        with pytest.raises(ValueError, match=r'test_resnet\.a1_in1k are no weights of timm'):
            timm_castream.push_to_hub(model, 'org/stream', stream_only=True, backbone_pretrained='a1_in1k')
        assert 'org/stream' not in hub.repositories
        # Said to be the users' own, it loads beside them and nowhere else.
        timm_castream.push_to_hub(model, 'org/stream', stream_only=True, backbone_pretrained=False)
        with pytest.raises(ValueError, match='trained beside other weights'):
            make_model('hf-hub:org/stream', pretrained=True, seed=1)
        own = make_model()
        torch.nn.init.zeros_(own.castream.cls_token)
        timm_castream.load_stream(own, 'org/stream')
        assert same(snapshot(model), snapshot(own))

    def test_stream_of_a_whole_model_can_be_taken_by_itself(self, hub):
        model = make_model(num_classes=5)
        timm_castream.push_to_hub(model, 'org/net')
        other = make_model(num_classes=5)
        torch.nn.init.zeros_(other.castream.cls_token)
        other.reset_classifier(2)
        timm_castream.load_stream(other, 'org/net')
        assert same(stream_of(model), stream_of(other))
        assert other.num_classes == 2

    def test_private_repository_is_made_so_and_needs_the_token(self, hub, monkeypatch):
        model = make_model(num_classes=5)
        timm_castream.push_to_hub(model, 'org/net', private=True)
        assert hub.repositories['org/net'].private
        timm_castream.load_stream(model, 'org/net')
        monkeypatch.delenv('HF_TOKEN')
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', constants.HF_HUB_CACHE + '2')
        with pytest.raises(RuntimeError, match='org/net is not on the Hub, or is private'):
            timm_castream.load_stream(model, 'org/net')

    @pytest.mark.parametrize('repo_id', ['net', 'a/b/c', 'no id/net'])
    def test_name_that_is_no_repository_is_not_pushed_to(self, hub, repo_id):
        with pytest.raises(ValueError, match=f"'{repo_id}' is no name of a Hub repository, which is org/name"):
            timm_castream.push_to_hub(make_model(), repo_id)
        assert hub.repositories == {}

    def test_push_without_a_token_says_to_log_in(self, hub, monkeypatch):
        monkeypatch.delenv('HF_TOKEN')
        with pytest.raises(RuntimeError, match='does not let you write org/net: run `hf auth login`'):
            timm_castream.push_to_hub(make_model(), 'org/net')

    def test_push_without_a_network_names_the_repository(self, hub):
        hub.__exit__()
        with pytest.raises(OSError, match='org/net could not be published'):
            timm_castream.push_to_hub(make_model(), 'org/net')
