"""The arguments of a stream: declared once, for attach, for a model and for a file."""

from __future__ import annotations

import inspect

import pytest
from streams import SMALL

import timm_castream
from timm_castream.backbones.stream_config import StreamConfig, inference_args


def test_attach_shows_every_argument_of_a_stream_with_its_default() -> None:
    parameters = inspect.signature(timm_castream.attach).parameters
    stream = {name: parameter.default for name, parameter in parameters.items() if name.startswith('stream_')}
    assert stream == StreamConfig().to_dict()
    assert next(iter(parameters)) == 'model' and not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_an_unknown_argument_is_refused_by_its_name(make_model) -> None:
    with pytest.raises(TypeError, match='stream_depth'):
        make_model(SMALL[0], stream_depth=3)


def test_arguments_of_training_alone_are_not_those_of_inference() -> None:
    config = StreamConfig(stream_start=2, stream_drop=0.5, stream_init='gap', stream_stages=['layer4'])
    assert inference_args(config.to_dict()) == {
        'stream_start': 2,
        'stream_stages': ['layer4'],
        'stream_block': 'ca',
        'stream_class_specific': False,
        'stream_heads': 1,
        'stream_bias': True,
    }
    assert inference_args({'stream_heads': 2}) == {**inference_args({}), 'stream_heads': 2}


def test_a_config_keeps_its_own_list_of_stages() -> None:
    names = ['layer3', 'layer4']
    config = StreamConfig(stream_stages=names)
    names.append('fc')
    assert config.to_dict()['stream_stages'] == ['layer3', 'layer4']
