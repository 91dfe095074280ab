"""The identity of methods of the user and of architectures: what must tell two apart, and what must not."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
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
from timm_castream.attribution.method_hash import architecture, identity


def closed(value: Any) -> Callable[..., Any]:
    return lambda x, target: (x, value)


def with_default(value: Any) -> Callable[..., Any]:
    def method(x: Tensor, target: Tensor, side: Any = value) -> Any:
        return x, side

    return method


def with_keyword_default(value: Any) -> Callable[..., Any]:
    def method(x: Tensor, target: Tensor, *, side: Any = value) -> Any:
        return x, side

    return method


def with_nested_function(value: Any) -> Callable[..., Any]:
    def method(x: Tensor, target: Tensor) -> Any:
        return (lambda: (x, value))()

    return method


class Explainer:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, x: Tensor, target: Tensor) -> Any:
        return x, self.value

    def maps(self, x: Tensor, target: Tensor) -> Any:
        return x, self.value


WAYS: tuple[Callable[[Any], Any], ...] = (
    closed,
    with_default,
    with_keyword_default,
    with_nested_function,
    Explainer,
    lambda value: Explainer(value).maps,
    lambda value: closed(Explainer(value)),
    lambda value: closed(closed(value)),
    lambda value: functools.partial(closed(0), side=value),
    lambda value: functools.partial(closed(0), value),
)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize(
    ('one', 'other'),
    [
        (1, 2),
        (1, 1.0),
        ('a', 'b'),
        ((1, 2), (1, 3)),
        ([1, [2]], [1, [3]]),
        ({'a': [1]}, {'a': [2]}),
        ({1, 2}, {1, 3}),
        (np.arange(3), np.arange(3)[::-1]),
        (np.arange(4), np.arange(4).reshape(2, 2)),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)),
        (torch.float32, torch.float16),
        (np.array([None, 1]), np.array([None, 2])),
        (torch.relu, torch.sigmoid),
        (np.add, np.multiply),
        (lambda x: x, lambda x: x + 1),
        (Path('a'), Path('b')),
    ],
)
def test_values_that_a_method_holds_tell_methods_apart(way: Callable[[Any], Any], one: Any, other: Any) -> None:
    assert identity(way(one)) != identity(way(other))
    assert identity(way(one)) == identity(way(one))


def test_the_order_of_sets_and_mappings_does_not_count() -> None:
    assert identity(closed({'a': 1, 'b': 2})) == identity(closed({'b': 2, 'a': 1}))
    assert identity(closed({'a': 1, 'b': 2})) != identity(closed({'a': 2, 'b': 1}))
    assert identity(closed({'a', 'b', 'c'})) == identity(closed({'c', 'b', 'a'}))


def test_an_unknown_object_counts_by_its_type() -> None:
    assert identity(closed(iter(()))) == identity(closed(iter(())))
    assert identity(closed(object())) != identity(closed(iter(())))


def test_a_value_that_holds_itself_has_an_identity() -> None:
    values: list[Any] = [1]
    values.append(values)
    other: list[Any] = [2]
    other.append(other)
    assert identity(closed(values)) != identity(closed(other))


def test_a_module_counts_by_its_weights_and_settings() -> None:
    one, other = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1, stride=2)
    other.load_state_dict(one.state_dict())
    identities = {identity(closed(one)), identity(closed(other))}
    with torch.no_grad():
        one.bias.add_(1)
    assert len(identities | {identity(closed(one))}) == 3
    assert identity(closed(one.train())) == identity(closed(one.eval()))


def test_code_and_variables_of_the_methods_module_count() -> None:
    source = textwrap.dedent("""
        SIDE = 0

        class Scaler:
            factor = 3

            def scaled(self, x):
                return x * self.factor

        def helper(x):
            return x + 1

        def method(x, target):
            return Scaler().scaled(helper(x))[:, SIDE]
    """)
    found = set()
    for old, new in (('', ''), ('SIDE = 0', 'SIDE = 1'), ('x + 1', 'x + 2'), ('= 3', '= 4'), ('x * self', 'x + self')):
        namespace: dict[str, Any] = {'__name__': 'mine'}
        exec(source.replace(old, new), namespace)
        found.add(identity(namespace['method']))
    assert len(found) == 5


def test_an_identity_is_the_same_in_another_process(tmp_path: Path) -> None:
    (tmp_path / 'mine.py').write_text(
        textwrap.dedent("""
        from timm_castream.attribution.method_hash import identity

        class Explainer:
            words, lock = {'a', 'b', 'c'}, object()

            def __call__(self, x, target):
                return x if target in {'a', 'b', 'c'} else self.lock

        print(identity(Explainer()), identity(lambda x, target, words=frozenset('abc'): (x, words)))
    """)
    )
    printed = {
        subprocess.run(
            [sys.executable, 'mine.py'],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, 'PYTHONHASHSEED': seed, 'PYTHONPATH': str(Path(__file__).parents[2])},
        ).stdout
        for seed in ('1', '2')
    }
    assert len(printed) == 1 and printed != {''}


def test_the_working_state_of_pytorch_grad_cam_does_not_count() -> None:
    model = timm.create_model('test_resnet', num_classes=10).eval()
    cam = EigenCAM(model, target_layers=[model.layer4])

    def eigen_cam(x: Tensor, target: Tensor) -> np.ndarray:
        return cam(x, [ClassifierOutputTarget(index) for index in target.tolist()])

    before = identity(eigen_cam)
    eigen_cam(torch.randn(1, 3, 64, 64), torch.tensor([1]))
    assert identity(eigen_cam) == before


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
