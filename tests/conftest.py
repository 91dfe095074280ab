"""Small models, with weights under which a stream's attention matters."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_castream

SWIN = 'swin_tiny_patch4_window7_224'
SWIN_ARGS = {
    'embed_dim': 8,
    'depths': (1, 1, 1, 1),
    'num_heads': (1, 1, 2, 2),
    'img_size': 64,
    'window_size': 2,
    'drop_path_rate': 0.0,
}


@torch.no_grad()
def sharpen(model: nn.Module, size: tuple[int, int, int] = (3, 64, 64), spread: float = 3.0) -> nn.Module:
    """Scales q_0 and every W_l until a block's attention logits spread by `spread`; moves normalisation off its start.

    Freshly drawn streams attend almost uniformly and their logits hardly depend on q_0, ResNet's residual branches
    start at zero and ConvNeXt's at 1e-6: tests on them pass whatever the code does.

    Args:
        model: A model with a stream.
        size: (3, H, W) of an image that it takes.
        spread: Standard deviation over the locations, of `attention_logits / sqrt(D)`.

    Returns:
        The same model.
    """
    generator = torch.Generator().manual_seed(1)

    def draw(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))

    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)):
            draw(module.weight, 0.5, 1.5)
            draw(module.bias, -0.3, 0.3)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            draw(module.running_mean, -0.2, 0.2)
            draw(module.running_var, 0.5, 1.5)
        draw(getattr(module, 'gamma', None), 0.5, 1.5)

    blocks = model.castream.blocks
    sources = [[model.castream.cls_token], *([block.proj.weight, block.proj.bias] for block in blocks)]

    def scale(block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        query, features, *rest = args
        logits = block.attention_logits(query, features) * block.scale
        factor = spread / logits.std(-1).mean()
        for parameter in sources[list(blocks).index(block)]:
            if parameter is not None:
                parameter.mul_(factor)
        return (query * factor, features, *rest)

    handles = [block.register_forward_pre_hook(scale) for block in blocks]
    training = model.training
    model.eval()
    model(torch.randn(4, *size, generator=generator))
    model.train(training)
    for handle in handles:
        handle.remove()
    return model


def make_backbone(name: str, num_classes: int = 10, **kwargs: Any) -> nn.Module:
    """A plain timm model in eval mode, the same at every call; 'swin' is a tiny one, the ViTs take 64 pixels."""
    torch.manual_seed(0)
    if name == 'swin':
        name, kwargs = SWIN, {**SWIN_ARGS, **kwargs}
    if name in ('test_vit', 'test_vit2'):
        kwargs = {'img_size': 64, **kwargs}
    return timm.create_model(name, num_classes=num_classes, **kwargs).eval()


def free_port() -> int:
    """A port that no server uses.

    Gradio takes the first free one from 7860, and two processes of tests may take the same at the same time.
    """
    with socket.create_server(('127.0.0.1', 0)) as server:
        port: int = server.getsockname()[1]
    return port


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    """A factory of sharpened models in eval mode: of the backbone's name, its arguments, and those of `attach`."""

    def make(name: str, backbone: dict[str, Any] | None = None, side: int = 64, **kwargs: Any) -> nn.Module:
        backbone = backbone or {}
        model = timm_castream.attach(make_backbone(name, **backbone), **kwargs)
        return sharpen(model, (backbone.get('in_chans', 3), side, side))

    return make


@pytest.fixture
def x() -> Tensor:
    """(2, 3, 64, 64)."""
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
