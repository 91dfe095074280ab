"""Checks of arguments. Each raises a ValueError that names the bad value and the valid ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .near import did_you_mean

ChannelNumbers = float | Sequence[float] | np.ndarray | Tensor
"""A mean or std of images: one number for all channels, or one per channel."""


def check_names(kind: str, names: Sequence[str], valid: Sequence[str], near: Iterable[str] = ()) -> None:
    """Raises ValueError unless `names` is a sequence of valid names without repetitions.

    Args:
        kind: Word for one name in the error, `'method'`.
        names: The given names.
        valid: All valid names, the nearest of which the error offers.
        near: More names that the error may offer.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f'{kind}s must be a sequence of names, got {names!r}.')
    for name in names:
        if name not in valid:
            hint = did_you_mean(name, (*valid, *near))
            raise ValueError(f'{kind} {name!r} is unknown{hint}, valid ones: {", ".join(map(repr, valid))}.')
    repeated = next((name for name in names if list(names).count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f'{kind} {repeated!r} is given twice.')


def check_bool(name: str, value: bool) -> None:
    """Raises ValueError unless the value is a bool. The string 'false' would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f'{name} must be True or False, got {value!r}.')


def check_count(name: str, value: int) -> None:
    """Raises ValueError unless the value is a positive int."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f'{name} must be a positive int, got {value!r}.')


def channel_numbers(name: str, given: Any, channels: int | None = None) -> list[float]:
    """A mean, std or colour of images as numbers: one for all channels, or one per channel.

    Args:
        name: Of the numbers; `'std'` is positive.
        given: A number, a sequence, an array or a tensor.
        channels: Of the images, or None where they are not known.

    Raises:
        ValueError: It holds something else than finite numbers, or another number of them.
    """
    try:
        numbers = torch.as_tensor(given, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f'{name} must hold numbers, got {given!r}.') from None
    if not all(math.isfinite(number) and (number > 0 or name != 'std') for number in numbers):
        kind = 'positive' if name == 'std' else 'finite'
        raise ValueError(f'{name} must hold {kind} numbers, got {tuple(numbers)}.')
    if not numbers or (channels is not None and len(numbers) not in (1, channels)):
        raise ValueError(
            f'{name} must hold one number or one per channel, got {len(numbers)}'
            + (f' for images of {channels} channel{"s" * (channels > 1)}.' if channels else '.')
        )
    return numbers


def check_unit_range(name: str, value: Tensor) -> None:
    """Raises ValueError unless all values lie in [0, 1]. NaN does not."""
    inside = (value >= 0) & (value <= 1)
    if not inside.all():
        raise ValueError(f'{name} must lie in [0, 1], got {value[~inside][0].item():g}.')


def check_class_indices(name: str, value: Any, num_classes: int | None = None) -> None:
    """Raises ValueError unless a tensor holds class indices: integers from 0 to `num_classes` - 1.

    Args:
        name: Name of the argument in the error.
        value: A tensor of any shape.
        num_classes: C, or None to check the type and the sign alone.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f'{name} must be a tensor of class indices, got {type(value).__name__}.')
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f'{name} must hold class indices, got {value.dtype}.')
    if not value.numel():
        return
    low, high = int(value.min()), int(value.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        valid = 'class indices start at 0' if num_classes is None else f'the model has 0 to {num_classes - 1}'
        raise ValueError(f'{name} has classes from {low} to {high}, {valid}.')
