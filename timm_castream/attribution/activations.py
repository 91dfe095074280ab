"""One forward of a batch for the attributions: feature maps of a layer, logits, attention, and gradients of the head.

The graph is cut at the layer. The forward up to it records nothing, and a backward ends there.

Letters: B images, K targets an image, C classes, D channels and h x w locations of the layer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.layout import ImageSize, Stage
from ..backbones.mixin import CAStreamMixin, query_of
from ..backbones.probe import hook_target
from ..inference.predictor import Predictor
from ..inference.probabilities import at_least_float32
from .cam import is_not_constant, scale_maps


class Activations:
    """Tensors of one forward of a batch.

    Args:
        network: The network, in evaluation mode.
        x: (B, 3, H, W) images.
        attention: Whether to compute the attention of the pooled stage too.

    Attributes:
        feature_maps: A, (B, D, h, w), output of the network's layer in float32 or wider.
        logits: {pooling: (B, C)}, with a graph that starts at the layer.
        attention: (B, h, w) in [0, 1], the mean over the heads of the attention of the pooled stage, or None.

    Raises:
        ValueError: If the network gives no feature maps or no class scores.
    """

    def __init__(self, network: Predictor, x: Tensor, attention: bool = False) -> None:
        backbone = network.backbone
        if not network.has_feature_maps:
            raise ValueError(
                f'{network.name} is no timm model: it lacks forward_features or forward_head. Name the module whose '
                'output gives the feature maps with layer=.'
            )
        stream = attention or 'ca' in network.poolings
        self._stage = network.stage
        self._image_size = x.shape[-2:]
        hooked = None if network.cam_layer is None else self._stage
        images = x.contiguous(memory_format=network.memory_format(x))
        leaves: list[Tensor] = []
        self.attention: Tensor | None = None
        if network.is_timm:
            with torch.no_grad(), _leaf_at(backbone, hooked, leaves):
                features = _features(backbone, images, stream)
            query = query_of(features) if stream else None
            if attention and query is not None:
                self.attention = _attention(backbone, features.detach(), query, self._image_size)
            if hooked is None:
                features = features.detach().requires_grad_()
                leaves.append(features)
            with torch.enable_grad():
                self.logits = {pooling: _head(backbone, features, query, pooling) for pooling in network.poolings}
        else:
            with torch.no_grad(), _leaf_at(backbone, hooked, leaves):
                self.logits = dict.fromkeys(network.poolings, network.model(images))
        if network.num_classes == 0 or any(value.ndim != 2 for value in self.logits.values()):
            shape = tuple(self.logits[network.poolings[0]].shape)
            raise ValueError(
                f'{network.name} gives no class scores: its logits have the shape {shape} and its '
                f'num_classes is {network.num_classes}.'
            )
        self._leaf = leaves[0]
        self.feature_maps = self._view(self._leaf.detach())

    def gradients(self, pooling: str, targets: Tensor) -> Tensor:
        """Gradients of the logits of (B, K) targets with respect to A, (B, K, D, h, w)."""
        with torch.enable_grad():  # for the gather too
            # Images of a batch do not interact in eval mode, so one backward serves all of them.
            scores = self.logits[pooling].gather(1, targets).sum(0).unbind()
        each = [torch.autograd.grad(score, self._leaf, retain_graph=True)[0] for score in scores]
        return torch.stack([self._view(gradient) for gradient in each], 1)

    def _view(self, tensor: Tensor) -> Tensor:
        return at_least_float32(self._stage.to_nchw(tensor, self._image_size))


def _attention(backbone: Any, features: Tensor, query: Tensor, image_size: ImageSize) -> Tensor:
    last = backbone.pooled_stage.to_nchw(features, image_size)
    maps: list[Tensor] = []
    backbone.castream.step(-1, query, last, attention=maps)
    return scale_maps(maps[0].detach().mean(1) * is_not_constant(last).any(1)[:, None, None])


@contextmanager
def _leaf_at(model: nn.Module, stage: Stage | None, leaves: list[Tensor]) -> Iterator[None]:
    """Cuts the graph at the output of a module, and records one from there until the caller's gradient mode ends.

    Args:
        model: The model.
        stage: The stage of one of its modules, or None to do nothing.
        leaves: Receives the feature map in the output, as a leaf.
    """
    if stage is None:
        yield
        return
    thread = threading.get_ident()

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != thread:  # another thread's forward of the same model
            return None
        leaf = stage.tensor(output).detach().requires_grad_()
        leaves.append(leaf)
        torch.set_grad_enabled(True)
        return stage.with_features(output, leaf.clone())  # the next module may change it in place, which a leaf forbids

    # timm reads the gradient mode when a forward begins to decide whether to checkpoint.
    checkpointed: list[Any] = [part for part in model.modules() if getattr(part, 'grad_checkpointing', False)]
    # This hook runs before the stream's hook on the same module: the gradient through the attention counts.
    handle = hook_target(model.get_submodule(stage.name)).register_forward_hook(cut, prepend=True)
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
    return model.stream_features(x) if stream else model.gap_features(x)


def _head(model: Any, features: Tensor, query: Tensor | None, pooling: str) -> Tensor:
    if not isinstance(model, CAStreamMixin):
        return model.forward_head(features)
    if query is None or pooling == 'gap':
        return model.forward_gap_head(features)
    return model.forward_ca_head(features, query)
