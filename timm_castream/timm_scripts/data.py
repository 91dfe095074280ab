"""Compare the data sets of timm's scripts with the model and the options, before the first batch."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
from timm.utils import world_info_from_env

from ..datasets import count_classes


class DataChecks:
    """Wraps `create_model`, `create_dataset` and `create_loader` of a script.

    Args:
        args: The options of the script.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.mixes = any(getattr(args, name, None) for name in ('mixup', 'cutmix', 'cutmix_minmax'))
        self.num_classes: int | None = None

    def create_model(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps `create_model`: keeps the number of classes of the model."""

        @functools.wraps(create)
        def create_model(*args: Any, **kwargs: Any) -> Any:
            model = create(*args, **kwargs)
            self.num_classes = getattr(model, 'num_classes', None)
            return model

        return create_model

    def create_dataset(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps `create_dataset`: refuses more classes than the model has, and multi-label data that are mixed.

        timm ends in an index error of torch, on a GPU in one that does not name the labels.
        """

        @functools.wraps(create)
        def create_dataset(*args: Any, **kwargs: Any) -> Any:
            dataset = create(*args, **kwargs)
            classes = count_classes(dataset)
            if classes and self.num_classes and classes > self.num_classes:
                raise ValueError(
                    f'The data set has {classes} classes, the model has {self.num_classes}: pass '
                    f'--num-classes {classes}.'
                )
            if self.mixes and np.ndim(getattr(getattr(dataset, 'reader', None), 'targets', ())) > 1:
                raise ValueError(
                    '--mixup and --cutmix mix one class of each image, and this data set has several '
                    'labels for each image: leave them out.'
                )
            return dataset

        return create_dataset

    def create_loader(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps `create_loader`: refuses training images that fill no batch.

        timm leaves the last batch out when it is not full. Without a batch it ends in a failed assertion.
        """

        @functools.wraps(create)
        def create_loader(dataset: Any, *args: Any, **kwargs: Any) -> Any:
            loader = create(dataset, *args, **kwargs)
            if kwargs.get('is_training') and not len(loader):
                _, _, count = world_info_from_env()
                batch = f'{self.args.batch_size}' + (f' in each of {count} processes' if count > 1 else '')
                raise ValueError(
                    f'The {len(dataset)} training images fill no batch of {batch}: pass a smaller '
                    '--batch-size, or more images.'
                )
            return loader

        return create_loader
