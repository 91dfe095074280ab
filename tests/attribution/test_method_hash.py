"""The hash of methods of the user and of architectures: what must tell two apart, and what must not."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from pytorch_grad_cam import EigenCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

import timm_castream  # noqa: F401 registers the models
from timm_castream.attribution.method_hash import architecture, method_hash

SOURCE = """
class Explainer:
    def __call__(self, x, target):
        return x

def method(x, target):
    return x[:, 0]

def other(x, target):
    return x[:, 0]
"""


def load(folder: Path, source: str) -> Any:
    (folder / 'mine_of_test.py').write_text(source)
    sys.modules.pop('mine_of_test', None)
    importlib.invalidate_caches()
    return importlib.import_module('mine_of_test')


def test_the_name_and_the_source_text_tell_functions_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    one = load(tmp_path, SOURCE)
    again = method_hash(one.method)
    hashes = {again, method_hash(one.other), method_hash(one.Explainer())}
    assert len(hashes) == 3
    assert method_hash(load(tmp_path, SOURCE).method) == again
    assert method_hash(functools.partial(one.method, side=1)) == again
    changed = load(tmp_path, SOURCE.replace('x[:, 0]', 'x[:, 1]'))
    assert method_hash(changed.method) not in hashes


@pytest.mark.parametrize('method', [torch.relu, functools.partial(torch.sigmoid), nn.Identity(), len])
def test_what_has_no_source_counts_by_its_name(method: Any) -> None:
    assert method_hash(method) == method_hash(method) != method_hash(np.add)


def test_saved_maps_count_by_their_bytes() -> None:
    maps = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    same, other = {None: maps.copy()}, {None: maps[::-1]}
    assert method_hash({None: maps}) == method_hash(same) != method_hash(other)
    assert method_hash({'gap': maps, 'ca': maps}) != method_hash({None: maps})
    assert method_hash({None: maps}) != method_hash({None: maps.astype(np.float64)})


def test_the_working_state_of_pytorch_grad_cam_does_not_count() -> None:
    model = timm.create_model('test_resnet', num_classes=10).eval()
    cam = EigenCAM(model, target_layers=[model.layer4])

    def eigen_cam(x: Tensor, target: Tensor) -> np.ndarray:
        return cam(x, [ClassifierOutputTarget(index) for index in target.tolist()])

    before = method_hash(eigen_cam)
    eigen_cam(torch.randn(1, 3, 64, 64), torch.tensor([1]))
    assert method_hash(eigen_cam) == before


@pytest.mark.parametrize(
    ('name', 'arguments'),
    [('test_resnet', {'output_stride': 8}), ('test_vit', {'num_heads': 4}), ('test_vit', {'global_pool': 'avg'})],
)
def test_an_architecture_has_the_settings_that_weights_do_not_show(name: str, arguments: dict[str, Any]) -> None:
    plain = architecture(timm.create_model(name))
    assert plain == architecture(timm.create_model(name, drop_rate=0.1, drop_path_rate=0.1).eval())
    assert plain != architecture(timm.create_model(name, **arguments))


def test_an_architecture_does_not_show_how_a_stream_was_trained() -> None:
    options: tuple[dict[str, Any], ...] = ({}, {'stream_init': 'gap'}, {'stream_drop': 0.1})
    assert len({architecture(timm.create_model('test_resnet_castream', **option)) for option in options}) == 1
