"""Weights that a pretrained cfg names, through the real client against a Hub on the loopback address, and failures."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save
from states import cached_files, make_model, publish_weights, same, snapshot, stream_of

import timm_castream
from timm_castream.hub import load as loading
from timm_castream.hub import repository as publish
from timm_castream.hub.load import open_model
from timm_castream.hub.read import read_cfg_weights

if TYPE_CHECKING:
    from hub_server import Hub

pytest_plugins = ('hub_server',)

GAP_REPOSITORY = 'timm/test_resnet.r160_in1k'


def load_cfg(model: Any, cfg: dict[str, Any], num_classes: int = 1000, allow_pickle: bool = False) -> None:
    """Loads into a model that exists, where a failure must leave it as it was."""
    assert model.num_classes == num_classes
    loading.load_weights(model, read_cfg_weights(cfg, allow_pickle=allow_pickle), cfg)


class TestDownload:
    def test_variant_by_name_loads_once_and_then_without_a_body(self, hub, monkeypatch):
        monkeypatch.setenv('TIMM_CASTREAM_NAMESPACE', 'mirror')
        model = make_model('resnet18_castream', num_classes=1000)
        hub.add('mirror/resnet18_castream.sgd90_in1k', model__safetensors=save(model.state_dict()))
        for bodies in (['/cdn/mirror/resnet18_castream.sgd90_in1k/model.safetensors'], []):
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
        with pytest.raises(
            RuntimeError, match=r'^No pretrained weights exist for test_resnet_castream: pretrained=False'
        ):
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
    cfg = {
        'source': 'hf-hub',
        'hf_hub_id': 'org/net',
        'architecture': 'test_resnet_castream',
        'num_classes': 5,
        'input_size': (3, 160, 160),
        'first_conv': 'conv1.0',
        'classifier': 'fc',
    }

    @pytest.mark.parametrize(
        ('fault', 'error', 'message', 'cached'),
        [
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
        ],
    )
    def test_failure_is_one_sentence_and_leaves_model_and_cache_clean(self, hub, fault, error, message, cached):
        publish_weights(hub, 'org/net', make_model(num_classes=5))
        # Even where the Hub has a pickle to offer.
        hub.repositories['org/net'].files['pytorch_model.bin'] = b'never read'
        _spoil(hub, fault)
        model = make_model(num_classes=5, seed=1)
        before = snapshot(model)
        with pytest.raises(error, match=message) as caught:
            load_cfg(model, self.cfg, num_classes=5)
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
            load_cfg(model, self.cfg, num_classes=5)
        hub.repositories['org/net'].head_status = hub.repositories['org/net'].body = None
        load_cfg(model, self.cfg, num_classes=5)
        assert same(snapshot(source), snapshot(model))

    @pytest.mark.parametrize('namespace', ['', 'mirror'])
    def test_variant_that_was_never_published_says_where_it_looked_and_what_to_do(self, hub, monkeypatch, namespace):
        monkeypatch.setenv('TIMM_CASTREAM_NAMESPACE', namespace)
        searched = r' \(looked for mirror/resnet18_castream\.sgd90_in1k on the Hub\)' if namespace else ''
        with pytest.raises(
            RuntimeError,
            match=(
                rf'^The weights of resnet18_castream\.sgd90_in1k have not been published{searched}: '
                r'train .* backbone_pretrained=True'
            ),
        ) as caught:
            make_model('resnet18_castream', pretrained=True)
        assert '\n' not in str(caught.value)
        assert bool(hub.requests) == bool(namespace)

    def test_variant_that_was_never_published_is_not_asked_for_offline(self, monkeypatch):
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        with pytest.raises(RuntimeError, match='have not been published'):
            make_model('resnet18_castream', pretrained=True)

    def test_no_network_and_no_cache_is_an_oserror_that_names_the_repository(self, hub):
        hub.__exit__()
        with pytest.raises(OSError, match='of org/net is not in the cache and could not be downloaded'):
            load_cfg(make_model(num_classes=5), self.cfg, num_classes=5)

    def test_offline_and_no_cache_says_to_unset_the_variable(self, hub, monkeypatch):
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        with pytest.raises(OSError, match='of org/net is not in the cache and offline mode is on'):
            load_cfg(make_model(num_classes=5), self.cfg, num_classes=5)

    def test_offline_and_damaged_in_the_cache_says_so_and_drops_the_file(self, hub, monkeypatch):
        publish_weights(hub, 'org/net', make_model(num_classes=5))
        load_cfg(make_model(num_classes=5), self.cfg, num_classes=5)
        cached_files()[0].write_bytes(b'x' * cached_files()[0].stat().st_size)
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        with pytest.raises(OSError, match='of org/net is not in the cache and offline mode is on'):
            load_cfg(make_model(num_classes=5), self.cfg, num_classes=5)
        assert cached_files() == []

    def test_name_that_is_no_repository_and_unknown_revision_are_told(self, hub):
        publish_weights(hub, 'org/net', make_model(num_classes=5))
        with pytest.raises(ValueError, match=r"'a/b/c' is no name of a Hub repository"):
            load_cfg(make_model(), {**self.cfg, 'hf_hub_id': 'a/b/c'})
        with pytest.raises(RuntimeError, match='org/net@v9 has no such revision'):
            load_cfg(make_model(), {**self.cfg, 'hf_hub_id': 'org/net@v9'})

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
            load_cfg(model, cfg, num_classes=5, allow_pickle=allow)
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

    def test_hostile_pickle_in_a_local_folder_is_never_executed(self, marker, pickled, tmp_path):
        publish.write_repository(make_model(num_classes=5), tmp_path / 'net', 'org/net')
        (tmp_path / 'net' / 'model.safetensors').unlink()
        with pytest.raises(RuntimeError, match=r'has no model\.safetensors'):
            make_model(f'local-dir:{tmp_path / "net"}', pretrained=True)
        (tmp_path / 'net' / 'pytorch_model.bin').write_bytes(pickled)
        with pytest.raises(ValueError, match='more than tensors and plain data is not unpickled'):
            make_model(f'local-dir:{tmp_path / "net"}', pretrained=True)
        assert not marker.exists()

    def test_folder_that_timms_save_for_hf_wrote_with_a_pickle_is_loaded(self, tmp_path):
        model = make_model(num_classes=5, stream_start=1)
        timm.models.save_for_hf(model, tmp_path, model_args={'stream_start': 1, 'num_classes': 5})
        assert (tmp_path / 'pytorch_model.bin').exists() and not (tmp_path / 'model.safetensors').exists()
        loaded = make_model(f'local-dir:{tmp_path}', pretrained=True, seed=1)
        assert same(snapshot(model), snapshot(loaded))

    def test_hostile_checkpoint_is_not_published(self, marker, pickled, tmp_path):
        (tmp_path / 'last.pth.tar').write_bytes(pickled)
        with pytest.raises(ValueError, match='more than tensors and plain data is not unpickled'):
            open_model('test_resnet_castream', tmp_path / 'last.pth.tar')
        assert not marker.exists()

    def test_honest_pickle_loads_where_it_is_asked_for(self, hub, tmp_path):
        source, model = make_model(num_classes=5), make_model(num_classes=5, seed=1)
        torch.save(source.state_dict(), tmp_path / 'w.bin')
        publish_weights(hub, 'org/net', source)
        hub.repositories['org/net'].files['pytorch_model.bin'] = (tmp_path / 'w.bin').read_bytes()
        del hub.repositories['org/net'].files['model.safetensors']
        cfg = {**self.cfg, 'hf_hub_filename': 'pytorch_model.bin'}
        with pytest.raises(RuntimeError, match=r'org/net offers the pickle pytorch_model\.bin'):
            load_cfg(model, cfg, num_classes=5)
        with pytest.raises(RuntimeError, match='Pickled weights') as caught:
            make_model('hf-hub:org/net', pretrained=True)
        # What the sentence advises, word for word.
        advice = re.search(r'pretrained_cfg_overlay=(dict\(.*?\))', str(caught.value))[1]
        loaded = make_model('hf-hub:org/net', pretrained=True, pretrained_cfg_overlay=eval(advice), seed=1)
        assert same(snapshot(source), snapshot(loaded))
