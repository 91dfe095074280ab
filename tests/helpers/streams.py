"""Streams beside small networks, and eq. (10) written out location by location, to hold the project's against."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from timm_castream import pooling

# What the stream must visit, and which layers of the head read the pooled vector.
STAGES = {
    'test_resnet': ('maxpool', 'layer1', 'layer2', 'layer3', 'layer4'),
    'test_convnext': ('stem', 'stages.0', 'stages.1', 'stages.2', 'stages.3'),
    'test_efficientnet': ('blocks.0', 'blocks.1', 'blocks.2', 'blocks.3', 'bn2'),
    'swin': ('layers.0', 'layers.1', 'layers.2', 'norm'),
    'test_vit': ('blocks.0', 'blocks.1', 'blocks.3', 'blocks.4', 'norm'),
}
HEADS = {
    'test_resnet': ('fc',),
    'test_convnext': ('head.norm', 'head.fc'),
    'test_efficientnet': ('classifier',),
    'swin': ('head.fc',),
    'test_vit': ('head',),
}
BACKBONES = tuple(STAGES)
SMALL = ('test_resnet', 'test_convnext')


@contextmanager
def recorded(model: nn.Module, names: tuple[str, ...]) -> Iterator[list[Tensor]]:
    """The outputs of modules, through hooks of the test's own."""
    outputs: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
        for name in names
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def stage_maps(model: nn.Module, name: str, x: Tensor, start: int = 0) -> list[Tensor]:
    """F_start to F_L in float64, (B, D, H, W), of a pass through the plain backbone."""
    with torch.no_grad(), pooling(model, 'gap'), recorded(model, STAGES[name]) as outputs:
        model.forward_features(x)
    if name == 'swin':
        outputs = [out.permute(0, 3, 1, 2) for out in outputs]
    if name == 'test_vit':  # a class token, then patches of 16 x 16 pixels
        outputs = [out[:, 1:].transpose(1, 2).unflatten(2, (x.shape[2] // 16, x.shape[3] // 16)) for out in outputs]
    return [out.double() for out in outputs][start:]


def first_query(model: nn.Module) -> Tensor:
    return model.castream.cls_token.detach().double().expand(2, -1)


def equation_10(stream: nn.Module, maps: list[Tensor], query: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The last query and the attention maps of a stream of one head, location by location, in float64."""
    attentions = []
    for block, stage in zip(stream.blocks, maps, strict=True):
        batch, dim, height, width = stage.shape
        attention = torch.zeros(batch, height, width, dtype=torch.float64)
        pooled = torch.zeros(batch, dim, dtype=torch.float64)
        for b in range(batch):
            locations = [(i, j) for i in range(height) for j in range(width)]
            logits = [float(stage[b, :, i, j] @ query[b]) / math.sqrt(dim) for i, j in locations]
            weights = [math.exp(logit - max(logits)) for logit in logits]
            for (i, j), weight in zip(locations, weights, strict=True):
                attention[b, i, j] = weight / sum(weights)
                pooled[b] += attention[b, i, j] * stage[b, :, i, j]
        attentions.append(attention)
        query = pooled @ block.proj.weight.detach().double().T
        if block.proj.bias is not None:
            query = query + block.proj.bias.detach().double()
    return query, attentions


def apply_head(model: nn.Module, name: str, query: Tensor) -> Tensor:
    vector = query.float()[:, :, None, None] if name == 'test_convnext' else query.float()
    for layer in HEADS[name]:
        vector = model.get_submodule(layer)(vector if layer == 'head.norm' else vector.flatten(1))
    return vector


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that attach, when it fails, and detach must leave as it was."""
    return {
        'class': type(model),
        'state': {key: value.clone() for key, value in model.state_dict().items()},
        'modules': [(name, id(module), module.training) for name, module in model.named_modules()],
        'hooks': [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        'flags': [p.requires_grad for p in model.parameters()],
        'attributes': set(vars(model)),
        'cfg': (copy.deepcopy(model.pretrained_cfg), copy.deepcopy(model.default_cfg)),
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert {k: v for k, v in after.items() if k != 'state'} == {k: v for k, v in before.items() if k != 'state'}
    assert list(after['state']) == list(before['state'])
    for key, value in before['state'].items():
        assert torch.equal(after['state'][key], value), key


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}
