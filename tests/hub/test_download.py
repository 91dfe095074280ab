"""Downloads through the real client from a Hub on the loopback address."""

from __future__ import annotations

import pytest
from huggingface_hub import constants
from states import cached_files

from timm_castream.hub import download as download_module
from timm_castream.hub.download import download, read_architecture

pytest_plugins = ('hub_server',)


def test_a_large_file_is_read_once_in_a_process_for_its_hash(hub):
    hub.add('org/net', model__safetensors=b'weights')
    before = download_module._sha256.cache_info().misses
    for _ in range(3):
        assert download('org/net').read_bytes() == b'weights'
    assert download_module._sha256.cache_info().misses == before + 1


@pytest.mark.parametrize('offline', [False, True])
def test_a_file_that_changed_in_the_cache_is_never_returned(hub, monkeypatch, offline):
    hub.add('org/net', model__safetensors=b'weights')
    download('org/net')
    (blob,) = cached_files()
    blob.write_bytes(b'Weights')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', offline)
    if offline:
        with pytest.raises(OSError, match='is not in the cache and offline mode is on'):
            download('org/net')
        assert cached_files() == []
    else:
        assert download('org/net').read_bytes() == b'weights'


def test_a_file_that_arrives_damaged_twice_is_not_kept(hub):
    repository = hub.add('org/net', model__safetensors=b'weights')
    repository.body = b'Weights'
    with pytest.raises(OSError, match=r'model\.safetensors of org/net arrives damaged'):
        download('org/net')
    assert cached_files() == []
    repository.body = None
    assert download('org/net').read_bytes() == b'weights'


def test_a_small_file_and_a_cache_without_links_are_returned_as_they_are(hub, tmp_path):
    hub.add('org/net', config__json=b'{}')
    assert download('org/net', 'config.json').read_bytes() == b'{}'
    copy = tmp_path / 'model.safetensors'
    copy.write_bytes(b'anything')
    assert download_module._is_intact(copy)


@pytest.mark.parametrize(
    ('config', 'error', 'message'),
    [
        (None, RuntimeError, r'^org/net has no config\.json\.$'),
        (b'{nope', ValueError, r'^config\.json of org/net names no architecture'),
        (b'[]', ValueError, r'^config\.json of org/net names no architecture'),
        (b'{"num_classes": 5}', ValueError, r'^config\.json of org/net names no architecture'),
        (b'{"architecture": "nosuch"}', ValueError, "names the architecture 'nosuch', which is not registered"),
    ],
    ids=str,
)
def test_repository_without_a_registered_architecture_is_told(hub, config, error, message):
    hub.add('org/net', **({} if config is None else {'config__json': config}))
    with pytest.raises(error, match=message):
        read_architecture('org/net')
