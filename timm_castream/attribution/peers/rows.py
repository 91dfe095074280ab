"""Methods of other libraries as rows of the table of methods: `captum:NAME`, `grad-cam:NAME` and `torchcam:NAME`.

Letters: B images, K targets an image, h x w locations of a map.
"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._utils.near import did_you_mean, nearest
from ...inference.predictor import Predictor
from .. import cam
from ..methods import Batch, Method
from .captum import Captum
from .grad_cam import GradCam
from .hookable import hookable
from .library import Library, PeerMethod
from .torchcam import TorchCam

LIBRARIES: dict[str, Library] = {library.prefix: library for library in (Captum(), GradCam(), TorchCam())}
_logger = logging.getLogger(__name__)

# How an error names the method and the network before the reason.
_NAMED = re.compile(r"^(\S+ does not fit \w+|method '[^']*' raised \w+): ")


def is_peer(source: Any) -> bool:
    """Whether the name of a method is that of a method of another library."""
    return isinstance(source, str) and ':' in source and source.partition(':')[0] in LIBRARIES


def peer_names() -> list[str]:
    """Names of the methods of other libraries that are not refused, whether the library is installed or not."""
    return [
        f'{prefix}:{row.name}'
        for prefix, library in LIBRARIES.items()
        for row in library.methods.values()
        if not row.refused
    ]


def check_library(name: Any) -> None:
    """Raises ValueError if a name has a colon behind something else than the prefix of a library."""
    if not isinstance(name, str) or ':' not in name or is_peer(name):
        return
    given, _, method = name.partition(':')
    # A library may be called by its prefix, its package or its module.
    prefixes = {
        spelling: library.prefix
        for library in LIBRARIES.values()
        for spelling in (library.prefix, library.package, library.module.partition('.')[0])
    }
    near = nearest(given, prefixes)
    meant = nearest(f'{prefixes[near]}:{method}', peer_names()) if near else None
    hint = f' (did you mean {meant!r}?)' if meant else ''
    raise ValueError(f'method {name!r} is unknown{hint}, valid ones before the colon: {", ".join(LIBRARIES)}.')


def peer_method(source: str, label: str | None = None) -> Method:
    """A method of another library as a row of the table of methods.

    Args:
        source: `prefix:NAME` or `prefix:NAME,key=value,...`, with arguments of the library as Python literals. Text
            needs no quotes.
        label: Name of the row. None: the source.

    Raises:
        ValueError: If the name or an argument is unknown, the library is not installed, or the method cannot run here.
    """
    prefix, _, call = source.partition(':')
    name, _, text = call.partition(',')
    library = LIBRARIES[prefix]
    row = library.methods.get(name)
    if row is None:
        valid = [method.name for method in library.methods.values() if not method.refused]
        hint = did_you_mean(name, valid)
        raise ValueError(f'{prefix}:{name} is no method of {library.package}{hint}, valid ones: {", ".join(valid)}.')
    if row.refused:
        raise ValueError(f'{prefix}:{name} cannot run here: {row.refused}.')
    arguments = _parsed_arguments(source, text)
    library.check(row, arguments)
    label = source if label is None else label
    saliency = PeerMaps(label, library, row, arguments)
    needs = frozenset({'seed'}) if row.random else frozenset()
    version = f'{library.package} {library.version}'
    return Method(
        label,
        label,
        saliency,
        needs,
        forwards=row.forwards,
        forward_a_channel=row.forward_a_channel,
        source=f'{source} of {version}',
        check=saliency.check,
    )


def peers_that_fit(predictor: Predictor) -> list[str]:
    """Names of the methods of the installed libraries that the architecture of a network does not rule out. None is
    tried and no library is imported. Those with many forwards are left out."""
    return [
        name
        for library in LIBRARIES.values()
        if library.installed
        for row in library.methods.values()
        if not (row.refused or row.costly) and _fits(name := f'{library.prefix}:{row.name}', library, row, predictor)
    ]


def peers_that_work(predictor: Predictor, x: Tensor) -> list[str]:
    """Names of the methods of the installed libraries that run on a network. A warning has the others, with each reason
    once.

    Methods are tried on one image. Those with a forward a channel are not tried, and those with many are left out.

    Args:
        predictor: The network.
        x: (1, C, H, W), an image of the network's size.
    """
    names: list[str] = []
    left_out: dict[str, list[str]] = {}  # names by reason
    for library in LIBRARIES.values():
        if not library.installed:
            _logger.warning('all: %s is not installed, so its methods are left out.', library.package)
            continue
        for row in library.methods.values():
            name = f'{library.prefix}:{row.name}'
            problem = row.refused or (row.costly and f'{row.costly}: name it to run it') or why_not(name, predictor, x)
            if problem:
                left_out.setdefault(re.sub(_NAMED, '', problem).rstrip('.'), []).append(name)
            else:
                names.append(name)
    if left_out:
        lines = (f'{", ".join(same)}: {reason}' for reason, same in left_out.items())
        count = sum(map(len, left_out.values()))
        _logger.warning('all leaves out %d methods of other libraries:\n  %s', count, '\n  '.join(lines))
    return names


def why_not(name: str, predictor: Predictor, x: Tensor) -> str:
    """Why a method does not run on a network, or ''. It is tried on one image, but not if it needs one
    forward pass per channel."""
    try:
        method = peer_method(name)
        peer = method.saliency
        assert isinstance(peer, PeerMaps)
        peer.check(predictor)
        if not peer.row.forward_a_channel:
            with predictor.evaluating():
                batch = Batch(predictor, x, (method,))
                batch.targets = dict.fromkeys(predictor.poolings, torch.zeros(1, 1, dtype=torch.int64, device=x.device))
                peer(batch, predictor.poolings[0])
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ''


@dataclass(frozen=True)
class PeerMaps:
    """Maps of a method of another library.

    An exception of the library becomes the cause of a RuntimeError with the label of the method.
    """

    label: str
    library: Library
    row: PeerMethod
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def check(self, predictor: Predictor) -> None:
        """Raises ValueError if the method cannot run on a network, or would give the maps of another method."""
        name = f'{self.library.prefix}:{self.row.name}'
        problem = self.row.unfit(predictor)
        if problem:
            raise ValueError(f'{name} does not fit {predictor.name}: {problem}.')
        if self.row.layer:
            if not predictor.has_feature_maps:
                raise ValueError(f'{name} reads the maps of a layer: name one of {predictor.name} with layer=.')
            predictor.stage  # noqa: B018 it is found here, before long work

    def __call__(self, batch: Batch, pooling: str) -> Tensor:
        """(B, K, h, w) maps in [0, 1]."""
        self.check(batch.predictor)
        return torch.stack([self._of_target(batch, pooling, target) for target in batch.targets[pooling].unbind(1)], 1)

    def _of_target(self, batch: Batch, pooling: str, target: Tensor) -> Tensor:
        size = 1 if self.row.alone or self.row.random else len(batch.x)
        parts = []
        for images, classes, indices in zip(
            batch.x.split(size), target.split(size), batch.indices.split(size), strict=True
        ):
            seed = np.random.SeedSequence([batch.seed, *indices.tolist()]).generate_state(1)[0]
            with _seeded(int(seed), images.device):
                parts.append(self._maps(batch.predictor, images.detach().clone(), classes, pooling))
        maps = torch.cat(parts).float()
        return cam.scale_maps(maps.clamp(min=0), maps.abs().amax((-2, -1), keepdim=True))

    def _maps(self, predictor: Predictor, x: Tensor, classes: Tensor, pooling: str) -> Tensor:
        """(B, h, w) maps as the library gives them, channels summed."""
        arguments = {**self.row.defaults(x.shape[1:]), **self.arguments}
        size = predictor.batch_size(x)
        try:
            with hookable(predictor, pooling, layer=self.row.layer) as network:
                maps = self.library.maps(network, x, classes.tolist(), self.row, arguments, size)
        except Exception as error:
            raise RuntimeError(f'method {self.label!r} raised {type(error).__name__}: {error}') from error
        maps = torch.as_tensor(maps).detach().to(x.device)
        return maps.sum(1) if maps.ndim == 4 else maps


def _fits(name: str, library: Library, row: PeerMethod, predictor: Predictor) -> bool:
    try:
        PeerMaps(name, library, row).check(predictor)
    except ValueError:
        return False
    return True


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of torch and numpy from a seed inside, the caller's own afterwards."""
    state = np.random.get_state()
    with torch.random.fork_rng([device] if device.type == 'cuda' else []):
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)


def _parsed_arguments(source: str, text: str) -> dict[str, Any]:
    """The arguments in `key=value,...`."""
    try:
        call = ast.parse(f'f({text})', mode='eval').body
        assert isinstance(call, ast.Call)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        pairs = [
            (str(word.arg), word.value.id if isinstance(word.value, ast.Name) else ast.literal_eval(word.value))
            for word in call.keywords
        ]
    except (SyntaxError, ValueError):
        raise ValueError(
            f'{source!r} has arguments that are not key=value,key=value with numbers, text or tuples.'
        ) from None
    arguments = dict(pairs)
    if len(arguments) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'{source!r} gives {next(name for name in names if names.count(name) > 1)} twice.')
    return arguments
