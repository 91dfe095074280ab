"""Gives a timm model a CA-Stream, takes it off again, and switches between the two poolings.

How a stream runs beside its backbone is in `mixin.py`. Letters: B images, C classes, D channels, H x W locations, l a
stage from 0 to L.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from ._utils.checks import check_bool
from .backbones.freezing import freeze
from .backbones.mixin import (
    KEY_PREFIX,
    Attachment,
    CAStreamMixin,
    add_stream,
    castream_model,
    check_class_specific,
    query_of,
    remove_stream,
)
from .backbones.stages import find_stages, head_pooling
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
    'max': 'maximum',
    'avgmax': 'average and maximum',
    'token': 'its class token',
    'tokens': 'the average of all tokens',
}

ModelT = TypeVar('ModelT', bound=nn.Module)


def attach(
    model: ModelT,
    *,
    stream_start: int = 0,
    stream_stages: Sequence[str] | None = None,
    stream_block: str = 'ca',
    stream_class_specific: bool = False,
    stream_heads: int = 1,
    stream_drop: float = 0.0,
    stream_bias: bool = True,
    stream_init: str = 'paper',
    freeze_backbone: bool = False,
    backbone_pretrained: bool | str = False,
    backbone_checkpoint: str | None = None,
) -> ModelT:
    """Gives a timm model a CA-Stream that takes the place of its global pooling. In place.

    Args:
        model: A timm model that averages a feature map or patch tokens, or reads a class token beside patch tokens;
            registered or not.
        stream_start: l of the placement S_l - S_L, 0 to L.
        stream_stages: Names of the modules whose outputs are the stages, in the order in which they run. None: the
            paper's for ResNet (`maxpool`, `layer1` to `layer4`) and ConvNeXt (`stem`, `stages.0` to `stages.3`), timm's
            `feature_info` for others, and five blocks at equal distances where all blocks have one resolution. The last
            stage is always the tensor that the model pools: the last name stands for it, or it is added where another
            module was named last.
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
    check_flags(
        {
            'stream_class_specific': stream_class_specific,
            'stream_bias': stream_bias,
            'freeze_backbone': freeze_backbone,
            'backbone_pretrained': backbone_pretrained,
        }
    )
    backbone: Any = model  # torch types the attributes of a module as tensors or modules
    stages = find_stages(backbone, stream_stages)
    is_index = isinstance(stream_start, int) and not isinstance(stream_start, bool)
    if not is_index or not 0 <= stream_start < len(stages):
        raise ValueError(
            f'stream_start {stream_start!r} is no stage: {type(model).__name__} has the stages 0 to '
            f'{len(stages) - 1} ({", ".join(stage.name for stage in stages)}).'
        )
    stages = stages[stream_start:]
    head = head_pooling(backbone, stages[-1], backbone.forward_head)
    if stream_init == 'gap' and head not in ('avg', ''):
        raise ValueError(
            f"stream_init 'gap' starts as the average of the locations, and this {type(model).__name__} pools by "
            f"{_POOLED_BY[str(head)]}, valid ones: 'paper'."
        )
    if stream_class_specific:
        check_class_specific(backbone.num_classes, head)
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    try:
        stream = CAStream(
            [stage.dim for stage in stages],
            num_classes=backbone.num_classes if stream_class_specific else None,
            num_heads=stream_heads,
            block=stream_block,
            drop=stream_drop,
            bias=stream_bias,
            init=stream_init,
            device=parameter.device,
            dtype=parameter.dtype,
        ).train(model.training)
    except ValueError as error:  # its sentences start with the name of the argument
        raise ValueError(f'stream_{str(error).removeprefix("num_")}') from error
    if backbone_pretrained or backbone_checkpoint:
        load_gap_weights(model, backbone_pretrained, backbone_checkpoint)

    config = {
        'stream_start': stream_start,
        'stream_stages': None if stream_stages is None else list(stream_stages),
        'stream_block': stream_block,
        'stream_class_specific': stream_class_specific,
        'stream_heads': stream_heads,
        'stream_drop': stream_drop,
        'stream_bias': stream_bias,
        'stream_init': stream_init,
    }
    add_stream(model, stream, Attachment(config, stages, head_pools=head != ''))
    if freeze_backbone:
        _freeze(backbone)
    return model


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
        model: A model with a stream.
        mode: `'gap'`, the network's own pooling, or `'ca'`, the stream.

    Raises:
        ValueError: If the mode is unknown or the model has no stream.
    """
    if mode not in POOLINGS:
        raise ValueError(f'pooling {mode!r} is unknown, valid ones: {", ".join(map(repr, POOLINGS))}.')
    state = castream_model(model)._castream
    outer, state.pooling = state.pooling, mode
    try:
        yield
    finally:
        state.pooling = outer


def forward_both(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Logits of both poolings from one pass over the backbone.

    Args:
        model: A model with a stream.
        x: (B, 3, H, W).

    Returns:
        `{'gap': (B, C), 'ca': (B, C)}`.
    """
    model = castream_model(model)
    features = model.stream_features(x)
    return {'gap': model.forward_gap_head(features), 'ca': model.forward_ca_head(features, query_of(features))}


def attention_maps(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The stream's attention in every stage that it visits, eq. (6): class agnostic saliency.

    Args:
        model: A model with a stream.
        x: (B, 3, H, W).

    Returns:
        One (B, heads, H_l, W_l) a stage, in order; each head of each image sums to 1.
    """
    model = castream_model(model)
    maps: list[Tensor] = []
    features = model.stream_features(x, attention=maps)
    last = model.pooled_stage.to_nchw(features, x.shape[-2:])
    model.castream.step(-1, query_of(features), last, attention=maps)
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
