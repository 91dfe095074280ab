"""One forward of a batch for the attributions: feature maps of a layer, logits, attention, and gradients of the head.

The graph is cut at the layer. The forward up to it records nothing, and a backward ends there.

Letters: B images, K targets an image, C classes, D channels and h x w locations of the layer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.layout import ImageSize, Stage
from ..backbones.mixin import CAStreamMixin, carry_query, query_of
from ..backbones.probe import hook_target
from ..backbones.wrappers import eager, in_precision_of, inputs_of, only_images
from ..inference.predictor import Predictor
from ..inference.probabilities import at_least_float32
from .cam import is_not_constant, scale_maps


class Activations:
    """Tensors of one forward of a batch.

    Args:
        predictor: The network, in evaluation mode.
        x: (B, 3, H, W) images.
        attention: Whether to compute the attention of the pooled stage too.

    Attributes:
        feature_maps: A, (B, D, h, w), output of the network's layer in float32 or wider.
        logits: {pooling: (B, C)}, with a graph that starts at the layer.
        attention: (B, h, w) in [0, 1], the mean over the heads of the attention of the pooled stage, or None.

    Raises:
        ValueError: If the network gives no feature maps or no class scores.
    """

    def __init__(self, predictor: Predictor, x: Tensor, attention: bool = False) -> None:
        if not predictor.has_feature_maps:
            raise ValueError(
                f'{predictor.name} is no timm model: it lacks forward_features or forward_head. Name the module whose '
                'output gives the feature maps with layer=.'
            )
        self._network = predictor
        self._stage = predictor.stage
        self._image_size = x.shape[-2:]
        self.attention: Tensor | None = None
        self._leaves: dict[str, Tensor] = {}
        images = in_precision_of(predictor.inner, x).contiguous(memory_format=predictor.memory_format(x))
        with eager():
            scores = (self._run_halves if predictor.halves_are_forward else self._run_whole)(images, attention)
        if predictor.num_classes == 0:
            raise ValueError(f'{predictor.name} gives no class scores: its num_classes is 0.')
        self._one_logit = any(predictor.is_one_logit(value) for value in scores.values())
        with predictor.recording():
            self.logits = {pooling: predictor.as_classes(value) for pooling, value in scores.items()}
        self.feature_maps = self._nchw(self._leaves[predictor.poolings[0]].detach())

    def _run_halves(self, images: Tensor, attention: bool) -> dict[str, Tensor]:
        """One pass over the backbone, and its head once under each pooling: the class scores, {pooling: (B, C)}."""
        predictor, backbone = self._network, self._network.backbone
        hooked = None if predictor.cam_layer is None else self._stage
        stream = attention or 'ca' in predictor.poolings
        leaves: list[Tensor] = []
        # Half a batch needs less memory, by about what ONNX Runtime takes. A graph that is cut inside needs the whole batch.
        size = max(1, predictor.batch_size(images) // 2) if hooked is None else len(images)
        with torch.no_grad(), _leaf_at(backbone, hooked, leaves, predictor.has_graph):
            parts = [_features(backbone, part, stream) for part in images.split(size)]
        features = _joined(parts)
        query = _joined([query_of(part) for part in parts]) if stream else None
        if attention and query is not None:
            self.attention = _attention(backbone, features.detach(), query, self._image_size)
        if hooked is None:
            features = features.detach().requires_grad_()
            leaves.append(features)
        self._leaves = dict.fromkeys(predictor.poolings, leaves[0])
        with predictor.recording():
            outputs = {pooling: _head(backbone, features, query, pooling) for pooling in predictor.poolings}
            return {pooling: predictor.scores_in(output, len(images)) for pooling, output in outputs.items()}

    def _run_whole(self, images: Tensor, attention: bool) -> dict[str, Tensor]:
        """The model's own forward once under each pooling: the class scores, {pooling: (B, C)}."""
        predictor, backbone = self._network, self._network.backbone
        scores, inside = {}, images
        owner = backbone if predictor.cam_layer is None else predictor.owner_of(predictor.cam_layer)
        for pooling in predictor.poolings:
            leaves: list[Tensor] = []
            if predictor.cam_layer is None:
                cut = _leaf_before_head(owner, leaves, predictor.has_graph)
            else:
                cut = _leaf_at(owner, self._stage, leaves, predictor.has_graph)
            with predictor.pooled_by(pooling), torch.no_grad(), inputs_of(backbone) as seen, cut:
                output = predictor.model(images)
                with predictor.recording():
                    scores[pooling] = predictor.scores_in(output, len(images))
            if len(leaves) != 1:
                where = f'runs {predictor.cam_layer!r}' if predictor.cam_layer else 'calls its forward_head'
                raise ValueError(
                    f'{predictor.name} {where} {len(leaves)} times in a forward, and not once: name another module with '
                    'layer=.'
                )
            self._leaves[pooling] = leaves[0]
        if backbone is not predictor.inner:  # a wrapper may resize the images
            inside = only_images(seen, len(images), predictor.inner, backbone)
            self._image_size = inside.shape[-2:]
        if attention:
            with torch.no_grad():
                features = _features(backbone, inside, stream=True)
                self.attention = _attention(backbone, features, query_of(features), self._image_size)
        return scores

    def gradients(self, pooling: str, targets: Tensor) -> Tensor:
        """Gradients of the logits of (B, K) targets with respect to A, (B, K, D, h, w).

        Raises:
            ValueError: If no gradient of the class scores reaches A.
        """
        if not self._network.has_graph:
            raise ValueError(
                f'The weights of {self._network.name} were made under torch.inference_mode(), so no gradient passes '
                'through them: create and load the model outside of it.'
            )
        leaf = self._leaves[pooling]
        with torch.enable_grad():  # for the gather too
            # Images of a batch do not interact in eval mode, so one backward serves all of them.
            scores = self.logits[pooling].gather(1, targets).sum(0).unbind()
        each = [self._gradient(score, leaf) for score in scores]
        # The gradient of half a logit, see Predictor.as_classes.
        gradients = torch.stack([self._nchw(gradient) for gradient in each], 1) * (2 if self._one_logit else 1)
        if not gradients.any():
            self._network.check_gradients()
        return gradients

    def _gradient(self, score: Tensor, leaf: Tensor) -> Tensor:
        if score.requires_grad:
            (gradient,) = torch.autograd.grad(score, leaf, retain_graph=True, allow_unused=True)
            if gradient is not None:
                return gradient
        raise ValueError(
            f'No gradient of the class scores of {self._network.name} reaches {self._stage.name!r}: a module behind it, '
            'for example a quantised one, stops gradients. Methods without gradients such as score_cam work.'
        )

    def _nchw(self, tensor: Tensor) -> Tensor:
        return at_least_float32(self._stage.to_nchw(tensor, self._image_size))


def _attention(backbone: Any, features: Tensor, query: Tensor, image_size: ImageSize) -> Tensor:
    last = backbone.pooled_stage.to_nchw(features, image_size)
    maps: list[Tensor] = []
    backbone.castream.step(-1, query, last, attention=maps)
    return scale_maps(maps[0].detach().mean(1) * is_not_constant(last).any(1)[:, None, None])


@contextmanager
def _leaf_at(model: nn.Module, stage: Stage | None, leaves: list[Tensor], record: bool) -> Iterator[None]:
    """Cuts the graph at the output of a module, and records one from there until the caller's gradient mode ends.

    Args:
        model: The model.
        stage: The stage of one of its modules, or None to do nothing.
        leaves: Receives the feature map in the output, as a leaf.
        record: False where weights allow no graph.
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
        torch.set_grad_enabled(record)
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


@contextmanager
def _leaf_before_head(model: Any, leaves: list[Tensor], record: bool) -> Iterator[None]:
    """Cuts the graph at the tensor that a timm model gives to its head, and records one from there, as `_leaf_at`."""
    thread, own = threading.get_ident(), model.forward_head

    def forward_head(features: Tensor, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return own(features, *args, **kwargs)
        leaf = features.detach().requires_grad_()
        leaves.append(leaf)
        torch.set_grad_enabled(record)
        return own(carry_query(features, leaf.clone()), *args, **kwargs)

    model.forward_head = forward_head
    try:
        yield
    finally:
        del model.forward_head


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts of a batch as one. A single one keeps its graph, in every gradient mode."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


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
