"""One forward of a batch for the attributions: feature maps of a layer, logits, attention, and gradients of the head.

The graph is cut at the layer. The forward up to it records nothing, and a backward ends there.

Letters: B images, K targets an image, C classes, D channels and h x w locations of the layer.
"""
from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import hook_target, is_nhwc
from .cam import scale_maps, varies
from .mixin import CAStreamMixin, travelling_query
from .network import Network
from .probabilities import at_least_float32


class Trace:
    """Tensors of one forward of a batch.

    Args:
        network: The network, in evaluation mode.
        x: (B, 3, H, W) images.
        attention: Whether to compute the attention of the pooled stage too.

    Attributes:
        maps: A, (B, D, h, w), output of the network's layer in float32 or wider.
        logits: {pooling: (B, C)}, with a graph that starts at the layer.
        attention: (B, h, w) in [0, 1], the mean over the heads of the attention of the pooled stage, or None.

    Raises:
        ValueError: If the network gives no feature maps or no class scores.
    """

    def __init__(self, network: Network, x: Tensor, attention: bool = False) -> None:
        backbone = network.backbone
        if not network.has_feature_maps:
            raise ValueError(
                f'{network.name} is no timm model: it lacks forward_features or forward_head. Name the module whose '
                'output gives the feature maps with layer=.')
        stream = attention or 'ca' in network.poolings
        module = None if network.layer is None else _submodule(backbone, network.layer)
        images = x.contiguous(memory_format=network.memory_format(x))
        leaves: list[Tensor] = []
        self.attention: Tensor | None = None
        if network.is_timm:
            with torch.no_grad(), _leaf_at(backbone, module, leaves):
                features = _features(backbone, images, stream)
            query = travelling_query(features) if stream else None
            if attention and query is not None:
                self.attention = _attention(backbone, features.detach(), query)
            if module is None:
                _check_maps(features, 'forward_features')
                features = features.detach().requires_grad_()
                leaves.append(features)
            _check_leaves(leaves, network.layer)
            with torch.enable_grad():
                self.logits = {pooling: _head(backbone, features, query, pooling) for pooling in network.poolings}
        else:
            with torch.no_grad(), _leaf_at(backbone, module, leaves):
                self.logits = dict.fromkeys(network.poolings, network.model(images))
            _check_leaves(leaves, network.layer)
        if network.num_classes == 0 or any(value.ndim != 2 for value in self.logits.values()):
            shape = tuple(self.logits[network.poolings[0]].shape)
            raise ValueError(f'{network.name} gives no class scores: its logits have the shape {shape} and its '
                             f'num_classes is {network.num_classes}.')
        self._leaf = leaves[0]
        self._nhwc = is_nhwc(backbone) if module is None else _gives_nhwc(module, leaves[0], x, is_nhwc(backbone))
        self.maps = self._channels_first(self._leaf.detach())

    def gradients(self, pooling: str, targets: Tensor) -> Tensor:
        """Gradients of the logits of (B, K) targets with respect to A, (B, K, D, h, w)."""
        with torch.enable_grad():  # for the gather too
            # Images of a batch do not interact in eval mode, so one backward serves all of them.
            scores = self.logits[pooling].gather(1, targets).sum(0).unbind()
        each = [torch.autograd.grad(score, self._leaf, retain_graph=True)[0] for score in scores]
        return self._channels_first(torch.stack(each, 1))

    def _channels_first(self, value: Tensor) -> Tensor:
        return at_least_float32(value.movedim(-1, -3) if self._nhwc else value)


def _attention(backbone: Any, features: Tensor, query: Tensor) -> Tensor:
    last = backbone.to_nchw(features)
    weights = backbone.castream.blocks[-1].attention(query, last).detach().mean(1)
    return scale_maps(weights.unflatten(1, last.shape[2:]) * varies(last).any(1)[:, None, None])


@contextmanager
def _leaf_at(model: nn.Module, module: nn.Module | None, leaves: list[Tensor]) -> Iterator[None]:
    """Cuts the graph at the output of a module, and records one from there until the caller's gradient mode ends.

    Args:
        model: The model.
        module: One of its modules, or None to do nothing.
        leaves: Receives the output, as a leaf.
    """
    if module is None:
        yield
        return
    thread = threading.get_ident()

    def cut(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if threading.get_ident() != thread:  # another thread's forward of the same model
            return None
        _check_maps(output, type(module).__name__)
        leaf = output.detach().requires_grad_()
        leaves.append(leaf)
        torch.set_grad_enabled(True)
        return leaf.clone()  # the next module may change it in place, which a leaf forbids

    # timm reads the gradient mode when a forward begins to decide whether to checkpoint.
    checkpointed: list[Any] = [part for part in model.modules() if getattr(part, 'grad_checkpointing', False)]
    # This hook runs before the stream's hook on the same module: the gradient through the attention counts.
    handle = hook_target(module).register_forward_hook(cut, prepend=True)
    try:
        for part in checkpointed:
            part.grad_checkpointing = False
        yield
    finally:
        for part in checkpointed:
            part.grad_checkpointing = True
        handle.remove()


def _features(model: Any, x: Tensor, stream: bool) -> Tensor:
    """The pooled tensor. With the stream it carries the query, whatever pooling the model is set to."""
    if not isinstance(model, CAStreamMixin):
        return model.forward_features(x)
    return model.stream_features(x) if stream else super(CAStreamMixin, model).forward_features(x)


def _head(model: Any, features: Tensor, query: Tensor | None, pooling: str) -> Tensor:
    if not isinstance(model, CAStreamMixin):
        return model.forward_head(features)
    if query is None or pooling == 'gap':
        return model.forward_gap_head(features)
    return model.forward_ca_head(features, query)


def _submodule(model: nn.Module, layer: str) -> nn.Module:
    if layer:  # '' would be the model
        try:
            return model.get_submodule(layer)
        except AttributeError:
            pass
    children = ', '.join(name for name, _ in model.named_children())
    raise ValueError(f'layer {layer!r} is no module of {type(model).__name__}; it has {children} and their submodules.')


def _gives_nhwc(module: nn.Module, output: Tensor, x: Tensor, default: bool) -> bool:
    if isinstance(module, nn.Linear):
        return True
    aspect = math.log(x.shape[2] / x.shape[3])
    nchw, nhwc = (abs(math.log(h / w) - aspect) for h, w in (output.shape[2:], output.shape[1:3]))
    return default if nchw == nhwc else nhwc < nchw


def _check_leaves(leaves: Sequence[Tensor], layer: str | None) -> None:
    if len(leaves) != 1:
        raise ValueError(f'layer {layer!r} ran {len(leaves)} times before the pooling: name a module that runs once.')


def _check_maps(maps: Any, source: str) -> None:
    if not isinstance(maps, Tensor) or maps.ndim != 4:
        given = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f'{source} gives {given}, an attribution needs feature maps of 4 dimensions.')
