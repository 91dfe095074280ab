"""Saliency maps of a network's class scores, for both poolings, and both sides of the paper's eq. (5).

`methods` has the table of methods. Letters: B images, K targets an image, C classes, h x w locations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .._utils.checks import check_class_indices
from ..backbones.mixin import castream_model, query_of
from ..inference.images import check_images
from ..inference.predictor import Predictor, Score, has_stream
from .methods import METHODS, PAPER_METHODS, Batch, Method
from .user_methods import UserMethod, resolve_methods

__all__ = ['METHODS', 'Identity', 'attention_identity', 'attribute', 'attribute_all']

Classes = Tensor | int | Sequence[int] | np.ndarray | None
Target = Classes | Mapping[str, Classes] | Score


def attribute(
    model: nn.Module,
    x: Tensor,
    method: str,
    target: Target = None,
    pooling: str | None = None,
    layer: str | None = None,
    batch_size: int | None = None,
    *,
    activation: str = 'softmax',
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Saliency maps of a batch by one method under one pooling.

    Args:
        model, x, target, layer, batch_size, activation, seed, mean, std: As for `attribute_all`.
        method: A name of `METHODS`.
        pooling: `'gap'` or `'ca'`. None: `'ca'` for a model with a stream, `'gap'` for others.

    Returns:
        (B, h, w) in [0, 1], or (B, K, h, w) for a target of shape (B, K).

    Raises:
        ValueError: As `attribute_all`.
    """
    if pooling is None:
        pooling = 'ca' if has_stream(model) else 'gap'
    maps = attribute_all(
        model, x, (method,), target, (pooling,), layer, batch_size, activation=activation, seed=seed, mean=mean, std=std
    )
    return maps[pooling, method]


def attribute_all(
    model: nn.Module,
    x: Tensor,
    methods: Sequence[str] | Mapping[str, UserMethod] = PAPER_METHODS,
    target: Target = None,
    poolings: Sequence[str] | None = None,
    layer: str | None = None,
    batch_size: int | None = None,
    *,
    activation: str = 'softmax',
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict[tuple[str, str], Tensor]:
    """Saliency maps of a batch by several methods under several poolings, with shared forwards and backwards.

    One forward without a graph serves every method. One backward through the head serves all gradient methods of a
    pooling. One forward of each masked image serves Score-CAM of both poolings.

    Args:
        model: A model with a stream, or under pooling `'gap'` any timm model, or any module that gives class scores: a
            tensor (B, C), or one under `.logits` or `['logits']`, or the first of a tuple. A wrapper around a model
            with a stream is explained by its own forward. It runs in eval mode. Its modes, its gradients and the caller's gradient mode are the same afterwards. With
            several threads set eval mode beforehand.
        x: (B, 3, H, W), normalised as the model's `pretrained_cfg` says.
        methods: Names of `METHODS`, or a mapping from a label to a method as in `evaluate.evaluate`. The attention is
            that of the pooled stage, averaged over its heads. It depends on no target and is the same map under both
            poolings.
        target: Class indices to explain: (B,), or (B, K) for several an image, or one for all images, as a tensor, a
            number, a list or an array; a mapping gives each pooling its own. None: the class that the model predicts,
            under each pooling. A function gets the output for one image, (C,), and gives the number to explain: a
            regression, a sigmoid, the similarity of an embedding. Score-CAM weighs by its values as they are. Where
            images have unequally many labels,
            repeat one.
        poolings: Of `'gap'` and `'ca'`. None: both for a model with a stream, `'gap'` for others.
        layer: Name of the module whose output gives the maps, instead of the tensor that is pooled. The attention
            stays that of the pooled stage. The paper's ConvNeXt rows were made on `stages.3.blocks.{last}.mlp.fc2`.
        batch_size: Masked images forwarded at once; it never shows in the result. None: `images.default_batch_size`.
        activation: Function that makes Score-CAM's probabilities: `'softmax'`, or `'sigmoid'` for multi-label models.
        seed: Seed of the method `random`.
        mean, std: Normalisation of the images, one number a channel, for a model without `pretrained_cfg`.

    Returns:
        {(pooling, method): maps}, each (B, h, w), or (B, K, h, w) for a target of shape (B, K), in [0, 1], in
        float32 or wider. A map is zero where it would be constant, and NaN where the network gives NaN.

    Raises:
        ValueError: If a name is unknown, a shape or a class does not fit, or a stream is needed and there is none.
    """
    rows = resolve_methods(methods)
    check_images(x)
    score, target = (target, None) if callable(target) else (None, target)
    predictor = Predictor(
        model, poolings, layer=layer, activation=activation, batch_size=batch_size, mean=mean, std=std, score=score
    )
    predictor.check_channels(x)
    with predictor.evaluating():
        maps = saliency_maps(predictor, x, rows, target, seed=seed)
    one_each = {p: np.ndim(_of_pooling(target, p)) < 2 for p in predictor.poolings}  # type: ignore[arg-type]
    return {(p, name): value[:, 0] if one_each[p] else value for (p, name), value in maps.items()}


def saliency_maps(
    predictor: Predictor,
    x: Tensor,
    methods: Sequence[Method],
    target: Target = None,
    indices: Tensor | None = None,
    seed: int = 0,
) -> dict[tuple[str, str], Tensor]:
    """Maps of a batch by every method under every pooling of a network that is in evaluation mode.

    Args:
        predictor: The network.
        x: (B, 3, H, W) normalised images.
        methods: Rows of the table.
        target: As for `attribute_all`.
        indices: (B,) positions of the images in their data set. None: 0 to B - 1.
        seed: Seed of the method `random`.

    Returns:
        {(pooling, method): (B, K, h, w)} in [0, 1]. K is 1 for a target of shape (B,).

    Raises:
        ValueError: As `attribute_all`.
    """
    return explain(Batch(predictor, x, methods, indices, seed), target)


def explain(batch: Batch, target: Target = None) -> dict[tuple[str, str], Tensor]:
    """`saliency_maps` of a batch whose forward others may share."""
    if any('stream' in method.needs for method in batch.methods):
        castream_model(batch.predictor.model)
    poolings = batch.predictor.poolings
    for pooling in poolings:
        of_pooling = _of_pooling(target, pooling)
        if of_pooling is None:
            batch.targets[pooling] = batch.logits[pooling].argmax(1, keepdim=True)
        else:
            classes = _class_indices(of_pooling, len(batch.x), batch.predictor.num_classes)
            batch.targets[pooling] = classes.to(batch.x.device)
    return {(p, method.name): method.saliency(batch, p) for method in batch.methods for p in poolings}


class Identity(NamedTuple):
    """Both sides of eq. (5), each (B, H_L, W_L)."""

    attention_logits: Tensor
    cam: Tensor


def attention_identity(model: nn.Module, x: Tensor) -> Identity:
    """Both sides of eq. (5) for the pooled stage, computed apart: attention logits F a, and the CAM sum_k a_k F^k.

    The query q_L is a. Under `stream_block='proj_ca'` the keys take the place of F. Heads are summed: each has its
    own channels.

    Args:
        model: A model with a stream.
        x: (B, 3, H, W), normalised as the model's `pretrained_cfg` says.

    Raises:
        ValueError: If the model has no stream.
    """
    predictor = Predictor(model, ('ca',))
    with predictor.evaluating():
        backbone = predictor.backbone
        features = backbone.stream_features(x)
        query, maps = query_of(features), backbone.pooled_stage.to_nchw(features, x.shape[-2:])
        block: Any = backbone.castream.blocks[-1]
        logits = block.attention_logits(query, maps).sum(1).unflatten(1, maps.shape[2:])
        return Identity(logits, (query[:, :, None, None] * block.keys(maps)).sum(1))


def _of_pooling(target: Target, pooling: str) -> Classes:
    if not isinstance(target, Mapping):
        return target  # type: ignore[return-value]  # a function is in the predictor
    if pooling not in target:
        raise ValueError(f'target has no classes for pooling {pooling!r}, only for {", ".join(map(repr, target))}.')
    return target[pooling]


def _class_indices(target: Any, batch: int, num_classes: int | None) -> Tensor:
    """The (B, K) classes to explain under a pooling."""
    if isinstance(target, (int, np.integer)) and not isinstance(target, bool):
        target = torch.full((batch,), int(target))
    elif isinstance(target, (list, tuple, np.ndarray)):
        with suppress(TypeError, ValueError, RuntimeError):  # the check below names what it is
            target = torch.as_tensor(target)
    if not isinstance(target, Tensor) or target.ndim not in (1, 2) or len(target) != batch or not target.numel():
        given = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f'target must be a tensor of shape ({batch},) or ({batch}, K), a row an image, got {given}.')
    check_class_indices('target', target, num_classes)
    # A copy: labels made under inference_mode cannot be saved for a backward.
    return target.to(torch.int64, copy=True).reshape(batch, -1)
