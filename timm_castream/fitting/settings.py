"""The arguments of a fit that change the stream, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .._utils.checks import check_bool, check_count, check_names

LABELS = ('predicted', 'folders')


@dataclass(frozen=True)
class Settings:
    """The arguments of `fit.fit` that change the stream."""

    labels: str
    epochs: tuple[int, ...]
    lr: tuple[float, ...]
    stream_start: tuple[int, ...]
    num_images: int | None
    seed: int
    batch_size: int
    weight_decay: float
    distill: float
    true_share: float
    augment: bool
    image_settings: dict[str, Any]  # arguments of `backbones.image_settings.set_image_settings`

    def __post_init__(self) -> None:
        check_names('labels', (self.labels,), LABELS)
        check_bool('augment', self.augment)
        check_count('batch_size', self.batch_size)
        if self.num_images is not None:
            check_count('num_images', self.num_images)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ValueError(f'seed must be an int of at least 0, got {self.seed!r}.')
        if not 0 <= self.distill <= 1:
            raise ValueError(f'distill must lie in [0, 1], got {self.distill!r}.')
        if not 0 <= self.true_share <= 1:
            raise ValueError(f'true_share must lie in [0, 1], got {self.true_share!r}.')
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f'weight_decay must be at least 0, got {self.weight_decay!r}.')
        if self.labels == 'folders' and (self.distill or self.true_share):
            raise ValueError("distill and true_share need labels='predicted', got labels='folders'.")
