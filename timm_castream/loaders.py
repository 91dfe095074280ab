"""What a data loader does to its images: the transform and the normalisation."""
from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from .datasets.unreadable import innermost

Normalisation = tuple[list[float], list[float]]  # mean and std, one number a channel, of pixels in [0, 1]


def transform_text(loader: Any) -> str | None:
    """The repr of the data set's transform without addresses in memory, or None where there is no transform."""
    transform = _transform_of(loader)
    return None if transform is None else re.sub(r' at 0x[0-9a-fA-F]+', '', repr(transform))


def normalisation_of(loader: Any) -> Normalisation | None:
    """Mean and std by which a loader normalises its images, or None where they are unknown.

    Args:
        loader: timm's `PrefetchLoader`, or a `DataLoader` whose data set has a transform.
    """
    if hasattr(loader, 'loader') and hasattr(loader, 'mean') and hasattr(loader, 'std'):
        return _numbers(loader.mean, 255), _numbers(loader.std, 255)  # timm normalises bytes there
    found = [step for step in _steps(_transform_of(loader)) if hasattr(step, 'mean') and hasattr(step, 'std')]
    return (_numbers(found[-1].mean), _numbers(found[-1].std)) if found else None


def _transform_of(loader: Any) -> Any:
    return getattr(innermost(loader.dataset, 0)[0], 'transform', None)


def _steps(transform: Any) -> Iterator[Any]:
    """The steps of a transform, those of a Compose inside a Compose too."""
    steps = getattr(transform, 'transforms', None)
    if not isinstance(steps, (list, tuple)):
        yield transform
        return
    for step in steps:
        yield from _steps(step)


def _numbers(values: Any, scale: float = 1.) -> list[float]:
    return [round(value / scale, 6) for value in torch.as_tensor(values, dtype=torch.float64).flatten().tolist()]
