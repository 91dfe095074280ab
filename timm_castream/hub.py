"""Weights to and from the Hugging Face Hub, and folders laid out like it: whole models, and streams alone.

timm names a repository in `pretrained_cfg` and adapts what was loaded; here the files are found, checked and read. Only
safetensors are read, by their explicit name: asked for no name, timm goes on to a pickle when a request fails.
"""
from __future__ import annotations

import json
import os
import pickle
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm.models
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from timm.models import PretrainedCfg
from torch import Tensor, nn

from .download import NO_PICKLE, WEIGHTS_NAME, download, hub_error
from .mixin import CAStreamMixin, castream_model
from .publish import write_repository
from .weights import (
    STREAM_PREFIX,
    StreamHeader,
    check_fit,
    read_safetensors,
    stream_state_dict,
    write_safetensors,
)

HUB_NAMESPACE = 'timm-castream'
NAMESPACE_VARIABLE = 'TIMM_CASTREAM_NAMESPACE'


def read_configs() -> dict[str, PretrainedCfg]:
    """The registered variants' pretrained cfgs, from `hf_configs/*.json`.

    A variant with a tag is looked for on the Hub as `<namespace>/<architecture>.<tag>`. The namespace is
    `HUB_NAMESPACE`; for mirrors and private organisations the environment variable TIMM_CASTREAM_NAMESPACE replaces it.

    Returns:
        Cfgs by `architecture.tag`, or by `architecture` where there is no tag.
    """
    namespace = os.environ.get(NAMESPACE_VARIABLE) or HUB_NAMESPACE
    cfgs = {}
    for file in sorted(files('hf_configs').iterdir(), key=lambda f: f.name):
        if not file.name.endswith('.json'):
            continue
        config = json.loads(file.read_text(encoding='utf-8'))
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in config['pretrained_cfg'].items()}
        name = file.name.removesuffix('.json')
        if fields.get('tag'):
            fields['hf_hub_id'] = f'{namespace}/{name}'
        cfgs[name] = PretrainedCfg(architecture=config['architecture'], num_classes=config['num_classes'], **fields)
    return cfgs


def load_pretrained(
        model: CAStreamMixin,
        pretrained_cfg: PretrainedCfg | dict[str, Any],
        num_classes: int = 1000,
        in_chans: int = 3,
        cache_dir: str | Path | None = None,
        allow_pickle: bool = False,
) -> None:
    """Loads what a pretrained cfg names into a model with a stream: a whole model, a stream or a plain backbone.

    timm's `load_pretrained` with the files found here: `num_classes` and `in_chans` adapt as there, and a class
    specific q_0 is dropped with the classifier. Everything is checked before anything is loaded.

    Args:
        model: A model with a stream. For a stream alone, its backbone has its weights already.
        pretrained_cfg: Where the weights are (`state_dict`, `file`, `hf_hub_id`, a `local-dir` source) and their shape.
        num_classes: C of the model. With others than the cfg's the classifier keeps its fresh weights.
        in_chans: Image channels of the model. With others than the cfg's the first convolution is adapted.
        cache_dir: Other than the Hub client's own cache.
        allow_pickle: Whether `hf_hub_filename` may name a pickle, read with torch's weights_only. Set it where the user
            asked for that file, never for what a repository's own config says.

    Raises:
        ValueError: If the file is damaged or does not fit the model.
        RuntimeError: If there are no such weights, or only pickled ones.
        OSError: If the Hub cannot be reached and the file is not in the cache.
    """
    cfg = pretrained_cfg.to_dict() if isinstance(pretrained_cfg, PretrainedCfg) else dict(pretrained_cfg)
    state_dict, metadata, origin = _read(cfg, cache_dir, allow_pickle)
    other_classes = num_classes != cfg.setdefault('num_classes', num_classes)
    other_input = in_chans != (cfg.get('input_size') or (3,))[0]
    adapted: set[str] = set()
    if other_classes or cfg.get('label_offset'):
        adapted.update(_parameters(cfg.get('classifier')))
    if other_classes and model.castream.class_specific:
        state_dict.pop(f'{STREAM_PREFIX}cls_token', None)
        adapted.add(f'{STREAM_PREFIX}cls_token')
    if other_input:
        adapted.update(_parameters(cfg.get('first_conv')))

    own = model.state_dict()
    stream = stream_state_dict(state_dict)
    if stream and len(stream) == len(state_dict):
        # An adapted first convolution is another backbone to the fingerprint.
        _load_stream(model, stream, metadata, origin, strict=not other_input, adapted=adapted)
        return
    if stream and 'castream_format' in metadata:  # heads do not show in any shape
        StreamHeader.parse(metadata, origin).check_arguments(model, origin)
    if not stream:
        own = {key: value for key, value in own.items() if not key.startswith(STREAM_PREFIX)}
    check_fit(state_dict, own, origin, adapted)
    if not other_input:  # timm before 1.0.31 takes all weights for those of 3 channels
        cfg['first_conv'] = None
    timm.models.load_pretrained(
        model, {**cfg, 'source': None, 'state_dict': state_dict}, num_classes=num_classes, in_chans=in_chans)


def load_state_dict(
        pretrained_cfg: PretrainedCfg | dict[str, Any],
        cache_dir: str | Path | None = None,
        allow_pickle: bool = False,
) -> dict[str, Tensor]:
    """The backbone's part of the state dict that a pretrained cfg names: nothing, where it names a stream alone.

    Arguments and errors are those of `load_pretrained`.
    """
    cfg = pretrained_cfg.to_dict() if isinstance(pretrained_cfg, PretrainedCfg) else pretrained_cfg
    state_dict = _read(cfg, cache_dir, allow_pickle)[0]
    return {key: value for key, value in state_dict.items() if not key.startswith(STREAM_PREFIX)}


def _parameters(modules: str | tuple[str, ...] | list[str] | None) -> list[str]:
    names = (modules,) if isinstance(modules, str) else modules or ()
    return [f'{name}.{parameter}' for name in names for parameter in ('weight', 'bias')]


def _read(
        cfg: dict[str, Any],
        cache_dir: str | Path | None,
        allow_pickle: bool,
) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """The state dict that a cfg names, its metadata, and what to call it. Sources go before one another as in timm."""
    source, file, repo_id = cfg.get('source'), cfg.get('file'), cfg.get('hf_hub_id')
    filename = cfg.get('hf_hub_filename') or WEIGHTS_NAME
    if source not in ('hf-hub', 'local-dir'):
        if cfg.get('state_dict'):
            return dict(cfg['state_dict']), {}, 'The state_dict of the pretrained cfg'
        if file:  # named by the user
            return (*_read_file(Path(file), str(file)), str(file))
        if not repo_id:
            raise RuntimeError(
                f'No pretrained weights exist for {cfg.get("architecture", "this model")}. Use pretrained=False for '
                'random init, or backbone_pretrained=True for GAP weights of the backbone.')
    if not filename.endswith('.safetensors') and not allow_pickle:
        raise RuntimeError(f'{file if source == "local-dir" else repo_id} offers the pickle {filename}. {NO_PICKLE}')
    if source == 'local-dir':
        path = Path(str(file)) / filename
        if not path.is_file():
            raise RuntimeError(f'The folder {file} has no {filename}. {NO_PICKLE}')
        return (*_read_file(path, str(path)), str(path))
    origin = f'{filename} of {repo_id}'
    try:
        path = download(str(repo_id), filename, cache_dir)
    except RuntimeError as error:
        reason = error.__cause__
        missing = isinstance(reason, RepositoryNotFoundError) and not isinstance(reason, GatedRepoError)
        if source == 'hf-hub' or not missing:
            raise
        variant = '.'.join(filter(None, (cfg.get('architecture'), cfg.get('tag'))))
        raise RuntimeError(
            f'The weights of {variant} have not been published (looked for {repo_id} on the Hub): train them with the '
            'recipe imagenet_sgd90.yaml, or start from GAP weights with backbone_pretrained=True in place of '
            'pretrained=True.') from reason
    return (*_read_file(path, origin), origin)


def _read_file(path: Path, origin: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f'There is no file {origin}.')
    if path.suffix == '.safetensors':
        return read_safetensors(path, origin)
    try:
        return timm.models.load_state_dict(str(path), weights_only=True), {}
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f'{origin} is damaged or no checkpoint: more than tensors and plain data is not unpickled.') from error


def save_stream(model: nn.Module, path: str | Path) -> None:
    """Saves the stream alone as one safetensors file, which `load_stream` takes.

    The file holds the `castream.*` entries of the state dict. Its header holds the format version, the backbone's name,
    the stream's arguments and the fingerprint of the weights beside it. Written whole or not at all.

    Args:
        model: A model with a stream.
        path: File to write, by custom `*.safetensors`.

    Raises:
        ValueError: If the model has no stream.
    """
    model = castream_model(model)
    write_safetensors(path, stream_state_dict(model.state_dict()), StreamHeader.of(model).to_metadata())


def load_stream(
        model: nn.Module,
        source: str | Path,
        strict: bool = True,
        cache_dir: str | Path | None = None,
) -> None:
    """Loads a stream that `save_stream` or `push_to_hub` saved. All of it or, with an error, nothing.

    Args:
        model: A model with a stream of the same arguments, on the backbone that the stream was trained beside.
        source: A safetensors file, a folder with a `model.safetensors`, or a Hub repository: `org/name` or
            `hf-hub:org/name`, with `@revision` if wanted. Of a whole model its stream is taken.
        strict: Refuse a backbone with other weights than those of the training. False: warn.
        cache_dir: Other than the Hub client's own cache.

    Raises:
        ValueError: If the model has no stream, or the file is damaged or of another backbone, other arguments or
            (strict) other weights.
        RuntimeError: If the repository is not there.
        OSError: If there is no such file, or the Hub cannot be reached.
    """
    model = castream_model(model)
    path, origin = _locate(str(source), cache_dir)
    tensors, metadata = read_safetensors(path, origin)
    _load_stream(model, stream_state_dict(tensors), metadata, origin, strict)


def _load_stream(
        model: CAStreamMixin,
        stream: dict[str, Tensor],
        metadata: dict[str, str],
        origin: str,
        strict: bool,
        adapted: set[str] | frozenset[str] = frozenset(),
) -> None:
    header = StreamHeader.parse(metadata, origin)
    header.check_arguments(model, origin)
    check_fit(stream, stream_state_dict(model.state_dict()), origin, adapted)
    header.check_fingerprint(model, origin, strict)
    model.load_state_dict(stream, strict=False)


def push_to_hub(
        model: nn.Module,
        repo_id: str,
        stream_only: bool = False,
        *,
        private: bool = False,
        token: str | None = None,
        commit_message: str = 'Add model',
        **card: Any,
) -> str:
    """Publishes a model, or its stream alone, as a Hub repository: config.json, model.safetensors and a model card.

    Args:
        model: A model with a stream.
        repo_id: `org/name`; made if need be. A card that is there is replaced.
        stream_only: Leave the backbone out.
        private: Whether a repository made here is private.
        token: Access token; None: the one of `hf auth login`.
        commit_message: Title of the commit.
        card: More arguments of `publish.write_repository`.

    Returns:
        The repository's address.

    Raises:
        ValueError: If `repo_id` is no such name, or as in `publish.write_repository`; nothing is sent then.
        RuntimeError: If the Hub does not take it.
        OSError: If the Hub cannot be reached.
    """
    if repo_id.count('/') != 1:  # the client would take the user's own account, and the card could not name it
        raise ValueError(f'{repo_id!r} is no name of a Hub repository, which is org/name.')
    api = HfApi(token=token, library_name='timm_castream')
    with TemporaryDirectory() as folder:
        write_repository(model, folder, repo_id, stream_only, **card)
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=commit_message)
        except Exception as error:  # as in download
            raise _push_error(error, repo_id) from error
    return str(url)


def _push_error(error: Exception, repo_id: str) -> Exception:
    if isinstance(error, HFValidationError):
        return hub_error(error, repo_id)
    if getattr(getattr(error, 'response', None), 'status_code', None) in (401, 403):
        return RuntimeError(f'The Hub does not let you write {repo_id}: run `hf auth login` with a token that may.')
    return OSError(f'{repo_id} could not be published: {" ".join(str(error).split())}')


def _locate(source: str, cache_dir: str | Path | None) -> tuple[Path, str]:
    """The file that a path or the name of a repository stands for, and what to call it."""
    repo_id = source.removeprefix('hf-hub:')
    path = Path(source)
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if path.is_file():
        return path, str(path)
    if repo_id == source and (path.suffix == '.safetensors' or source.count('/') != 1):
        raise FileNotFoundError(f'There is no file {path}, and a Hub repository is named org/name.')
    return download(repo_id, WEIGHTS_NAME, cache_dir), f'{WEIGHTS_NAME} of {repo_id}'
