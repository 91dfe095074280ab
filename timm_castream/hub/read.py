"""Find and read weights: files, folders, Hub repositories, checkpoints of timm's train.py, and timm's own weights.

Hub files are read by their explicit name and as safetensors: if no name is given, timm takes a pickle when a
request fails. A pickle is read if the user names it, and with torch's `weights_only=True`: tensors and plain data.
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from timm.models import clean_state_dict
from torch import Tensor

from ..backbones.mixin import KEY_PREFIX
from .configs import NAMESPACE_VARIABLE, hub_repository
from .download import NO_PICKLE, PICKLE_NAME, WEIGHTS_NAME, download
from .stream_file import read_safetensors, stream_state_dict
from .wheels import read_wheel, wheel_of

# Keys of timm's checkpoints, and of DeiT's and others', in the order in which timm reads them.
_WEIGHTS_KEYS = ('state_dict', 'model')
_AVERAGED_KEYS = ('state_dict_ema', 'model_ema')

# First parts of keys that wrappers add: DataParallel, torch.compile, modules of Lightning. No network of timm has them.
_WRAPPERS = ('module', '_orig_mod', 'model', 'net')

_COUNT_OF_AVERAGES = 'n_averaged'  # of torch.optim.swa_utils.AveragedModel, beside the weights

_logger = logging.getLogger(__name__)


@dataclass
class Weights:
    """A state dict and its origin.

    Attributes:
        state_dict: Tensors on the CPU.
        origin: The file, as an error names it.
        metadata: Metadata of a safetensors file.
        model_args: Arguments of `create_model` that a checkpoint of train.py remembers.
        train_args: All options of train.py that the checkpoint remembers.
    """

    state_dict: dict[str, Tensor]
    origin: str
    metadata: dict[str, str] = field(default_factory=dict)
    model_args: dict[str, Any] = field(default_factory=dict)
    train_args: dict[str, Any] = field(default_factory=dict)

    @property
    def stream(self) -> dict[str, Tensor]:
        """The `castream.*` entries."""
        return stream_state_dict(self.state_dict)

    @property
    def backbone(self) -> dict[str, Tensor]:
        """All other entries."""
        return {key: value for key, value in self.state_dict.items() if not key.startswith(KEY_PREFIX)}


def read_cfg_weights(cfg: dict[str, Any], cache_dir: str | Path | None = None, allow_pickle: bool = False) -> Weights:
    """Reads the weights that a pretrained cfg names.

    Args:
        cfg: A pretrained cfg: `state_dict`, `file`, `hf_hub_id` or a `local-dir` source, which take precedence over one
            another as in timm.
        cache_dir: Other than the Hub client's own cache.
        allow_pickle: Whether `hf_hub_filename` may name a pickle. Only for a file that the user names: a repository
            must not be able to request it in its config.json.

    Raises:
        ValueError: If the file is damaged.
        RuntimeError: If there are no such weights, or only pickled ones. Weights that have not been published are
            requested only where TIMM_CASTREAM_NAMESPACE names a namespace.
        OSError: If the Hub cannot be reached and the file is not in the cache.
    """
    source, file = cfg.get('source'), cfg.get('file')
    filename = cfg.get('hf_hub_filename') or WEIGHTS_NAME
    name = '.'.join(filter(None, (cfg.get('architecture'), cfg.get('tag'))))
    repo_id = cfg.get('hf_hub_id')  # published weights have one
    if not repo_id and cfg.get('tag') and os.environ.get(NAMESPACE_VARIABLE):
        repo_id = hub_repository(name)
    if source not in ('hf-hub', 'local-dir'):
        if cfg.get('state_dict'):
            return Weights(dict(cfg['state_dict']), 'The state_dict of the pretrained cfg')
        if file:
            return read_file(file)
        if not repo_id and cfg.get('tag'):
            raise RuntimeError(_not_published(name))
        if not repo_id:
            raise RuntimeError(
                f'No pretrained weights exist for {name or "this model"}: pretrained=False gives random weights, '
                'backbone_pretrained=True the GAP weights of the backbone.'
            )
    if source == 'local-dir':  # the user names the folder, so the pickle of timm's save_for_hf is read too
        path = next((p for p in (Path(str(file), filename), Path(str(file), PICKLE_NAME)) if p.is_file()), None)
        if path is None:
            raise RuntimeError(f'The folder {file} has no {filename}.')
        return read_file(path)
    if not filename.endswith('.safetensors') and not allow_pickle:
        raise RuntimeError(f'{repo_id} offers the pickle {filename}. {NO_PICKLE}')
    try:
        path = download(str(repo_id), filename, cache_dir)
    except RuntimeError as error:
        reason = error.__cause__
        missing = isinstance(reason, RepositoryNotFoundError) and not isinstance(reason, GatedRepoError)
        if source == 'hf-hub' or not missing:
            raise
        raise RuntimeError(_not_published(name, f' (looked for {repo_id} on the Hub)')) from reason
    return read_file(path, f'{filename} of {repo_id}')


def _not_published(name: str, searched: str = '') -> str:
    return (
        f'The weights of {name} have not been published{searched}: train them with the recipe imagenet_sgd90.yaml, '
        'or start from GAP weights with backbone_pretrained=True in place of pretrained=True.'
    )


def read_file(path: str | Path, origin: str | None = None) -> Weights:
    """Reads a file that holds a state dict: safetensors, or a pickle of tensors and plain data.

    Args:
        path: The file.
        origin: The file, as an error should name it; by default its path.

    Raises:
        ValueError: If the file is damaged or no checkpoint.
        FileNotFoundError: If there is no such file.
    """
    path, origin = Path(path), origin or str(path)
    if not path.is_file():
        raise FileNotFoundError(f'There is no file {origin}.')
    if path.suffix == '.safetensors':
        state_dict, metadata = read_safetensors(path, origin)
        return Weights(state_dict, origin, metadata)
    try:
        return Weights(timm.models.load_state_dict(str(path), weights_only=True), origin)
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # it could not be opened; torch raises others on a file that is cut off
        raise ValueError(
            f'{origin} is damaged or no checkpoint: more than tensors and plain data is not unpickled.'
        ) from error


def read_checkpoint(path: str | Path, use_ema: bool | None = False) -> Weights:
    """Reads a checkpoint: of timm's train.py, a plain state dict, one under the key `model`, or a safetensors file.

    The options of a training with timm's train.py are read too.

    Args:
        path: `model_best.pth.tar`, `last.pth.tar`, `*.pth`, `*.safetensors`.
        use_ema: Take the averaged weights. False: take them only where there are no others. None: take them where there
            are some, as timm does.

    Raises:
        ValueError: If the file is no such checkpoint, or has no averaged weights where they are asked for.
        FileNotFoundError: If there is no such file.
    """
    if Path(path).suffix == '.safetensors':
        if use_ema:
            raise ValueError(f'{path} holds one set of weights, so there are no EMA weights to take.')
        weights = read_file(path)
        weights.state_dict = _unwrapped(weights.state_dict)
        return weights
    if not Path(path).is_file():
        raise FileNotFoundError(f'There is no file {path}.')
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # it could not be opened; torch raises others on a file that is cut off
        raise ValueError(
            f"{path} is damaged, or no checkpoint of timm's train.py: more than tensors and plain data is "
            'not unpickled.'
        ) from error
    state_dict = _find_state_dict(checkpoint, use_ema, str(path))
    options = checkpoint.get('args')
    train_args = options if isinstance(options, dict) else vars(options or argparse.Namespace())
    model_args = {
        'num_classes': train_args.get('num_classes'),
        'in_chans': train_args.get('in_chans'),
        'global_pool': train_args.get('gp'),
        **(train_args.get('model_kwargs') or {}),
    }
    return Weights(
        _unwrapped({key: value for key, value in clean_state_dict(state_dict).items() if key != _COUNT_OF_AVERAGES}),
        str(path),
        train_args=train_args,
        model_args={name: value for name, value in model_args.items() if value is not None},
    )


def checkpoint_label_names(path: str | Path) -> list[str] | None:
    """Names of the classes that a checkpoint of `castream train` keeps, or None. The weights are not read."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        names = getattr(checkpoint['args'], 'label_names', None)
    except Exception:  # another kind of file, which whoever loads it explains
        return None
    return [str(name) for name in names] if names else None


def _unwrapped(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the network inside wrappers, whose names all keys begin with."""
    names = {key.partition('.')[0] for key in state_dict}
    if len(names) != 1 or not names <= set(_WRAPPERS):
        return state_dict
    return _unwrapped({key.partition('.')[2]: value for key, value in state_dict.items()})


def _find_state_dict(checkpoint: Any, use_ema: bool | None, origin: str) -> dict[str, Any]:
    """The state dict in a checkpoint: under a key of timm's, the checkpoint itself, or its one dict of tensors."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{origin} holds a {type(checkpoint).__name__}, not a state dict.')
    averaged, own = (
        next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), dict)), None)
        for keys in (_AVERAGED_KEYS, _WEIGHTS_KEYS)
    )
    if own is None and averaged is None and any(isinstance(value, Tensor) for value in checkpoint.values()):
        own = checkpoint
    if own is None and averaged is None:
        dicts = [value for value in checkpoint.values() if isinstance(value, dict) and value]
        dicts = [value for value in dicts if all(isinstance(entry, Tensor) for entry in value.values())]
        own = dicts[0] if len(dicts) == 1 else None
    if use_ema and averaged is None:
        raise ValueError(f'{origin} has no EMA weights, train with --model-ema.')
    if own is None and averaged is None:
        raise ValueError(
            f'{origin} has no state_dict: it is a state dict or has one under {", ".join(_WEIGHTS_KEYS)}, '
            f'{" or ".join(_AVERAGED_KEYS)}; its keys are {", ".join(map(repr, list(checkpoint)[:5])) or "none"}.'
        )
    if own is None and use_ema is False:
        _logger.warning('%s holds averaged weights (EMA) alone, which are taken.', origin)
    chosen = own if averaged is None or (own is not None and use_ema is False) else averaged
    assert chosen is not None
    return chosen


def locate(source: str, cache_dir: str | Path | None = None) -> tuple[Path, str]:
    """Finds a safetensors file by path, folder or Hub repository.

    Returns:
        The file, and its name in errors.

    Raises:
        FileNotFoundError: If there is no such file, and `source` is no name of a repository.
        RuntimeError, OSError: As `download`.
    """
    repo_id = source.removeprefix('hf-hub:')
    path = Path(source)
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if path.is_file():
        return path, str(path)
    if repo_id == source and (path.suffix == '.safetensors' or source.count('/') != 1):
        raise FileNotFoundError(f'There is no file {path}, and a Hub repository is named org/name.')
    return download(repo_id, WEIGHTS_NAME, cache_dir), f'{WEIGHTS_NAME} of {repo_id}'


def timm_weights_name(architecture: str, tag: str | None) -> str:
    """timm's name of pretrained weights: `architecture.tag`, or `architecture` for its default ones.

    Raises:
        ValueError: If timm has no such weights.
    """
    name = f'{architecture}.{tag}' if tag else architecture
    known = timm.list_models(f'{architecture}.*', pretrained=True)
    if name not in (*known, architecture) or not known:
        raise ValueError(
            f'backbone_pretrained {tag or True!r} is no tag of {architecture}, valid ones: '
            f'{", ".join(k.split(".", 1)[1] for k in known) or "none"}.'
        )
    return name


def read_timm_weights(name: str) -> dict[str, Tensor]:
    """Reads timm's own weights of a plain backbone: from an installed wheel that holds them, or else from the Hub.

    Args:
        name: `architecture.tag`, or `architecture` for its default weights.

    Raises:
        ValueError, RuntimeError, OSError: As `read_wheel`, `download` and `read_safetensors`.
    """
    weights = read_wheel(name)
    if weights is not None:
        return weights
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or cfg.hf_hub_id is None:
        raise RuntimeError(f'timm has no {name} on the Hub: download the weights, and pass backbone_checkpoint.')
    filename = cfg.hf_hub_filename or WEIGHTS_NAME
    if not filename.endswith('.safetensors'):  # timm's repositories have safetensors beside the pickle
        filename = WEIGHTS_NAME
    try:
        path = download(cfg.hf_hub_id, filename)
    except OSError as error:
        wheel = wheel_of(name)
        if wheel is None:
            raise
        raise OSError(f'{error} `pip install {wheel.project}` brings the same weights.') from error
    return read_safetensors(path, f'{filename} of {cfg.hf_hub_id}')[0]
