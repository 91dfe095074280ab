"""Registered CA-Stream variants: `<backbone>_castream` for every backbone of `BACKBONES`.

Their pretrained cfgs are read from `hf_configs/`, one JSON a variant.
"""
from __future__ import annotations

import inspect
import sys
import warnings
from dataclasses import replace
from typing import Any

from timm.models import generate_default_cfgs, model_entrypoint, register_model, resolve_pretrained_cfg
from torch import nn

from . import hub
from .attach import attach
from .backbone import pretrained_name
from .weights import read_timm_weights

# Backbone and the tag of the GAP weights beside which its stream is trained.
BACKBONES = {
    'resnet18': 'tv_in1k',
    'resnet34': 'tv_in1k',
    'resnet50': 'tv_in1k',
    'resnet101': 'tv_in1k',
    'resnet152': 'tv_in1k',
    'resnext50_32x4d': 'tv_in1k',
    'resnext101_32x8d': 'tv_in1k',
    'wide_resnet50_2': 'tv_in1k',
    'wide_resnet101_2': 'tv_in1k',
    'convnext_tiny': 'fb_in1k',
    'convnext_small': 'fb_in1k',
    'convnext_base': 'fb_in1k',
    'convnext_large': 'fb_in1k',
    'test_resnet': 'r160_in1k',
    'test_convnext': 'r160_in1k',
}

_ATTACH_ARGS = inspect.signature(attach).parameters.keys() - {'model'}
# What a pretrained cfg says of the images: with other GAP weights it is theirs.
_DATA_FIELDS = (
    'input_size', 'test_input_size', 'interpolation', 'crop_pct', 'test_crop_pct', 'crop_mode', 'mean', 'std')
_NOT_SAVED = ('device', 'dtype', 'pretrained_model_args')

default_cfgs = generate_default_cfgs(dict(hub.read_configs()))


def _create_castream(
        variant: str,
        pretrained: bool = False,
        pretrained_cfg: str | dict[str, Any] | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        **kwargs: Any,
) -> nn.Module:
    backbone: str = variant.removesuffix('_castream')
    attach_args = {name: kwargs.pop(name) for name in _ATTACH_ARGS & kwargs.keys()}
    gap_weights = attach_args.get('backbone_pretrained', False)
    saved_args = kwargs.get('pretrained_model_args') or {}
    if gap_weights and not pretrained and gap_weights == saved_args.get('backbone_pretrained'):
        # A stream's repository names the weights that its stream belongs to: without the stream nobody asked for them.
        gap_weights = attach_args['backbone_pretrained'] = False
    if isinstance(gap_weights, str):
        pretrained_name(backbone, gap_weights)  # refuses a tag that timm does not have
    gap_tag = gap_weights if isinstance(gap_weights, str) else BACKBONES[backbone]
    gap_cfg = resolve_pretrained_cfg(backbone, gap_tag)
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    if isinstance(gap_weights, str) and not isinstance(pretrained_cfg, dict):
        cfg = replace(cfg, **{name: getattr(gap_cfg, name) for name in _DATA_FIELDS})
        cfg = replace(cfg, **(pretrained_cfg_overlay or {}))
    backbone_cfg = replace(
        cfg, architecture=backbone, tag=gap_tag, source=None, file=None, url=gap_cfg.url, hf_hub_id=gap_cfg.hf_hub_id,
        hf_hub_filename=None).to_dict()
    create_backbone = model_entrypoint(backbone)
    # Asked for by name, and never by what a repository says of itself.
    allow_pickle = bool((pretrained_cfg_overlay or {}).get('hf_hub_filename'))

    if kwargs.get('features_only', False):  # the backbone's feature maps; nothing is pooled, so there is no stream
        state_dict = hub.load_state_dict(cfg, cache_dir, allow_pickle) if pretrained else {}
        if gap_weights and not state_dict:
            state_dict = read_timm_weights(f'{backbone}.{gap_tag}')
        if pretrained and not state_dict:
            raise RuntimeError(f'{cfg.hf_hub_id or cfg.file} holds a stream alone, which has no weights of {backbone}.')
        backbone_cfg['state_dict'] = state_dict
        features: Any = create_backbone(
            pretrained=bool(state_dict), pretrained_cfg=backbone_cfg, cache_dir=cache_dir, **kwargs)
        features.pretrained_cfg.pop('state_dict', None)
        return features

    model: Any = create_backbone(pretrained=False, pretrained_cfg=backbone_cfg, cache_dir=cache_dir, **kwargs)
    attach(model, **attach_args)
    model._castream.restore = {'pretrained_cfg': model.pretrained_cfg, 'default_cfg': model.pretrained_cfg}
    model.pretrained_cfg = model.default_cfg = cfg.to_dict()
    if pretrained:
        hub.load_pretrained(
            model, model.pretrained_cfg, num_classes=model.num_classes, in_chans=kwargs.get('in_chans', 3),
            cache_dir=cache_dir, allow_pickle=allow_pickle)
    loaded_classes = cfg.num_classes if pretrained else gap_cfg.num_classes if gap_weights else None
    if attach_args.get('freeze_backbone') and not attach_args.get('backbone_checkpoint') \
            and model.num_classes != loaded_classes:
        warnings.warn(
            f'freeze_backbone freezes a classifier of {variant} that was never loaded: unless a checkpoint is loaded '
            'next, the stream trains beside random weights. Start from backbone_pretrained or backbone_checkpoint.',
            stacklevel=4)
    # timm keeps create_model's arguments since 1.0.31; a saved model needs them to be built again.
    model._model_args = {k: v for k, v in {**kwargs, **attach_args}.items() if k not in _NOT_SAVED}
    return model


def _register(backbone: str) -> None:
    variant = f'{backbone}_castream'

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_castream(variant, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    entrypoint.__doc__ = f'{backbone} with a CA-Stream in place of its global average pooling, see `attach`.'
    setattr(sys.modules[__name__], variant, entrypoint)
    register_model(entrypoint)


for _backbone in BACKBONES:
    _register(_backbone)
