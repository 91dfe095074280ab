"""The registered models: `<architecture>_castream` for every architecture of timm that takes a stream.

`backbones.architectures` tells which ones do.

The variants of the paper have their pretrained cfgs in `hf_configs/`. All others have those of their backbones, without
the weights. Where the package has a trained stream of a variant, its cfg names that file.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from dataclasses import replace
from typing import Any

from timm.models import PretrainedCfg, generate_default_cfgs, model_entrypoint, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from .backbones.architectures import architectures
from .hub.configs import read_configs, shipped_streams

# Backbones of the paper and of the tests, with the tag of the GAP weights on which their streams are trained. Other
# backbones take timm's default tag.
GAP_TAGS = {
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

# Fields that must come from the weights that are loaded: they describe its images and its classes.
_WEIGHTS_FIELDS = (
    'input_size',
    'test_input_size',
    'interpolation',
    'crop_pct',
    'test_crop_pct',
    'crop_mode',
    'mean',
    'std',
    'num_classes',
)
# Fields of a cfg that name weights.
_NO_WEIGHTS = {**dict.fromkeys(('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'label_offset')), 'custom_load': False}
_NOT_SAVED = ('device', 'dtype', 'pretrained_model_args')


def _create_castream(
    variant: str,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Creates the backbone by timm's entrypoint, attaches a stream, and loads the weights that are asked for.

    Args:
        variant: `<backbone>_castream`.
        pretrained: Load the weights that the pretrained cfg names: a model, a stream alone, or a plain backbone.
        pretrained_cfg, pretrained_cfg_overlay, cache_dir: As of `timm.create_model`.
        **kwargs: Arguments of `attach`, and those that timm hands to the entrypoint of the backbone.
    """
    # Imported when a model is made, so that registering the names stays cheap.
    from .attach import attach, check_flags
    from .hub.load import load_weights
    from .hub.read import read_cfg_weights
    from .hub.stream_file import StreamHeader

    backbone = variant.removesuffix('_castream')
    attach_names = inspect.signature(attach).parameters.keys() - {'model'}
    attach_args = {name: kwargs.pop(name) for name in attach_names & kwargs.keys()}
    check_flags(attach_args)
    saved_args = {**kwargs, **attach_args}
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    # The user names the file in the overlay. A repository cannot request a pickle in its config.json.
    allow_pickle = bool((pretrained_cfg_overlay or {}).get('hf_hub_filename'))
    weights = read_cfg_weights(cfg.to_dict(), cache_dir, allow_pickle) if pretrained else None
    asked = attach_args.pop('backbone_pretrained', False)
    # A stream of the package brings its arguments, and needs timm's weights of the backbone.
    if weights and cfg.file and cfg.file == _shipped.get(variant):
        attach_args = {**StreamHeader.parse(weights.metadata, weights.origin).stream_args, **attach_args}
        asked = asked or not attach_args.get('backbone_checkpoint')
    gap_name = _gap_name(backbone, asked, pretrained, kwargs)
    gap_cfg = resolve_pretrained_cfg(backbone, gap_name.partition('.')[2] or GAP_TAGS.get(backbone))
    if gap_name and not isinstance(pretrained_cfg, dict):
        fields = {name: getattr(gap_cfg, name) for name in _WEIGHTS_FIELDS}
        cfg = replace(cfg, **{**fields, **(pretrained_cfg_overlay or {})})
    backbone_cfg = replace(
        cfg,
        architecture=backbone,
        tag=gap_cfg.tag,
        source=None,
        file=None,
        state_dict=None,
        url=gap_cfg.url,
        hf_hub_id=gap_cfg.hf_hub_id,
        hf_hub_filename=None,
    )

    if kwargs.get('features_only', False):  # feature maps are not pooled, so there is no stream
        state_dict = weights.backbone if weights else {}
        if pretrained and not state_dict and not gap_name:
            raise RuntimeError(f'{cfg.hf_hub_id or cfg.file} holds a stream alone, which has no weights of {backbone}.')
        return _create_backbone(backbone_cfg, state_dict, gap_name, cache_dir, kwargs)

    model: Any = _create_backbone(backbone_cfg, {}, gap_name, cache_dir, kwargs)
    attach(model, **attach_args)
    model.use_variant_cfg(cfg.to_dict())
    if weights:
        load_weights(model, weights, model.pretrained_cfg, kwargs.get('in_chans', 3))
    loaded_classes = cfg.num_classes if weights or gap_name else None
    if (
        attach_args.get('freeze_backbone')
        and not attach_args.get('backbone_checkpoint')
        and model.num_classes != loaded_classes
    ):
        warnings.warn(
            f'freeze_backbone freezes a classifier of {variant} that was never loaded: unless a checkpoint is loaded '
            'next, the stream trains on random weights. Start from backbone_pretrained or backbone_checkpoint.',
            stacklevel=4,
        )
    # timm's save_for_hf writes the arguments of create_model that the model keeps.
    model._model_args = {name: value for name, value in saved_args.items() if name not in _NOT_SAVED}
    return model


def _gap_name(backbone: str, asked: bool | str, pretrained: bool, kwargs: dict[str, Any]) -> str:
    """timm's name of the GAP weights to load, `architecture.tag` or `architecture`, or ''."""
    from .hub.read import timm_weights_name

    saved = (kwargs.get('pretrained_model_args') or {}).get('backbone_pretrained')
    # The config.json of a stream alone names the weights that its stream needs. Without the stream they are not wanted.
    if not asked or (asked == saved and not pretrained):
        return ''
    return timm_weights_name(backbone, asked if isinstance(asked, str) else GAP_TAGS.get(backbone))


def _create_backbone(
    cfg: PretrainedCfg, state_dict: dict[str, Tensor], gap_name: str, cache_dir: str | None, kwargs: dict[str, Any]
) -> nn.Module:
    """The plain backbone with a state dict, or else with timm's weights of a name, which timm adapts to the model."""
    from .hub.read import read_timm_weights

    if not state_dict and gap_name:
        state_dict = read_timm_weights(gap_name)
    fields = cfg.to_dict()
    if state_dict:
        fields['state_dict'] = state_dict
    model: Any = model_entrypoint(str(cfg.architecture))(
        pretrained=bool(state_dict), pretrained_cfg=fields, cache_dir=cache_dir, **kwargs
    )
    model.pretrained_cfg.pop('state_dict', None)
    return model


def _variant_cfg(backbone: str) -> PretrainedCfg:
    """The backbone's cfg without its weights, and with the stream of the package where there is one."""
    # The cfgs of a timm module are read without a copy: timm.get_pretrained_cfg copies each one deeply.
    cfgs = getattr(sys.modules[model_entrypoint(backbone).__module__], 'default_cfgs', {})
    cfg = PretrainedCfg.__new__(PretrainedCfg)  # dataclasses.replace takes ten times as long, for 1,270 cfgs
    vars(cfg).update(vars(cfgs[backbone].default if backbone in cfgs else PretrainedCfg()), **_NO_WEIGHTS)
    cfg.file = _shipped.get(f'{backbone}_castream')
    return cfg


def _register(backbone: str) -> None:
    variant = f'{backbone}_castream'

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_castream(variant, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    entrypoint.__doc__ = f'{backbone} with a CA-Stream in place of its pooling, see `attach`.'
    globals()[variant] = entrypoint
    globals()['__all__'] = []  # timm searches the list for every name
    register_model(entrypoint)


_backbones = architectures()
_configs = read_configs()
_shipped = {name: str(path) for name, path in shipped_streams().items()}
_in_paper = {cfg.architecture for cfg in _configs.values()}
# timm's register_model reads this name.
default_cfgs = generate_default_cfgs(
    {
        **_configs,
        **{f'{name}_castream': _variant_cfg(name) for name in _backbones if f'{name}_castream' not in _in_paper},
    }
)
for _backbone in _backbones:
    _register(_backbone)
__all__ = [f'{name}_castream' for name in _backbones]  # noqa: PLE0605
