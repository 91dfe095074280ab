"""Fingerprints, and streams alone in files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from states import make_model, same, snapshot, stream_of

import timm_castream
from timm_castream.hub import stream_file as weights


class TestFingerprint:
    def test_fingerprint_is_the_hash_of_the_frozen_weights_rounded_to_bfloat16(self):
        model = make_model(num_classes=7)
        digest = hashlib.sha256()
        for key, tensor in sorted(model.state_dict().items()):
            if key.startswith(('castream.', 'fc.')) or key.endswith('num_batches_tracked'):
                continue
            bits = tensor.numpy().astype(np.float32).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # round half to even, by hand
            digest.update(f'{key} {tuple(tensor.shape)}\n'.encode() + rounded.astype('<u2').tobytes())
        assert weights.fingerprint(model) == digest.hexdigest()

    @pytest.mark.parametrize(
        'change',
        [
            lambda m: m.to(memory_format=torch.channels_last),
            lambda m: m.bfloat16(),
            lambda m: m.double(),
            lambda m: m.reset_classifier(3) or m,
            lambda m: m.reset_classifier(0) or m,
            lambda m: m.bn1.num_batches_tracked.add_(5) is None or m,
            lambda m: torch.nn.init.zeros_(m.castream.cls_token) is None or m,
            timm_castream.detach,
        ],
        ids=['channels_last', 'bfloat16', 'float64', 'other classes', 'no classes', 'counters', 'stream', 'detach'],
    )
    def test_fingerprint_stays_for_the_same_backbone(self, change):
        model = make_model()
        before = weights.fingerprint(model)
        assert weights.fingerprint(change(model)) == before

    @pytest.mark.parametrize('key', ['conv1.0.weight', 'bn1.running_mean', 'layer4.0.conv1.weight'])
    def test_fingerprint_tells_other_weights_and_statistics(self, key):
        model = make_model()
        before = weights.fingerprint(model)
        model.state_dict()[key].view(-1)[0] += 0.1
        assert weights.fingerprint(model) != before


class TestStreamFiles:
    @pytest.mark.parametrize('backbone', ['test_resnet', 'test_convnext'])
    @pytest.mark.parametrize(
        'args',
        [
            {},
            {'stream_start': 2, 'stream_bias': False},
            {'stream_block': 'proj_ca'},
            {'stream_class_specific': True},
            {'stream_heads': 2},
        ],
        ids=str,
    )
    def test_stream_comes_back_bit_for_bit_and_alone(self, backbone, args, tmp_path):
        model = make_model(f'{backbone}_castream', num_classes=6, **args)
        other = make_model(f'{backbone}_castream', num_classes=6, **args)
        for parameter in other.castream.parameters():
            torch.nn.init.ones_(parameter)
        timm_castream.save_stream(model, tmp_path / 's.safetensors')
        timm_castream.load_stream(other, tmp_path / 's.safetensors')
        assert same(snapshot(model), snapshot(other))
        assert load_file(tmp_path / 's.safetensors').keys() == stream_of(model).keys()

    def test_header_says_format_backbone_arguments_and_fingerprint(self, tmp_path):
        model = make_model(stream_start=1, stream_stages=['layer1', 'layer3', 'layer4'])
        timm_castream.save_stream(model, tmp_path / 's.safetensors')
        with safe_open(tmp_path / 's.safetensors', framework='pt') as file:
            header = file.metadata()
        assert header.pop('fingerprint') == weights.fingerprint(model)
        assert header.pop('fingerprint_float16') == weights.fingerprint(model, torch.float16)
        assert json.loads(header.pop('stream_args')) == {
            'stream_start': 1,
            'stream_stages': ['layer1', 'layer3', 'layer4'],
            'stream_block': 'ca',
            'stream_class_specific': False,
            'stream_heads': 1,
            'stream_drop': 0.0,
            'stream_bias': True,
            'stream_init': 'paper',
        }
        assert header == {'format': 'pt', 'castream_format': '1', 'backbone': 'test_resnet'}

    @pytest.mark.parametrize(
        ('name', 'args', 'message'),
        [
            ('test_convnext_castream', {}, 'holds a stream of test_resnet, this model is test_convnext'),
            ('test_resnet_castream', {'stream_start': 1}, "stream_start=0, this model's has stream_start=1"),
            (
                'test_resnet_castream',
                {'stream_stages': ['layer1', 'layer4']},
                "stream_stages=None, .*'layer1', 'layer4'",
            ),
            ('test_resnet_castream', {'stream_block': 'proj_ca'}, 'proj_ca'),
            ('test_resnet_castream', {'stream_heads': 2}, "stream_heads=1, this model's has stream_heads=2"),
            ('test_resnet_castream', {'stream_bias': False}, 'stream_bias=True'),
            ('test_resnet_castream', {'stream_class_specific': True}, 'stream_class_specific=False'),
            (
                'test_resnet_castream',
                {'seed': 1},
                "fingerprint is [0-9a-f]{64}, this model's is [0-9a-f]{64}; .*strict",
            ),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_stream_of_something_else_is_refused_and_the_model_untouched(self, name, args, message, tmp_path):
        timm_castream.save_stream(make_model(), tmp_path / 's.safetensors')
        other = make_model(name, **args)
        before = snapshot(other)
        with pytest.raises(ValueError, match=message):
            timm_castream.load_stream(other, tmp_path / 's.safetensors')
        assert same(before, snapshot(other))

    def test_class_specific_stream_of_other_classes_is_refused_naming_both_shapes(self, tmp_path):
        timm_castream.save_stream(make_model(stream_class_specific=True, num_classes=5), tmp_path / 's.safetensors')
        other = make_model(stream_class_specific=True, num_classes=6)
        before = snapshot(other)
        with pytest.raises(ValueError, match=r'cls_token is \(5, \d+\), not \(6, \d+\)'):
            timm_castream.load_stream(other, tmp_path / 's.safetensors')
        assert same(before, snapshot(other))

    def test_not_strict_loads_on_other_weights_with_a_warning(self, tmp_path):
        model, other = make_model(), make_model(seed=1)
        timm_castream.save_stream(model, tmp_path / 's.safetensors')
        with pytest.warns(UserWarning, match='other weights of test_resnet') as caught:
            timm_castream.load_stream(other, tmp_path / 's.safetensors', strict=False)
        assert caught[0].filename == __file__
        assert same(stream_of(model), stream_of(other))

    def test_stream_fits_a_bfloat16_copy_other_dropout_and_other_classes(self, tmp_path):
        model = make_model()
        timm_castream.save_stream(model, tmp_path / 's.safetensors')
        other = make_model(stream_drop=0.5)
        other.reset_classifier(4)
        other.bfloat16()
        timm_castream.load_stream(other, tmp_path / 's.safetensors')
        assert same({k: v.bfloat16() for k, v in stream_of(model).items()}, stream_of(other))

    @pytest.mark.parametrize('init', ['paper', 'gap'])
    def test_stream_loads_whatever_the_initialisations_and_from_files_older_than_that_argument(self, init, tmp_path):
        model = make_model(stream_init='gap')
        timm_castream.save_stream(model, tmp_path / 's.safetensors')
        tensors, header = weights.read_safetensors(tmp_path / 's.safetensors', 's')
        older = json.loads(header['stream_args'])
        del older['stream_init']
        weights.write_safetensors(tmp_path / 'o.safetensors', tensors, {**header, 'stream_args': json.dumps(older)})
        for name in ('s', 'o'):
            other = make_model(stream_init=init)
            with torch.no_grad():
                other.castream.cls_token.zero_()
            timm_castream.load_stream(other, tmp_path / f'{name}.safetensors')
            assert same(stream_of(model), stream_of(other))

    def test_attached_model_and_registered_variant_take_each_others_streams(self, tmp_path):
        registered = make_model()
        plain = timm.create_model('test_resnet')
        plain.load_state_dict({k: v for k, v in registered.state_dict().items() if not k.startswith('castream.')})
        attached = timm_castream.attach(plain)
        timm_castream.save_stream(attached, tmp_path / 's.safetensors')
        timm_castream.load_stream(registered, tmp_path / 's.safetensors')
        assert same(stream_of(attached), stream_of(registered))

    def test_model_without_a_stream_can_neither_save_nor_load_one(self, tmp_path):
        timm_castream.save_stream(make_model(), tmp_path / 's.safetensors')
        for call in (timm_castream.save_stream, timm_castream.load_stream):
            with pytest.raises(ValueError, match=r'no CA-Stream; call timm_castream\.attach'):
                call(timm.create_model('test_resnet'), tmp_path / 's.safetensors')

    def test_folder_to_save_to_that_is_not_there_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r'no folder .*nowhere to write s\.safetensors'):
            timm_castream.save_stream(make_model(), tmp_path / 'nowhere' / 's.safetensors')

    def test_interrupted_save_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch):
        model = make_model()
        timm_castream.save_stream(model, tmp_path / 's.safetensors')
        before = (tmp_path / 's.safetensors').read_bytes()

        def interrupted(tensors, path, metadata):
            Path(path).write_bytes(b'half')
            raise KeyboardInterrupt

        monkeypatch.setattr(weights, 'save_file', interrupted)
        with pytest.raises(KeyboardInterrupt):
            timm_castream.save_stream(model, tmp_path / 's.safetensors')
        assert [path.name for path in tmp_path.iterdir()] == ['s.safetensors']
        assert (tmp_path / 's.safetensors').read_bytes() == before

    @pytest.mark.parametrize(
        ('spoil', 'message'),
        [
            (lambda content: content[:-100], 'is damaged or no safetensors file'),
            (lambda content: b'', 'is damaged or no safetensors file'),
            (lambda content: b'\xff' * len(content), 'is damaged or no safetensors file'),
            (
                lambda content: content.replace(b'castream_format":"1"', b'castream_format":"2"'),
                'is of format 2, .* to 1',
            ),
            (lambda content: content.replace(b'castream_format', b'castream_FORMAT'), 'has no header of a CA-Stream'),
            (
                lambda content: re.sub(
                    rb'"stream_args":"(.*?})"', lambda m: b'"stream_args":"' + b'7'.ljust(len(m[1])) + b'"', content
                ),
                'has no header of a CA-Stream',
            ),
            (
                lambda content: content.replace(b'blocks.0.proj.bias', b'blocks.0.proj.BIAS'),
                r'lacks castream\.blocks\.0',
            ),
        ],
        ids=['truncated', 'empty', 'garbage', 'later format', 'no header', 'arguments are a number', 'a key missing'],
    )
    def test_damaged_stream_file_is_refused_in_one_sentence(self, spoil, message, tmp_path):
        path = tmp_path / 's.safetensors'
        model = make_model()
        timm_castream.save_stream(model, path)
        path.write_bytes(spoil(path.read_bytes()))
        before = snapshot(model)
        with pytest.raises(ValueError, match=f'^{re.escape(str(path))}.*{message}') as caught:
            timm_castream.load_stream(model, path)
        assert '\n' not in str(caught.value)
        assert same(before, snapshot(model))

    @pytest.mark.parametrize('source', ['no/such/file.safetensors', 'file.safetensors', 'here'])
    def test_missing_stream_file_is_named(self, source):
        with pytest.raises(FileNotFoundError, match=source):
            timm_castream.load_stream(make_model(), source)


class TestHalfAndOther:
    @pytest.mark.parametrize('saved, loaded', [('float32', 'float16'), ('float16', 'float32'), ('float64', 'float16')])
    def test_a_stream_fits_a_copy_of_its_backbone_in_half_precision(self, saved, loaded, tmp_path):
        trained = make_model().to(getattr(torch, saved))
        torch.nn.init.normal_(trained.castream.cls_token)
        timm_castream.save_stream(trained, tmp_path / 's.safetensors')
        model = make_model().to(getattr(torch, loaded))
        timm_castream.load_stream(model, tmp_path / 's.safetensors')
        torch.testing.assert_close(
            model.castream.cls_token.double(), trained.castream.cls_token.double(), rtol=1e-3, atol=1e-3
        )

    def test_a_half_model_with_other_weights_is_refused(self, tmp_path):
        timm_castream.save_stream(make_model(), tmp_path / 's.safetensors')
        with pytest.raises(ValueError, match='was trained on other weights of test_resnet'):
            timm_castream.load_stream(make_model(seed=1).half(), tmp_path / 's.safetensors')

    def test_a_parametrized_stream_is_saved_as_the_weights_that_it_computes(self, tmp_path):
        model = make_model()
        linear = model.castream.blocks[1].proj
        torch.nn.utils.parametrizations.weight_norm(linear)
        torch.nn.init.normal_(linear.parametrizations.weight.original0)
        timm_castream.save_stream(model, tmp_path / 's.safetensors')
        plain = make_model()
        timm_castream.load_stream(plain, tmp_path / 's.safetensors')
        torch.testing.assert_close(plain.castream.blocks[1].proj.weight, linear.weight)
        assert not torch.equal(make_model().castream.blocks[1].proj.weight, linear.weight)

    def test_written_weights_have_the_mode_of_other_files(self, tmp_path):
        mask = os.umask(0o022)
        try:
            weights.write_safetensors(tmp_path / 'a.safetensors', {'a': torch.ones(1)}, {})
        finally:
            os.umask(mask)
        assert stat.S_IMODE((tmp_path / 'a.safetensors').stat().st_mode) == 0o644

    @pytest.mark.filterwarnings('ignore')
    def test_the_hash_of_a_quantised_model_depends_on_its_quantised_weights(self):
        models = [make_model('test_resnet', seed=seed).eval() for seed in (0, 0, 1)]
        models[2].load_state_dict(
            {
                **models[2].state_dict(),
                **{  # the classifier alone differs
                    key: value for key, value in models[0].state_dict().items() if not key.startswith('fc.')
                },
            }
        )
        hashes = [
            weights.weights_hash(torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})) for model in models
        ]
        assert hashes[0] == hashes[1] != hashes[2]
