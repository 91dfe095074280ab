"""What a data loader does to its images: the transform and the normalisation."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import RandomSampler

from ..datasets.unreadable import innermost

Normalisation = tuple[list[float], list[float]]  # mean and std, one number a channel, of pixels in [0, 1]

_logger = logging.getLogger(__name__)


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


def warn_of_another_normalisation(loader: Any, mean: list[float], std: list[float]) -> None:
    """Warns where a loader normalises its images by other numbers than those that the network is measured with."""
    of_loader = normalisation_of(loader)
    if of_loader is None or all(map(_equal, of_loader, (mean, std))):
        return
    _logger.warning(
        'The loader normalises by mean %s and std %s, the network by mean %s and std %s, so the values are those of '
        "other images: make the loader with the mean and std of model.pretrained_cfg, or pass evaluate the loader's.",
        *of_loader,
        mean,
        std,
    )


def warn_of_sampler(loader: Any, reads_saved_maps: bool, num_samples: int | None = None) -> None:
    """Says in one sentence where a loader's sampler is not what an evaluation does, which reads by index, in order.

    Args:
        loader: As of `normalisation_of`.
        reads_saved_maps: Whether a method has saved maps, whose order may be that of a shuffling loader.
        num_samples: Size of the sample that is evaluated, or None for all images.
    """
    inner = getattr(loader, 'loader', loader)
    sampler: Any = getattr(inner, 'sampler', None)
    number = len(inner.dataset)
    kind = type(sampler).__name__
    # Those of several processes have a part of the images each, and an evaluation parts them by itself.
    length = len(sampler) if hasattr(sampler, '__len__') and 'Distributed' not in kind else number
    chooses = length != number or getattr(sampler, 'replacement', False)
    if chooses:
        _logger.warning(
            'The %s of the loader is ignored: %s images of its data set are evaluated, each once; '
            'torch.utils.data.Subset chooses some of them.',
            kind,
            f'all {number}' if num_samples is None else f'{num_samples} of the {number}',
        )
    elif reads_saved_maps and isinstance(sampler, RandomSampler):
        _logger.warning(
            'The loader shuffles, and an evaluation reads the data set in its own order: saved maps without names must '
            'have that order too.'
        )


def _equal(one: list[float], other: list[float]) -> bool:
    """Whether two means or stds are equal; a single number serves all channels."""
    length = max(len(one), len(other))
    pairs = zip(one * (length // len(one)), other * (length // len(other)), strict=False)
    return all(abs(a - b) < 1e-3 for a, b in pairs)  # float16 rounds 255 * 0.485 by 3e-5


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


def _numbers(values: Any, scale: float = 1.0) -> list[float]:
    return [round(value / scale, 6) for value in torch.as_tensor(values, dtype=torch.float64).flatten().tolist()]
