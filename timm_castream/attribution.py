"""Saliency of a model's class scores: raw attention, Grad-CAM, Grad-CAM++ and Score-CAM, for both poolings.

Meets the model: one forward gives the feature maps of the layer, the logits of both poolings and the attention; `cam`
has the mathematics. Also both sides of the paper's eq. (5).

Letters: B images, K targets an image, C classes, D channels and h x w locations of the layer, H x W pixels.
"""
from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attach import POOLINGS
from .backbone import eval_mode, hook_target, is_nhwc
from .cam import (
    at_least_float32,
    class_activation_map,
    grad_cam_pp_weights,
    grad_cam_weights,
    scale_maps,
    score_cam_weights,
    varies,
)
from .images import check_count, check_images, fast_memory_format, normalisation
from .mixin import CAStreamMixin, castream_model, travelling_query

METHOD_NAMES = {
    'attention': 'Attention', 'grad_cam': 'Grad-CAM', 'grad_cam_pp': 'Grad-CAM++', 'score_cam': 'Score-CAM'}
METHODS = tuple(METHOD_NAMES)
ACTIVATIONS = ('softmax', 'sigmoid')

Target = Tensor | Mapping[str, Tensor | None] | None
Forward = Callable[[Tensor], Mapping[str, Tensor]]


def attribute(
        model: nn.Module,
        x: Tensor,
        method: str,
        target: Target = None,
        pooling: str = 'ca',
        layer: str | None = None,
        batch_size: int | None = None,
        *,
        activation: str = 'softmax',
) -> Tensor:
    """Saliency maps of a batch by one method under one pooling; `attribute_all` explains the arguments.

    Returns:
        (B, h, w) in [0, 1], or (B, K, h, w) for a target of shape (B, K).
    """
    maps = attribute_all(model, x, (method,), target, (pooling,), layer, batch_size, activation=activation)
    return maps[pooling, method]


def attribute_all(
        model: nn.Module,
        x: Tensor,
        methods: Sequence[str] = METHODS,
        target: Target = None,
        poolings: Sequence[str] = POOLINGS,
        layer: str | None = None,
        batch_size: int | None = None,
        *,
        activation: str = 'softmax',
        forward: Forward | None = None,
) -> dict[tuple[str, str], Tensor]:
    """Saliency maps of a batch by several methods under several poolings, sharing what these have in common.

    One forward without a graph serves every method, a backward through the head alone both Grad-CAMs of a pooling,
    and one forward of each masked image Score-CAM of both poolings.

    Args:
        model: A model with a stream, or any timm model under pooling `'gap'`. It runs in eval mode; its modes, its
            gradients and the caller's gradient mode are the same afterwards. In threads set eval mode beforehand.
        x: (B, 3, H, W), normalised as the model's `pretrained_cfg` says.
        methods: Of `METHODS`. The attention is that of the pooled stage, averaged over its heads. It depends on no
            target and is the same map under both poolings.
        target: Class indices to explain: (B,), or (B, K) for several an image; a mapping gives each pooling its own.
            None is the class that the model predicts, under each pooling. Where images have unequally many labels,
            repeat one.
        poolings: Of `'gap'` and `'ca'`.
        layer: Name of the module whose output gives the maps, instead of the tensor that is pooled. The attention
            stays that of the pooled stage. The paper's ConvNeXt rows were made on `stages.3.blocks.{last}.mlp.fc2`.
        batch_size: Masked images forwarded at once; it never shows in the result. By default as many as suit the
            device, `images.default_batch_size`.
        activation: What makes Score-CAM's probabilities: `'softmax'`, or `'sigmoid'` for multi-label models.
        forward: What gives Score-CAM the logits of masked images, {pooling: (N, C)} for (N, 3, H, W), in place of
            the model itself: a compiled `forward_both`, for instance.

    Returns:
        {(pooling, method): maps}, each (B, h, w), or (B, K, h, w) for a target of shape (B, K), in [0, 1], in
        float32 or wider.

    Raises:
        ValueError: If a name is unknown, a shape or a class does not fit, or a stream is needed and there is none.
    """
    check_names('method', methods, METHODS)
    check_names('pooling', poolings, POOLINGS)
    check_names('activation', (activation,), ACTIVATIONS)
    check_images(x)
    if batch_size is not None:
        check_count('batch_size', batch_size)
    network = _network(model, needs_stream='ca' in poolings or 'attention' in methods)

    with eval_mode(network):
        trace = _trace(network, x, poolings, 'attention' in methods, layer)
        targets = {pooling: _class_indices(target, pooling, trace.logits[pooling]) for pooling in poolings}
        maps: dict[tuple[str, str], Tensor] = {}
        for pooling, indices in targets.items():
            if trace.attention is not None:
                maps[pooling, 'attention'] = trace.attention[:, None].expand(-1, indices.shape[1], -1, -1)
            if 'grad_cam' in methods or 'grad_cam_pp' in methods:
                gradients = trace.gradients(pooling, indices)
            if 'grad_cam' in methods:
                maps[pooling, 'grad_cam'] = class_activation_map(trace.maps, grad_cam_weights(gradients))
            if 'grad_cam_pp' in methods:
                weights = grad_cam_pp_weights(trace.maps, gradients)
                maps[pooling, 'grad_cam_pp'] = class_activation_map(trace.maps, weights)
        if 'score_cam' in methods:
            mean, std = normalisation(network, x)
            scores = score_cam_weights(
                forward or (lambda images: _logits(network, images, poolings)),
                x, trace.maps, targets, mean, std, batch_size, activation)
            for pooling, weights in scores.items():
                maps[pooling, 'score_cam'] = class_activation_map(trace.maps, weights)
    one_each = {pooling: getattr(_of_pooling(target, pooling), 'ndim', 1) == 1 for pooling in poolings}
    return {
        (pooling, method): maps[pooling, method][:, 0] if one_each[pooling] else maps[pooling, method]
        for pooling in poolings for method in methods
    }


class Identity(NamedTuple):
    """Both sides of eq. (5), each (B, H_L, W_L)."""

    attention_logits: Tensor
    cam: Tensor


def attention_identity(model: nn.Module, x: Tensor) -> Identity:
    """Both sides of eq. (5) for the pooled stage, calculated apart: attention logits F a, and the CAM sum_k a_k F^k.

    The query q_L is a. Under `stream_block='proj_ca'` the keys take the place of F. Heads are summed: each has its
    own channels.

    Args:
        model: A model with a stream.
        x: (B, 3, H, W), normalised as the model's `pretrained_cfg` says.

    Raises:
        ValueError: If the model has no stream.
    """
    network = castream_model(model)
    with eval_mode(network):
        features = network.stream_features(x)
        query, maps = travelling_query(features), network.to_nchw(features)
        block: Any = network.castream.blocks[-1]
        logits = block.attention_logits(query, maps).sum(1).unflatten(1, maps.shape[2:])
        if block.key is not None:
            maps = block.key(maps.movedim(1, -1)).movedim(-1, 1)
        return Identity(logits, (query[:, :, None, None] * maps).sum(1))


class _Trace:
    """What one forward of a batch leaves for the attributions.

    Args:
        leaf: Output of the layer, in its own layout; gradients end here.
        nhwc: Whether that layout is (B, h, w, D).
        logits: {pooling: (B, C)}, with a graph from `leaf` on.
        attention: (B, H_L, W_L) in [0, 1], or None.

    Attributes:
        maps: The output as A, (B, D, h, w).
    """

    def __init__(self, leaf: Tensor, nhwc: bool, logits: dict[str, Tensor], attention: Tensor | None) -> None:
        self._leaf = leaf
        self._nhwc = nhwc
        self.logits = logits
        self.attention = attention
        self.maps = self._channels_first(leaf.detach())

    def gradients(self, pooling: str, targets: Tensor) -> Tensor:
        """Gradients of the logits of (B, K) targets, (B, K, D, h, w)."""
        with torch.enable_grad():  # for the gather too
            # Images of a batch do not meet in eval mode, so one backward serves them all.
            scores = self.logits[pooling].gather(1, targets).sum(0).unbind()
        each = [torch.autograd.grad(score, self._leaf, retain_graph=True)[0] for score in scores]
        return self._channels_first(torch.stack(each, 1))

    def _channels_first(self, value: Tensor) -> Tensor:
        return at_least_float32(value.movedim(-1, -3) if self._nhwc else value)


def _trace(network: Any, x: Tensor, poolings: Sequence[str], attention: bool, layer: str | None) -> _Trace:
    stream = attention or 'ca' in poolings
    module = None if layer is None else _submodule(network, layer)
    leaves: list[Tensor] = []
    with torch.no_grad(), _leaf_at(network, module, leaves):
        features = _features(network, x.contiguous(memory_format=fast_memory_format(x)), stream)
    query = travelling_query(features) if stream else None
    saliency = None
    if attention:
        last = network.to_nchw(features.detach())
        weights = network.castream.blocks[-1].attention(query, last).detach().mean(1)
        saliency = scale_maps(weights.unflatten(1, last.shape[2:]) * varies(last).any(1)[:, None, None])
    if module is None:
        _check_maps(features, 'forward_features')
        features = features.detach().requires_grad_()
        leaves.append(features)
    if len(leaves) != 1:
        raise ValueError(f'layer {layer!r} ran {len(leaves)} times before the pooling: name a module that runs once.')
    with torch.enable_grad():
        logits = {pooling: _head(network, features, query, pooling) for pooling in poolings}
    if network.num_classes == 0 or any(value.ndim != 2 for value in logits.values()):
        raise ValueError(f'{type(network).__name__} gives no class scores: it has num_classes={network.num_classes} '
                         f'and logits of {tuple(logits[poolings[0]].shape)}.')
    nhwc = is_nhwc(network) if module is None else _gives_nhwc(module, leaves[0], x, is_nhwc(network))
    return _Trace(leaves[0], nhwc, logits, saliency)


@contextmanager
def _leaf_at(network: nn.Module, module: nn.Module | None, leaves: list[Tensor]) -> Iterator[None]:
    """Cuts the graph at a module's output and records one from there on, until the caller's gradient mode ends.

    Args:
        network: The model.
        module: One of its modules, or None to do nothing.
        leaves: Gets the output, as a leaf.
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
        return leaf.clone()  # which the next module may change in place, unlike a leaf

    # Checkpointing asks for the gradient mode when a forward begins.
    checkpointed: list[Any] = [part for part in network.modules() if getattr(part, 'grad_checkpointing', False)]
    # Before the stream's hook on the same module: the gradient through the stream's attention counts.
    handle = hook_target(module).register_forward_hook(cut, prepend=True)
    try:
        for part in checkpointed:
            part.grad_checkpointing = False
        yield
    finally:
        for part in checkpointed:
            part.grad_checkpointing = True
        handle.remove()


def _features(network: Any, x: Tensor, stream: bool) -> Tensor:
    """The pooled map; with the stream, whatever pooling the model is set to, it carries the query."""
    if not isinstance(network, CAStreamMixin):
        return network.forward_features(x)
    return network.stream_features(x) if stream else super(CAStreamMixin, network).forward_features(x)


def _head(network: Any, features: Tensor, query: Tensor | None, pooling: str) -> Tensor:
    if not isinstance(network, CAStreamMixin):
        return network.forward_head(features)
    if query is None or pooling == 'gap':
        return network.forward_gap_head(features)
    return network.forward_ca_head(features, query)


def _logits(network: nn.Module, x: Tensor, poolings: Sequence[str]) -> dict[str, Tensor]:
    """Logits of these poolings, (B, C) each, from one pass over the backbone."""
    stream = 'ca' in poolings
    features = _features(network, x, stream)
    query = travelling_query(features) if stream else None
    return {pooling: _head(network, features, query, pooling) for pooling in poolings}


def _network(model: nn.Module, needs_stream: bool) -> nn.Module:
    """The model inside its wrappers."""
    if needs_stream or any(isinstance(module, CAStreamMixin) for module in model.modules()):
        return castream_model(model)
    if not all(hasattr(model, name) for name in ('forward_features', 'forward_head', 'num_classes')):
        raise ValueError(f'{type(model).__name__} is no timm model: it lacks forward_features or forward_head.')
    return model


def _submodule(network: nn.Module, layer: str) -> nn.Module:
    if layer:  # '' would be the network
        try:
            return network.get_submodule(layer)
        except AttributeError:
            pass
    children = ', '.join(name for name, _ in network.named_children())
    raise ValueError(f'layer {layer!r} is no module of {type(network).__name__}; it has {children} and theirs.')


def _gives_nhwc(module: nn.Module, output: Tensor, x: Tensor, default: bool) -> bool:
    """Whether a layer's output is (B, h, w, D), which may differ inside a backbone: ConvNeXt's Linears have NHWC."""
    if isinstance(module, nn.Linear):
        return True
    aspect = math.log(x.shape[2] / x.shape[3])
    nchw, nhwc = (abs(math.log(h / w) - aspect) for h, w in (output.shape[2:], output.shape[1:3]))
    return default if nchw == nhwc else nhwc < nchw


def _of_pooling(target: Target, pooling: str) -> Tensor | None:
    if not isinstance(target, Mapping):
        return target
    if pooling not in target:
        raise ValueError(f'target has no classes for pooling {pooling!r}, only for {", ".join(map(repr, target))}.')
    return target[pooling]


def _class_indices(target: Target, pooling: str, logits: Tensor) -> Tensor:
    """The (B, K) classes to explain under a pooling."""
    target = _of_pooling(target, pooling)
    batch, classes = logits.shape
    if target is None:
        return logits.argmax(1, keepdim=True)
    if not isinstance(target, Tensor) or target.ndim not in (1, 2) or len(target) != batch or not target.numel():
        given = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f'target must be a tensor of shape ({batch},) or ({batch}, K), a row an image, got {given}.')
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f'target must hold class indices, got {target.dtype}.')
    if not 0 <= int(target.min()) <= int(target.max()) < classes:
        raise ValueError(f'target has classes from {int(target.min())} to {int(target.max())}, the model has 0 to '
                         f'{classes - 1}.')
    return target.to(logits.device, torch.int64).reshape(batch, -1)


def check_names(kind: str, names: Sequence[str], valid: Sequence[str]) -> None:
    """Raises ValueError unless there are names and all are valid."""
    if isinstance(names, str) or not names:
        raise ValueError(f'{kind}s must be a sequence of names, got {names!r}.')
    for name in names:
        if name not in valid:
            raise ValueError(f'{kind} {name!r} is unknown, valid ones: {", ".join(map(repr, valid))}.')


def _check_maps(maps: Any, source: str) -> None:
    if not isinstance(maps, Tensor) or maps.ndim != 4:
        given = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f'{source} gives {given}, an attribution needs feature maps of 4 dimensions.')
