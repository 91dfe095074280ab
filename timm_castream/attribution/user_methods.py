"""Methods of the user: names, callables, saved maps and methods of other libraries become rows of the table of methods.

Letters: B images, K targets an image, N images of a data set, h x w locations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._utils.checks import check_names
from . import cam
from .methods import METHODS, Batch, Method
from .peers import check_library, is_peer, peer_method, peer_names
from .restoring import Hooks, as_it_was

__all__ = ['UserMethod', 'check_maps', 'resolve_methods']

UserMethod = str | Callable[[Tensor, Tensor], Any] | np.ndarray | Tensor | Mapping[str, Any]


def resolve_methods(methods: Sequence[str] | Mapping[str, UserMethod]) -> tuple[Method, ...]:
    """The rows of the methods asked for.

    Args:
        methods: Names of `METHODS` or of methods of other libraries, or a mapping from a label to a name, a callable
            or an array of maps; see `evaluate.evaluate`.

    Raises:
        ValueError: If a name is unknown or repeated, a label cannot be printed, or a value of the mapping is of another
            type.
    """
    if not isinstance(methods, Mapping):
        for name in () if isinstance(methods, str) else methods:
            check_library(name)
        check_names('method', methods, (*METHODS, *filter(is_peer, methods)), peer_names())
        return tuple(METHODS[name] if name in METHODS else _user_method(name, name) for name in methods)
    if not methods:
        raise ValueError('methods is empty: name one of ' + ', '.join(map(repr, METHODS)) + '.')
    labels = [str(label) for label in methods]
    check_names('method', labels, labels)
    return tuple(_user_method(label, value) for label, value in zip(labels, methods.values(), strict=True))


def check_maps(methods: Sequence[Method], num_images: int, poolings: Sequence[str]) -> None:
    """Raises ValueError unless every method with saved maps has one for each image under each pooling."""
    for method in methods:
        if isinstance(method.saliency, _SavedMaps):
            method.saliency.check(num_images, poolings)


def _user_method(label: str, value: Any) -> Method:
    if '/' in label:
        raise ValueError(f'method {label!r} has a slash, which separates the columns of the result files.')
    if not label.strip() or not label.isprintable():
        raise ValueError(f'method {label!r} has no label for a table: give it one of letters, without line breaks.')
    if isinstance(value, Method):
        return value
    if label in METHODS and not (isinstance(value, str) and value == label):
        raise ValueError(f'method {label!r} is the name of a built-in method: choose another label.')
    if is_peer(value):
        return peer_method(value, label)
    if isinstance(value, str):
        check_library(value)
        check_names('method', (value,), tuple(METHODS), peer_names())
        row = METHODS[value]
        return Method(
            label, row.title if label == value else label, row.saliency, row.needs, row.in_paper, source=value
        )
    if callable(value):
        _check_signature(label, value)
        return Method(label, label, _UserFunction(label, value), source=value)
    arrays: Any = value if isinstance(value, Mapping) else {None: value}
    try:
        arrays = {pooling: _to_numpy(array) for pooling, array in arrays.items()}
        given = ', '.join(f'{array.dtype} of {array.shape}' for array in arrays.values())
        fits = all(array.ndim == 3 and array.dtype.kind in 'bfiu' for array in arrays.values())
    except (TypeError, ValueError):
        given, fits = type(value).__name__, False
    if not fits:
        raise ValueError(
            f'method {label!r} must be a name, a callable, an array of shape (N, h, w) or a mapping from a pooling to '
            f'such arrays, got {given}.'
        )
    return Method(label, label, _SavedMaps(label, arrays), frozenset({'saved maps'}), source=arrays)


def _check_signature(label: str, function: Callable[..., Any]) -> None:
    """Raises ValueError unless a function can be called with images and targets."""
    try:
        signature = inspect.signature(function, follow_wrapped=False)  # what is called, not what it wraps
    except (TypeError, ValueError):  # of a function that is not written in Python
        return
    try:
        signature.bind(None, None)
    except TypeError:
        name = getattr(function, '__name__', type(function).__name__)
        raise ValueError(
            f'method {label!r} is called with images and targets, (x, target), which {name}{signature} does not take.'
        ) from None


def _to_numpy(array: Any) -> np.ndarray:
    return array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)


@dataclass(frozen=True)
class _UserFunction:
    """A callable of the user as a method: it gets (B, 3, H, W) images and (B,) targets and runs with gradients.

    An exception of the callable becomes the cause of a RuntimeError with the label of the method. The network is
    afterwards as it was. Hooks that the callable leaves are there again when it runs next.
    """

    label: str
    function: Callable[[Tensor, Tensor], Any]
    hooks: Hooks = field(default_factory=list, repr=False, compare=False)

    def __call__(self, batch: Batch, pooling: str) -> Tensor:
        model = batch.predictor.model
        before = _version(model)
        with as_it_was(model, self.hooks), batch.predictor.pooled_by(pooling), torch.enable_grad():
            # One target an image at a time, so that a batch never grows.
            maps = [self._maps(batch.x, target) for target in batch.targets[pooling].unbind(1)]
        if _version(model) != before:
            batch.forget_graph()
        return torch.stack(maps, 1)

    def _maps(self, x: Tensor, target: Tensor) -> Tensor:
        try:
            values = self.function(x.detach().clone(), target)
        except Exception as error:
            raise RuntimeError(f'method {self.label!r} raised {type(error).__name__}: {error}') from error
        count = len(x)
        try:
            values = torch.as_tensor(values).detach().to(x.device)
            given = f'shape {tuple(values.shape)}'
        except (TypeError, ValueError, RuntimeError):
            given, values = type(values).__name__, torch.empty(0)
        if values.ndim == 4:
            values = values.sum(1)
        if values.ndim != 3 or len(values) != count:
            raise ValueError(
                f'method {self.label!r} returned {given} for {count} images, valid ones: ({count}, h, w), '
                f'({count}, 1, h, w) and ({count}, C, H, W).'
            )
        return _scaled(values)


@dataclass(frozen=True)
class _SavedMaps:
    """Saved maps of all images of a data set as a method."""

    label: str
    arrays: dict[str | None, np.ndarray] = field(repr=False)

    def check(self, num_images: int, poolings: Sequence[str]) -> None:
        """Raises ValueError unless there is a map for every image under every pooling."""
        missing = [name for name in poolings if None not in self.arrays and name not in self.arrays]
        if missing:
            raise ValueError(f'method {self.label!r} has no maps for pooling {missing[0]!r}.')
        for array in self.arrays.values():
            if len(array) != num_images:
                raise ValueError(f'method {self.label!r} has {len(array)} maps, the data set has {num_images} images.')

    def __call__(self, batch: Batch, pooling: str) -> Tensor:
        array = self.arrays[None] if None in self.arrays else self.arrays[pooling]
        chosen = torch.from_numpy(np.ascontiguousarray(array[batch.indices.tolist()], dtype=np.float32))
        return batch.expand_targets(_scaled(chosen.to(batch.x.device)), pooling)


def _version(model: nn.Module) -> int:
    """Number of changes in place of all weights. A graph that was recorded before one is of no use afterwards."""
    return sum(parameter._version for parameter in model.parameters() if not parameter.is_inference())


def _scaled(maps: Tensor) -> Tensor:
    """(R, h, w) maps clamped at 0 and scaled to [0, 1], as those of the paper. NaN where one has NaN or infinity."""
    maps = maps.float()
    size = maps.abs().amax((1, 2), keepdim=True)
    scaled = cam.scale_maps(maps.clamp(min=0), size)
    return torch.where(size.isfinite(), scaled, torch.nan)
