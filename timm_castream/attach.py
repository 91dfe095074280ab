"""Gives a timm model a CA-Stream, takes it off again, and switches between the two poolings.

How a stream runs beside its backbone is in `mixin.py`. Letters: B images, C classes, D channels, H x W locations, l a
stage from 0 to L.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._utils.checks import check_bool, check_names
from .backbones.freezing import freeze
from .backbones.mixin import (
    KEY_PREFIX,
    Attachment,
    CAStreamMixin,
    add_stream,
    castream_model,
    check_class_specific,
    outermost_streams,
    query_of,
    remove_stream,
)
from .backbones.stages import HeadPooling, find_stages
from .backbones.stream_config import StreamConfig, with_stream_arguments
from .backbones.wrappers import class_scores, evaluation_mode, images_inside, in_precision_of, unwrapped
from .hub.load import load_gap_weights
from .stream import CAStream

__all__ = [
    'POOLINGS',
    'attach',
    'attention_maps',
    'class_labels',
    'detach',
    'forward_both',
    'freeze_backbone',
    'pooling',
]

POOLINGS = ('gap', 'ca')

_FLAGS = ('stream_class_specific', 'stream_bias', 'freeze_backbone')

_POOLED_BY = {
    HeadPooling.MAXIMUM: 'maximum',
    HeadPooling.AVERAGE_AND_MAXIMUM: 'average and maximum',
    HeadPooling.CLASS_TOKEN: 'its class token',
    HeadPooling.ALL_TOKENS: 'the average of all tokens',
}

ModelT = TypeVar('ModelT', bound=nn.Module)


def attach(
    model: ModelT,
    *,
    freeze_backbone: bool = False,
    backbone_pretrained: bool | str = False,
    backbone_checkpoint: str | None = None,
    **stream: Any,
) -> ModelT:
    """Gives a timm model a CA-Stream that takes the place of its global pooling. In place.

    Args:
        model: A timm model that averages a feature map or patch tokens, or reads a class token beside patch tokens;
            registered or not.
        stream_start: l of the placement S_l - S_L, 0 to L.
        stream_stages: Names of the modules whose outputs are the stages, in the order in which they run. None: the
            paper's for ResNet (`maxpool`, `layer1` to `layer4`) and ConvNeXt (`stem`, `stages.0` to `stages.3`), timm's
            `feature_info` for others, and five blocks at equal distances where all blocks have one resolution. The last
            stage is always the tensor that the model pools; it is added if you do not name it.
        stream_block: `'ca'`, eq. (6), or `'proj_ca'`, supplementary eq. (1).
        stream_class_specific: One q_0 a class.
        stream_heads: Attention heads, must divide the channels of each stage.
        stream_drop: Dropout rate inside the stream.
        stream_bias: Whether the stream's linear layers have biases.
        stream_init: `'paper'`, or `'gap'`: the logits of the new stream are those of the average pooling. Weight decay
            pulls such a stream away from its start.
        freeze_backbone: Train the stream alone, see `freeze_backbone`.
        backbone_pretrained: Load timm's weights of the backbone first: True for those of its cfg, or a tag.
        backbone_checkpoint: Load this checkpoint of the plain backbone first, classifier included.

    Returns:
        The same model.

    Raises:
        ValueError: If the model takes no stream (`backbones.architectures` has the reasons), has one already, or an
            argument does not fit. The model is then as it was.
    """
    if isinstance(model, CAStreamMixin):
        raise ValueError(
            f'This {type(model).__name__} has a CA-Stream already; call timm_castream.detach(model) first.'
        )
    check_flags({**stream, 'freeze_backbone': freeze_backbone, 'backbone_pretrained': backbone_pretrained})
    config = StreamConfig(**stream)
    backbone: Any = model  # torch types the attributes of a module as tensors or modules
    stages, head = find_stages(backbone, config.stream_stages)
    start = config.stream_start
    if not isinstance(start, int) or isinstance(start, bool) or not 0 <= start < len(stages):
        raise ValueError(
            f'stream_start {start!r} is no stage: {type(model).__name__} has the stages 0 to '
            f'{len(stages) - 1} ({", ".join(stage.name for stage in stages)}).'
        )
    stages = stages[start:]
    if config.stream_init == 'gap' and head not in (HeadPooling.AVERAGE, HeadPooling.NONE):
        raise ValueError(
            f"stream_init 'gap' starts as the average of the locations, and this {type(model).__name__} pools by "
            f"{_POOLED_BY[head]}, valid ones: 'paper'."
        )
    if config.stream_class_specific:
        check_class_specific(backbone.num_classes, head)
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    try:
        castream = CAStream(
            [stage.dim for stage in stages],
            num_classes=backbone.num_classes if config.stream_class_specific else None,
            num_heads=config.stream_heads,
            block=config.stream_block,
            drop=config.stream_drop,
            bias=config.stream_bias,
            init=config.stream_init,
            device=parameter.device,
            dtype=parameter.dtype,
        ).train(model.training)
    except ValueError as error:  # its sentences start with the name of the argument
        raise ValueError(f'stream_{str(error).removeprefix("num_")}') from error
    if backbone_pretrained or backbone_checkpoint:
        load_gap_weights(model, backbone_pretrained, backbone_checkpoint)
    add_stream(model, castream, Attachment(config, stages, head_pools=head is not HeadPooling.NONE))
    if freeze_backbone:
        _freeze(backbone)
    return model


# The arguments of a stream are declared once, by StreamConfig. help() and editors show them all.
attach.__signature__ = with_stream_arguments(attach)  # type: ignore[attr-defined]


def check_flags(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for a string in place of True or False.

    Args:
        arguments: Some of the arguments of `attach`, by name.
    """
    for name in _FLAGS:
        check_bool(name, arguments.get(name, False))
    pretrained = arguments.get('backbone_pretrained')
    if isinstance(pretrained, str) and pretrained.lower() in ('true', 'false'):
        raise ValueError(
            f'backbone_pretrained must be True, False or a tag of weights, got {pretrained!r}: write '
            f'{pretrained.title()}.'
        )


def detach(model: nn.Module) -> nn.Module:
    """Takes the stream off again: class, hooks, `requires_grad` flags and cfg are those of the model before `attach`.

    Raises:
        ValueError: If the model has no stream.
    """
    backbone = castream_model(model)
    remove_stream(backbone)
    return backbone


@contextmanager
def pooling(model: nn.Module, mode: str) -> Iterator[None]:
    """Pools the other way for a while, with the same weights. For the model, not for a thread, as `model.eval()` is.

    Args:
        model: A model with a stream, or a wrapper around one or several.
        mode: `'gap'`, the network's own pooling, or `'ca'`, the stream.

    Raises:
        ValueError: If the mode is unknown or the model has no stream.
    """
    check_names('pooling', (mode,), POOLINGS)
    castream_model(model)  # raises where there is none
    states = [stream._castream for stream in outermost_streams(model)]
    outer = [state.pooling for state in states]
    for state in states:
        state.pooling = mode
    try:
        yield
    finally:
        for state, before in zip(states, outer, strict=True):
            state.pooling = before


def forward_both(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Logits of both poolings from one pass over the backbone, in evaluation mode.

    Args:
        model: A model with a stream. A wrapper with a forward of its own runs it once under each pooling.
        x: (B, 3, H, W), in any precision.

    Returns:
        `{'gap': (B, C), 'ca': (B, C)}`.
    """
    stream, inner = castream_model(model), unwrapped(model)
    x = in_precision_of(stream, x)
    with evaluation_mode(model):
        if inner is stream:
            return both_logits(stream, x)
        logits = {}
        for mode in POOLINGS:
            with pooling(model, mode):
                logits[mode] = class_scores(model(x), len(x), type(inner).__name__)
        return logits


def both_logits(model: CAStreamMixin, x: Tensor) -> dict[str, Tensor]:
    """Logits of both poolings of a model that is in no wrapper, in whatever mode it is."""
    features = model.stream_features(x)
    return {'gap': model.forward_gap_head(features), 'ca': model.forward_ca_head(features, query_of(features))}


def attention_maps(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The stream's attention in every stage that it visits, eq. (6), in evaluation mode: class agnostic saliency.

    Args:
        model: A model with a stream. Of a wrapper with a forward of its own, the images count that it gives to it.
        x: (B, 3, H, W), in any precision.

    Returns:
        One (B, heads, H_l, W_l) a stage, in order; each head of each image sums to 1.
    """
    stream, inner = castream_model(model), unwrapped(model)
    x = in_precision_of(stream, x)
    with evaluation_mode(model):
        if inner is not stream:
            with torch.no_grad():
                x = images_inside(inner, stream, x)
        maps: list[Tensor] = []
        features = stream.stream_features(x, attention=maps)
        last = stream.pooled_stage.to_nchw(features, x.shape[-2:])
        stream.castream.step(-1, query_of(features), last, attention=maps)
    return maps


def freeze_backbone(model: ModelT) -> ModelT:
    """Leaves `castream.*` alone to train. In place; `detach` undoes it.

    Backbone and classifier get no gradients, normalisation layers stay in eval mode under `model.train()`. A classifier
    that `reset_classifier` makes later trains.
    """
    _freeze(castream_model(model))
    return model


@contextmanager
def class_labels(model: nn.Module, target: Tensor) -> Iterator[None]:
    """Gives a class specific stream the labels of the batch, so that each image takes its label's q_0: for training.

    Does nothing to a class agnostic stream. Finds the model inside DistributedDataParallel and torch.compile's wrapper.

    Args:
        model: A model with a stream, wrapped or not.
        target: (B,) class indices.

    Raises:
        ValueError: If the target holds no class indices, as mixup's does, or one out of range.
    """
    model = castream_model(model)
    if not model.castream.class_specific:
        yield
        return
    if target.ndim != 1 or target.is_floating_point():
        raise ValueError(
            'A class specific stream takes its q_0 from (B,) class indices, not from soft targets of '
            f'shape {tuple(target.shape)} and type {target.dtype}: switch mixup and cutmix off '
            '(multi-label data has none).'
        )
    classes = model.castream.cls_token.shape[0]
    if not target.is_cuda and target.numel() and not 0 <= int(target.min()) <= int(target.max()) < classes:
        raise ValueError(
            f'class_labels got labels from {int(target.min())} to {int(target.max())}, the stream has '
            f'{classes} classes.'
        )
    state = model._castream
    outer, state.labels = state.labels, target.long()
    try:
        yield
    finally:
        state.labels = outer


def _freeze(model: CAStreamMixin) -> None:
    state = model._castream
    state.frozen_names = (*state.frozen_names, *freeze(model, KEY_PREFIX))
    state.frozen = True
