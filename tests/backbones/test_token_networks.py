"""A stream beside networks of patch tokens: all that holds for feature maps."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from conftest import sharpen
from networks import TOKEN_NETWORKS, token_network
from torch import Tensor, nn

from timm_castream import attach, attention_maps, class_labels, detach, forward_both, freeze_backbone, pooling
from timm_castream.attribution import attention_identity, attribute_all
from timm_castream.attribution.methods import METHODS

# The smallest vitamin has 21 million parameters, and its class is that of vision_transformer_hybrid.
FAMILIES = [file for file in TOKEN_NETWORKS if file != 'vitamin']

# The order of the tokens, tokens in a tuple, tokens after maps, class tokens that come late, two heads.
VARIED = ('hiera', 'mvitv2', 'tnt', 'efficientformer', 'cait', 'deit')


def sharpened(file: str, **kwargs) -> tuple[nn.Module, Tensor]:
    """A model with a stream whose attention matters, and two images."""
    model, size = token_network(file)
    attach(model, **kwargs)
    return sharpen(model, (3, *size)), torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize('file', FAMILIES)
def test_every_family_keeps_the_contract(file):
    model, x = sharpened(file)
    plain, _ = token_network(file)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('castream.')})
    with torch.no_grad():
        gap, ca = plain(x), model(x)
        both = forward_both(model, x)
        assert torch.equal(both['gap'], gap) and torch.equal(both['ca'], ca)
        assert not torch.allclose(gap, ca, rtol=0.01, atol=0.01)
        with pooling(model, 'gap'):
            assert torch.equal(model(x), gap)
        assert torch.equal(model.forward_head(model.forward_features(x)), ca)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), ca)
        maps = attention_maps(model, x)
        assert len(maps) == len(model.castream_stages) > 2
        for attention in maps:
            ratio = attention.shape[2] / attention.shape[3]
            assert ratio == pytest.approx(x.shape[2] / x.shape[3])
            torch.testing.assert_close(attention.sum((2, 3)), torch.ones(2, 1))
        model.reset_classifier(4)
        assert model(x).shape == (2, 4)
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    model, _ = token_network(file)
    model.load_state_dict(before)
    detach(attach(model))
    assert list(model.state_dict()) == list(before) and type(model) is type(plain)
    with torch.no_grad():
        assert torch.equal(model(x), gap)


@pytest.mark.parametrize('file', FAMILIES)
def test_the_last_query_is_that_of_equation_10_without_prefix_tokens(file):
    model, x = sharpened(file)
    outputs: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda module, args: outputs.append(args[1].detach()))
        for block in model.castream.blocks
    ]
    with torch.no_grad():
        features = model.forward_features(x)
        logits = model.forward_head(features)
        for handle in handles:
            handle.remove()
        query = model.castream.cls_token.expand(2, -1)
        for block, maps in zip(model.castream.blocks, outputs, strict=True):
            locations = maps.flatten(2).transpose(1, 2)
            weights = (locations @ query[:, :, None] / query.shape[1] ** 0.5).softmax(1)
            query = block.proj((weights * locations).sum(1))
        # The head of the plain network reads the query at the patch tokens and at its class token alike.
        everywhere = query.reshape(2, *([1] * (features.ndim - 2)), -1).expand(features.shape)
        torch.testing.assert_close(model.forward_gap_head(everywhere), logits, rtol=1e-3, atol=1e-4)
    prefix = getattr(model, 'num_prefix_tokens', 0) or 0
    assert all(
        maps[0, 0].numel() == attention[0, 0].numel()
        for maps, attention in zip(outputs, attention_maps(model, x), strict=True)
    )
    if file in ('vision_transformer', 'deit', 'eva', 'beit'):
        assert outputs[-1].shape[2] == features.shape[1] - prefix and prefix > 0


@pytest.mark.parametrize(
    'file',
    [
        file
        for file in FAMILIES
        if file
        not in (
            'cait',
            'coat',
            'convit',
            'deit',
            'tnt',
            'vision_transformer',
            'vision_transformer_hybrid',
            'volo',
            'xcit',
        )
    ],
)
@pytest.mark.parametrize('kwargs', [{}, {'stream_start': 2}, {'stream_block': 'proj_ca', 'stream_heads': 2}])
def test_the_gap_initialisation_gives_the_logits_of_gap_where_tokens_are_averaged(file, kwargs):
    model, size = token_network(file)
    attach(model, stream_init='gap', **kwargs)
    with torch.no_grad():
        both = forward_both(model, torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2)))
    assert (both['ca'] - both['gap']).abs().max() <= 1e-5 * both['gap'].abs().max()


@pytest.mark.parametrize('size', [(64, 64), (96, 160), (160, 48)])
def test_a_vit_with_dynamic_img_size_takes_any_size(size):
    model = attach(timm.create_model('test_vit', dynamic_img_size=True).eval())
    x = torch.randn(1, 3, *size)
    assert [attention.shape[2:] for attention in attention_maps(model, x)] == [(size[0] // 16, size[1] // 16)] * 5
    assert attribute_all(model, x, ('grad_cam',))['ca', 'grad_cam'].shape == (1, size[0] // 16, size[1] // 16)


@pytest.mark.slow
@pytest.mark.parametrize('file', ['hiera', 'tnt'])
def test_torch_compile_makes_one_graph_and_export_keeps_the_stream(file):
    model, x = sharpened(file)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(2 * x), model(2 * x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('file', VARIED)
def test_training_moves_the_stream_alone_and_checkpointing_changes_no_gradient(file):
    model, x = sharpened(file, stream_class_specific=True)
    freeze_backbone(model).double().train()
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing()
    for each in (model, checkpointed):
        with class_labels(each, torch.tensor([1, 2])):
            each(x.double().requires_grad_()).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(name.startswith('castream.') for name in gradients)
    assert gradients['castream.cls_token'].abs().sum(1).nonzero().flatten().tolist() == [1, 2]
    for name, parameter in checkpointed.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-8, atol=1e-12, msg=name)


def test_autocast_stays_near_float32():
    model, size = token_network('vision_transformer')
    model = sharpen(attach(model), (3, *size), spread=1.0)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    expected = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        out = model(x)
        maps = attention_maps(model, x)
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()
    assert {attention.dtype for attention in maps} == {torch.float32}


@pytest.mark.parametrize('mode', ['gap', 'ca'])
@pytest.mark.parametrize('file, layer, item', [('vision_transformer', 'blocks.4', None), ('tnt', 'blocks.4', 1)])
def test_grad_cam_reads_the_patch_tokens_before_the_last_block(file, layer, item, mode):
    model, x = sharpened(file)
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output if item is None else output[item])
        outputs[-1].retain_grad()

    handle = model.get_submodule(layer).register_forward_hook(keep)
    with pooling(model, mode):
        model(x)[:, 3].sum().backward()
    handle.remove()
    tokens, gradient = outputs[0][:, 1:].detach(), outputs[0].grad[:, 1:]
    weights = gradient.mean(1, keepdim=True)
    rows, columns = x.shape[2] // 16, x.shape[3] // 16
    cam = (weights * tokens).sum(2).relu().view(2, rows, columns)
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    target = torch.full((2,), 3)
    found = attribute_all(model, x, ('grad_cam',), target, (mode,))[mode, 'grad_cam']
    torch.testing.assert_close(found, (cam - low) / (high - low), rtol=1e-3, atol=1e-3)
    assert found.std() > 0


@pytest.mark.parametrize('file', ['vision_transformer', 'hiera', 'tnt'])
def test_every_method_explains_token_networks_under_both_poolings(file):
    model, x = sharpened(file)
    for (mode, name), maps in attribute_all(model, x, tuple(METHODS)).items():
        assert maps.shape[1] / maps.shape[2] == x.shape[2] / x.shape[3], (mode, name)
        assert maps.isfinite().all() and maps.min() >= 0 and maps.max() <= 1
    identity = attention_identity(model, x)
    torch.testing.assert_close(identity.attention_logits, identity.cam, rtol=1e-3, atol=1e-3)
