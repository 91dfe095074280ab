"""Pushes through the real client to a Hub on the loopback address."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save
from states import make_model, same, snapshot, stream_of

import timm_castream

if TYPE_CHECKING:
    from hub_server import Hub

pytest_plugins = ('hub_server',)

GAP_REPOSITORY = 'timm/test_resnet.r160_in1k'


def run_elsewhere(hub: Hub, home: Path, code: str, **environment: str) -> str:
    """Runs code in a fresh process whose client is told of the Hub by HF_ENDPOINT; returns what it printed."""
    environ = {
        **os.environ,
        'HF_ENDPOINT': hub.url,
        'HF_HOME': str(home),
        'HF_HUB_DISABLE_XET': '1',
        'OMP_NUM_THREADS': '1',
        **environment,
    }
    done = subprocess.run([sys.executable, '-c', code], env=environ, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class TestPush:
    @pytest.mark.slow
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
            "print(hashlib.sha256(b''.join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest())\n"
        )
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

    def test_stream_alone_is_not_published_on_weights_that_timm_does_not_have(self, hub, tmp_path):
        hub.add(GAP_REPOSITORY, model__safetensors=save(make_model('test_resnet', seed=1).state_dict()))
        model = make_model()
        with pytest.raises(ValueError, match=r'are not those of test_resnet\.r160_in1k'):
            timm_castream.push_to_hub(model, 'org/stream', stream_only=True)
        with pytest.raises(ValueError, match=r'test_resnet\.a1_in1k are no weights of timm'):
            timm_castream.push_to_hub(model, 'org/stream', stream_only=True, backbone_pretrained='a1_in1k')
        assert 'org/stream' not in hub.repositories
        # Said to be the users' own, it loads beside them and nowhere else.
        timm_castream.push_to_hub(model, 'org/stream', stream_only=True, backbone_pretrained=False)
        with pytest.raises(ValueError, match='trained on other weights'):
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
