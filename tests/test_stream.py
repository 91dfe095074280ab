"""The mathematics of `stream.py` against loops in float64, written from the equations."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import timm_castream
from timm_castream import stream
from timm_castream.stream import CAStream, CrossAttention

MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)


def linear_loop(layer: nn.Linear | None, vector: list[float]) -> list[float]:
    if layer is None:
        return vector
    weight = layer.weight.tolist()
    bias = [0.0] * len(weight) if layer.bias is None else layer.bias.tolist()
    return [b + sum(w * v for w, v in zip(row, vector, strict=True)) for row, b in zip(weight, bias, strict=True)]


def cross_attention_loop(
    query: Tensor, features: Tensor, num_heads: int = 1, key: nn.Linear | None = None, value: nn.Linear | None = None
) -> list[list[float]]:
    """F^T softmax(F q / sqrt(d)), eq. (6), image by image and location by location; heads share out the channels."""
    pooled = []
    for q, f in zip(query.tolist(), features, strict=True):
        locations = f.flatten(1).t().tolist()
        keys = [linear_loop(key, location) for location in locations]
        values = [linear_loop(value, location) for location in locations]
        width = len(q) // num_heads
        out = []
        for head in range(num_heads):
            channels = range(head * width, (head + 1) * width)
            logits = [sum(k[c] * q[c] for c in channels) / math.sqrt(len(q)) for k in keys]
            weights = [math.exp(logit - max(logits)) for logit in logits]
            out += [sum(w * v[c] for w, v in zip(weights, values, strict=True)) / sum(weights) for c in channels]
        pooled.append(out)
    return pooled


def block_loop(block: CrossAttention, query: Tensor, features: Tensor) -> Tensor:
    """W_l CA_l(q_l, F_l) of eq. (10)."""
    pooled = cross_attention_loop(query, features, block.num_heads, block.key, block.value)
    return torch.tensor([linear_loop(block.proj, vector) for vector in pooled], dtype=torch.float64)


def feature_maps(dims: tuple[int, ...], batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, d, 5 - i, 3 + i, generator=generator, dtype=dtype) for i, d in enumerate(dims)]


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('memory_format', MEMORY_FORMATS)
@pytest.mark.parametrize('num_heads', [1, 2, 4])
@pytest.mark.parametrize('block', ['ca', 'proj_ca'])
def test_a_block_computes_equation_6_and_supplementary_equation_1(block, num_heads, memory_format, bias):
    torch.manual_seed(0)
    layer = CrossAttention(8, 6, num_heads, block, bias=bias, dtype=torch.float64)
    features = feature_maps((8,))[0].to(memory_format=memory_format)
    query = 3 * torch.randn(2, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(query, features), block_loop(layer, query, features), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('block', ['ca', 'proj_ca'])
def test_a_stream_computes_equation_10_from_the_first_stage_to_the_last(block):
    torch.manual_seed(0)
    dims = (4, 6, 8)
    model = CAStream(dims, block=block, num_heads=2, dtype=torch.float64)
    features = feature_maps(dims)
    query = model.cls_token.expand(2, -1)
    for layer, stage in zip(model.blocks, features, strict=True):
        query = block_loop(layer, query, stage)
    assert query.shape == (2, 8)
    torch.testing.assert_close(model(features), query, rtol=1e-10, atol=1e-12)


def test_a_class_specific_stream_starts_from_the_row_of_each_label():
    torch.manual_seed(0)
    dims = (4, 6)
    model = CAStream(dims, num_classes=5, dtype=torch.float64)
    features = feature_maps(dims)
    query = torch.stack([model.cls_token[3], model.cls_token[1]])
    for layer, stage in zip(model.blocks, features, strict=True):
        query = block_loop(layer, query, stage)
    assert model.cls_token.shape == (5, 4)
    torch.testing.assert_close(model(features, torch.tensor([3, 1])), query, rtol=1e-10, atol=1e-12)


def test_attention_logits_are_the_class_agnostic_cam_of_equation_5():
    torch.manual_seed(0)
    query = torch.randn(2, 8, dtype=torch.float64)
    features = feature_maps((8,))[0]
    cam = torch.zeros(2, *features.shape[2:], dtype=torch.float64)
    for k in range(8):
        cam += query[:, k, None, None] * features[:, k]
    logits = CrossAttention(8, 8, dtype=torch.float64).attention_logits(query, features)
    torch.testing.assert_close(logits.view_as(cam), cam, rtol=1e-12, atol=1e-12)


def test_forward_takes_the_attention_that_the_caller_has_already():
    torch.manual_seed(0)
    layer = CrossAttention(8, 8, 2, 'proj_ca', dtype=torch.float64)
    query, features = torch.randn(2, 8, dtype=torch.float64), feature_maps((8,))[0]
    given = layer.attention(query, features)
    torch.testing.assert_close(layer(query, features, given), layer(query, features), rtol=0, atol=0)
    assert not torch.allclose(layer(query, features, given.flip(-1)), layer(query, features))


@pytest.mark.parametrize('memory_format', MEMORY_FORMATS)
def test_gradients_are_those_of_finite_differences(memory_format):
    torch.manual_seed(0)
    layer = CrossAttention(4, 3, 2, 'proj_ca', dtype=torch.float64)
    query = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 4, 3, 2, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(layer, (query, features))


@pytest.mark.parametrize(
    'args, parameters',
    [
        ({}, 6_969_152),
        ({'stream_start': 1}, 6_952_704),
        ({'stream_start': 2}, 6_821_376),
        ({'stream_start': 3}, 6_296_576),
        ({'stream_start': 4}, 4_198_400),
        ({'stream_block': 'proj_ca'}, 18_126_272),
    ],
)
def test_the_stream_of_resnet50_has_the_papers_parameters(args, parameters):
    model = timm.create_model('resnet50_castream', device='meta', **args)
    assert sum(p.numel() for p in model.castream.parameters()) == parameters


@pytest.mark.parametrize('class_specific, parameters', [(False, 32_526_184), (True, 32_590_120)])
def test_resnet50_with_its_stream_has_the_papers_parameters(class_specific, parameters):
    model = timm.create_model('resnet50_castream', device='meta', stream_class_specific=class_specific)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_parameter_names_are_those_of_the_contract():
    assert set(CAStream((4, 6), block='proj_ca').state_dict()) == {
        'cls_token',
        *(
            f'blocks.{i}.{layer}.{part}'
            for i in (0, 1)
            for layer in ('key', 'value', 'proj')
            for part in ('weight', 'bias')
        ),
    }
    assert set(CAStream((4, 6), bias=False).state_dict()) == {
        'cls_token',
        'blocks.0.proj.weight',
        'blocks.1.proj.weight',
    }


def test_linear_layers_start_from_xavier_uniform():
    torch.manual_seed(0)
    layer = CrossAttention(256, 512, block='proj_ca')
    for linear in (layer.key, layer.value, layer.proj):
        bound = math.sqrt(6 / (linear.in_features + linear.out_features))
        assert 0.999 * bound < linear.weight.abs().max() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


@pytest.mark.parametrize('num_classes', [None, 20])
def test_q0_starts_from_a_normal_distribution_of_mean_1_and_deviation_1(num_classes):
    torch.manual_seed(0)
    token = CAStream((20_000 // (num_classes or 1),), num_classes).cls_token.detach()
    error = 4 / math.sqrt(token.numel())
    assert token.mean().item() == pytest.approx(1, abs=error)
    assert token.std().item() == pytest.approx(1, abs=error)
    z = token - 1
    assert (z.abs() < 1).float().mean().item() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=error)


@pytest.mark.parametrize('num_classes', [None, 3])
@pytest.mark.parametrize('num_heads', [1, 2])
@pytest.mark.parametrize('block', ['ca', 'proj_ca'])
@pytest.mark.parametrize('dims', [(8,), (4, 8), (4, 6, 8)])
def test_a_stream_with_the_gap_initialisation_is_the_average_of_the_last_map(dims, block, num_heads, num_classes):
    torch.manual_seed(0)
    model = CAStream(dims, num_classes, num_heads, block, drop=0.5, init='gap', dtype=torch.float64)
    features = feature_maps(dims)
    expected = features[-1].mean((2, 3))
    labels = None if num_classes is None else torch.tensor([2, 0])
    for mode in (True, False):  # the last block has no dropout
        torch.testing.assert_close(model.train(mode)(features, labels), expected, rtol=1e-12, atol=1e-12)
    if num_classes is not None:
        model.reset_cls_token(5)
        torch.testing.assert_close(model(features, torch.tensor([4, 1])), expected, rtol=1e-12, atol=1e-12)


def test_every_weight_of_a_stream_with_the_gap_initialisation_trains_after_a_few_steps():
    torch.manual_seed(0)
    model = CAStream((4, 6, 8), init='gap', dtype=torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    features = feature_maps((4, 6, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(features).square().sum().backward()
        optimizer.step()
    assert not any(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('init', [{}, {'init': 'paper'}])
def test_the_papers_initialisation_draws_the_weights_in_order_and_q0_last(init):
    torch.manual_seed(0)
    model = CAStream((4, 6, 8), block='proj_ca', **init)
    torch.manual_seed(0)
    for block in model.blocks:
        drawn = [nn.Linear(linear.in_features, linear.out_features) for linear in (block.key, block.value, block.proj)]
        for linear, own in zip(drawn, (block.key, block.value, block.proj), strict=True):
            nn.init.xavier_uniform_(linear.weight)
            assert torch.equal(linear.weight, own.weight) and torch.equal(linear.bias, own.bias)
    assert torch.equal(torch.empty(1, 4).normal_(1.0, 1.0), model.cls_token)


class LargestAllocation(TorchDispatchMode):
    """The size in bytes of the largest storage that an operation makes."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.seen = {t.untyped_storage().data_ptr() for t in known}
        self.bytes = 0
        self.alive: list[Tensor] = []  # an address must not be given out twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage.data_ptr())
                self.bytes = max(self.bytes, storage.nbytes())
                self.alive.append(tensor)
        return out


@pytest.mark.parametrize('memory_format', MEMORY_FORMATS)
@pytest.mark.parametrize('num_heads', [1, 4])
@pytest.mark.parametrize('block', ['ca', 'proj_ca'])
def test_no_copy_of_the_feature_map_is_made_in_either_memory_format(block, num_heads, memory_format):
    layer = CrossAttention(64, 64, num_heads, block)
    features = torch.randn(4, 64, 64, 32).to(memory_format=memory_format)
    query = torch.randn(4, 64, requires_grad=True)
    with LargestAllocation(features, query, *layer.parameters()) as allocated:
        layer(query, features).sum().backward()  # the backbone is frozen: the map needs no gradient
    # The largest that there has to be are the attention weights, one of the 64 channels a head.
    assert 0 < allocated.bytes <= num_heads * features.untyped_storage().nbytes() / 64


def test_the_count_of_bytes_sees_a_copy():
    features = torch.randn(2, 64, 32, 32)
    with LargestAllocation(features) as allocated:
        features.flatten(2).transpose(1, 2).contiguous()
    assert allocated.bytes == features.untyped_storage().nbytes()


def test_the_softmax_is_in_float32_under_autocast():
    torch.manual_seed(0)
    layer = CrossAttention(8, 8)
    features = torch.randn(1, 8, 224, 224)
    with torch.autocast('cpu', torch.bfloat16):
        attention = layer.attention(torch.randn(1, 8), features.bfloat16())
        pooled = layer(torch.randn(1, 8), features)
    assert attention.dtype == torch.float32
    assert pooled.dtype == torch.bfloat16
    # bfloat16 cannot tell 1 / 50,000 from its neighbours: a sum of 50,176 such weights would be off by 1e-3.
    assert attention.double().sum().item() == pytest.approx(1, abs=1e-5)


def test_products_that_float16_cannot_hold_are_scaled_first():
    layer = CrossAttention(256, 8, dtype=torch.float16)
    query, features = torch.full((1, 256), 30.0).half(), torch.full((1, 256, 2, 2), 30.0).half()
    # F q is 256 * 30 * 30 = 230,400 at each location, and the largest float16 is 65,504.
    assert torch.equal(layer.attention(query, features), torch.full((1, 1, 4), 0.25))


@pytest.mark.parametrize(
    'dtype, of_softmax',
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_a_stream_keeps_its_dtype_and_its_softmax_has_at_least_32_bits(dtype, of_softmax):
    model = CAStream((8, 8), dtype=dtype)
    features = torch.randn(2, 8, 4, 4).to(dtype)
    assert model([features, features]).dtype == dtype
    assert model.blocks[0].attention(torch.randn(2, 8).to(dtype), features).dtype == of_softmax


def test_dropout_drops_attention_weights_before_the_values_are_summed():
    torch.manual_seed(0)
    layer = CrossAttention(8, 8, block='proj_ca', drop=0.5, dtype=torch.float64)
    layer.proj_drop.p = 0.0
    query, features = torch.randn(2, 8, dtype=torch.float64), feature_maps((8,))[0]
    weights = layer.eval().attention(query, features)
    torch.manual_seed(7)
    dropped = F.dropout(weights, 0.5)
    values = F.linear(features.flatten(2).transpose(1, 2), layer.value.weight, layer.value.bias)
    expected = layer.proj(torch.einsum('bhp,bpd->bd', dropped, values))
    torch.manual_seed(7)
    torch.testing.assert_close(layer.train()(query, features), expected)
    assert not torch.allclose(layer(query, features), layer.eval()(query, features))


def test_dropout_is_off_in_eval_mode_and_in_the_last_block():
    torch.manual_seed(0)
    dropping = CAStream((8, 8), drop=0.5, dtype=torch.float64)
    plain = CAStream((8, 8), dtype=torch.float64)
    plain.load_state_dict(dropping.state_dict())
    features = feature_maps((8, 8))
    torch.testing.assert_close(dropping.eval()(features), plain(features), rtol=0, atol=0)
    last, given = dropping.train().blocks[-1], torch.randn(2, 8, dtype=torch.float64)
    torch.testing.assert_close(last(given, features[1]), plain.blocks[-1](given, features[1]), rtol=0, atol=0)
    assert (dropping.blocks[0](given, features[0]) == 0).any()  # the outgoing query is dropped, too


def test_reset_cls_token_keeps_dtype_and_whether_it_trains():
    model = CAStream((4, 6), num_classes=3, dtype=torch.float64)
    model.cls_token.requires_grad_(False)
    before = model.cls_token.clone()
    model.reset_cls_token(7)
    assert model.cls_token.shape == (7, 4)
    assert model.cls_token.dtype == torch.float64
    assert not model.cls_token.requires_grad
    assert not torch.equal(model.cls_token[:3], before)


@pytest.mark.parametrize(
    'args, message',
    [
        ({'block': 'cross'}, "block 'cross' .*'ca', 'proj_ca'"),
        ({'num_heads': 3}, 'num_heads 3 .* 8 channels'),
        ({'num_heads': 0}, 'num_heads must be a positive int, got 0'),
        ({'num_heads': 2.0}, 'num_heads must be a positive int, got 2.0'),
        ({'drop': 1.5}, 'drop 1.5 .*0 to 1'),
        ({'drop': -0.1}, 'drop -0.1 .*0 to 1'),
        ({'drop': math.nan}, 'drop nan '),
        ({'drop': '0.1'}, "drop '0.1' .*0 to 1"),
        ({'init': 'zero'}, "init 'zero' .*'paper', 'gap'"),
        ({'dims': ()}, 'at least one stage'),
        ({'num_classes': 0}, 'num_classes 0 '),
    ],
)
def test_wrong_arguments_raise_naming_the_value_and_what_fits(args, message):
    with pytest.raises(ValueError, match=message):
        CAStream(**{'dims': (8, 8), **args})


def test_a_class_specific_stream_asks_for_labels():
    with pytest.raises(ValueError, match='labels'):
        CAStream((4,), num_classes=3)(feature_maps((4,), dtype=torch.float32))


@pytest.mark.parametrize('count', [1, 3])
def test_another_number_of_feature_maps_than_stages_raises(count):
    with pytest.raises(ValueError):
        CAStream((4, 4))(feature_maps((4,) * count, dtype=torch.float32))


def test_the_mathematics_imports_torch_alone():
    tree = ast.parse(Path(stream.__file__).read_text(encoding='utf-8'))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split('.')[0] for name in imported} <= {'__future__', 'collections', 'torch'}
    assert timm_castream.CAStream is CAStream
